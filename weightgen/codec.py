"""Stage 1: weights to latents and back. PCA needs no training and is the default; autoencoders live in `autoencoder.py`."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from heirloom.common.errors import InputError
from heirloom.common.nn.dense import param, zeros


@dataclass(frozen=True)
class PcaFit:
    """What PCA found. mean: [length]; components: [length, latent] orthonormal; scale: one number, the spread of all latents."""

    mean: np.ndarray
    components: np.ndarray
    scale: np.ndarray


def fit_pca(rows: np.ndarray, latent: int) -> PcaFit:
    """PCA of rows [n, length]. One scale for all latents: directions that matter little to the weights stay small."""
    if latent > min(rows.shape):
        raise InputError(f"{latent} components of {rows.shape[0]} rows of {rows.shape[1]} weights: ask for {min(rows.shape)} at most")
    mean = rows.mean(0, dtype=np.float64)
    centred = rows - mean
    # Of the smaller Gram matrix: rows are many and short, or few and long.
    if rows.shape[0] >= rows.shape[1]:
        components = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :latent]
    else:
        components = np.linalg.svd(centred, full_matrices=False)[2][:latent].T
    scale = (centred @ components).std()
    if not scale > 0:
        raise InputError(f"all {rows.shape[0]} rows of weights are the same: there is nothing to generate from; add other networks")
    return PcaFit(*(np.asarray(x, np.float32) for x in (mean, components, scale)))


class Pca(nnx.Module):
    """Encode tokens [..., token, length] to latents [..., token, latent] with spread 1, and decode. Fitted, never trained.

    tokens: 1 where all share a mean, as the rows of a head do; else each token has its own, that of the zoo's mean network.
    """

    def __init__(self, tokens: int, length: int, latent: int, *, rngs: nnx.Rngs):
        sizes = {"token": tokens, "weight": length, "latent": latent}
        self.mean = param("token weight", sizes, zeros, rngs)
        self.components = param("weight -> latent", sizes, zeros, rngs)
        self.scale = param("", sizes, zeros, rngs)

    def encode(self, tokens: jax.Array) -> jax.Array:
        return (tokens - self.mean[...]) @ self.components[...] / self.scale[...]

    def decode(self, latents: jax.Array) -> jax.Array:
        return (latents * self.scale[...]) @ self.components[...].T + self.mean[...]


@dataclass(frozen=True)
class Gate:
    """Whether a codec may be used: the accuracy of networks before and after a round trip, NaN where it is not known, and the relative
    squared error of what is coded. A codec that codes nothing must not pass: hence the limit of the error, and hence networks at chance,
    which have nothing to lose, do not count."""

    before: float
    after: float
    error: float
    tolerance: float
    chance: float = 0.0
    limit: float = float("inf")

    @property
    def fault(self) -> str:
        """What is wrong, and what to do; empty when nothing is."""
        if self.before - self.chance <= self.tolerance:
            return (
                f"the zoo's networks are at chance: {100 * self.before:.1f} % right, {100 * self.chance:.1f} % by guessing, so nothing is "
                "known of the codec. Train the zoo for longer, or --gate.force"
            )
        if self.before - self.after > self.tolerance:
            return (
                f"the codec loses accuracy: {100 * self.before:.1f} % before, {100 * self.after:.1f} % after a round trip "
                f"(relative error {self.error:.3f}, at most {100 * self.tolerance:g} points may go). Use more latents, or --gate.force"
            )
        if not self.error <= self.limit:  # NaN is a fault, too
            return (
                f"the codec loses the weights it is to code: relative error {self.error:.3f}, at most {self.limit:g} (gate.error). "
                "Use more latents, or --gate.force"
            )
        return ""

    @property
    def passed(self) -> bool:
        return not self.fault

    def check(self, force: bool = False) -> None:
        """Raises InputError for a fault, unless told to go on."""
        if self.fault and not force:
            raise InputError(self.fault)


def relative_error(weights: np.ndarray, back: np.ndarray) -> float:
    """Squared error over the squared spread around the mean network. Both [n, ...]."""
    return float(np.sum((weights - back) ** 2) / max(np.sum((weights - weights.mean(0)) ** 2), 1e-30))


def gate(
    before: Any,
    after: Any,
    weights: np.ndarray,
    back: np.ndarray,
    tolerance: float,
    chance: float = 0.0,
    limit: float = float("inf"),
) -> Gate:
    """From the accuracies [n] of the same networks before and after, and what the codec was given and gave back."""
    return Gate(float(np.mean(before)), float(np.mean(after)), relative_error(weights, back), tolerance, chance, limit)
