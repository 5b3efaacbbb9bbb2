"""Low-rank adapters: their gauge, and turning a checkpoint of them into tokens.

An adapter is a product B A; (B R, R^-1 A) is the same adapter for every invertible R. A generator that is not told would see an
arbitrary basis, so adapters are brought to one form first.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from common.errors import InputError

PAIR = re.compile(r"^(?P<name>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")  # names of peft


@dataclass(frozen=True)
class Adapter:
    """One low-rank pair. down: [rank, in] (A); up: [out, rank] (B); the update of the weight is up @ down."""

    down: np.ndarray
    up: np.ndarray

    @property
    def delta(self) -> np.ndarray:
        return self.up @ self.down


def canon(adapter: Adapter) -> Adapter:
    """The same update from the singular value decomposition of B A: roots of the singular values on both sides, in falling order; of
    each direction the largest entry of its left vector is positive. Without forming the [out, in] product. A rank above `out` or `in`
    is kept, its surplus zeros."""
    out_basis, out_mix = np.linalg.qr(adapter.up.astype(np.float64))
    in_basis, in_mix = np.linalg.qr(adapter.down.astype(np.float64).T)
    left, values, right = np.linalg.svd(out_mix @ in_mix.T, full_matrices=False)
    left, right = out_basis @ left, right @ in_basis.T
    sign = np.sign(left[np.abs(left).argmax(0), np.arange(left.shape[1])])
    root = np.sqrt(values)
    dtype, surplus = adapter.up.dtype, len(adapter.down) - len(values)
    down, up = np.pad((sign * root)[:, None] * right, ((0, surplus), (0, 0))), np.pad(left * sign * root, ((0, 0), (0, surplus)))
    return Adapter(down.astype(dtype), up.astype(dtype))


def adapters(tensors: Mapping[str, np.ndarray]) -> dict[str, Adapter]:
    """The pairs in a checkpoint of peft, by module. Raises InputError when there are none, or one half is missing."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        if hit := PAIR.match(key):
            found.setdefault(hit["name"], {})[hit["side"]] = np.asarray(value)
    if not found:
        raise InputError("no adapters here: names must end in .lora_A.weight and .lora_B.weight, as peft writes them")
    for name, pair in found.items():
        if len(pair) == 1:
            raise InputError(f"{name} has only lora_{min(pair)}: the other half is missing; save the adapter again")
    return {name: Adapter(pair["A"], pair["B"]) for name, pair in found.items()}


def canonical_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A checkpoint of peft with every pair in canonical form; other tensors as they are."""
    fixed = {name: canon(adapter) for name, adapter in adapters(tensors).items()}
    out = {}
    for key, value in tensors.items():
        hit = PAIR.match(key)
        out[key] = value if hit is None else (fixed[hit["name"]].down if hit["side"] == "A" else fixed[hit["name"]].up)
    return out
