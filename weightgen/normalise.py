"""Scaling of weight tokens before they are coded; fitted on a zoo, inverted exactly up to rounding."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from heirloom.common.errors import InputError
from weightgen.tokens import TokenSpec

Kind = Literal["none", "scale", "tensor", "row", "asinh"]
TINY = 1e-12


@dataclass(frozen=True)
class Normaliser:
    """(w - mean) / std, or asinh of it. mean, std: [rows, length] f32; the padding stays 0."""

    kind: Kind
    mean: np.ndarray
    std: np.ndarray
    mask: np.ndarray

    @classmethod
    def fit(cls, kind: Kind, spec: TokenSpec, tokens: np.ndarray, scale: float = 1.0) -> "Normaliser":
        """tokens: [member, rows, length].

        none; scale: divide by the constant `scale` (as released: 1 for small CNNs, 0.125 for ResNets, 0.1 for language models);
        tensor: z-score per tensor; row: z-score per token; asinh: of weights divided by the spread of their tensor, for heavy tails.
        """
        mean, std = np.zeros(spec.mask.shape), np.ones(spec.mask.shape)
        if kind == "scale":
            std[...] = scale
        elif kind in ("tensor", "row", "asinh"):
            groups = np.where(spec.mask, np.arange(spec.rows)[:, None], -1) if kind == "row" else spec.tensor
            for group in range(groups.max() + 1):
                here = groups == group
                values = np.asarray(tokens[:, here], np.float64)
                mean[here] = 0 if kind == "asinh" else values.mean()
                std[here] = max(values.std(), TINY)
        elif kind != "none":
            raise InputError(f"no normaliser {kind!r} (there are none, scale, tensor, row, asinh)")
        return cls(kind, mean.astype(np.float32), std.astype(np.float32), spec.mask)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        scaled = (tokens - self.mean) / self.std
        return np.where(self.mask, np.arcsinh(scaled) if self.kind == "asinh" else scaled, 0).astype(np.float32)

    def invert(self, tokens: np.ndarray) -> np.ndarray:
        scaled = np.sinh(tokens) if self.kind == "asinh" else tokens
        return np.where(self.mask, scaled * self.std + self.mean, 0).astype(np.float32)
