"""Features of a whole data set, on any mesh, whatever the size of its last batch."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from heirloom.common.errors import InputError
from heirloom.common.train.mesh import replicated, split_rows

Embed = Callable[[Mapping[str, Any], Any], jax.Array]


def finite(values: np.ndarray, what: str) -> np.ndarray:
    """The values, [rows, ...]. Raises InputError when one is NaN or infinite: a comparison with NaN is false, so no rank counts it."""
    bad = ~np.isfinite(values).reshape(len(values), -1).all(1)
    if bad.any():
        raise InputError(
            f"{what}: NaN or infinite for {bad.sum():,} of {len(values):,} (first: {int(bad.argmax())}); "
            "there is no score for such a model: its weights are damaged, or overflow where it computes"
        )
    return values


def embedder(function: Embed, mesh: Mesh, size: int) -> Callable[[Mapping[str, Any], np.ndarray], np.ndarray]:
    """`function(params, rows) -> [rows, joint]` compiled once for `size` rows, which the devices share out among them.

    The result takes any number of rows up to `size`: short batches are padded and the padding is cut off again, so every
    example counts once. `size` is rounded up to what the mesh divides.
    """
    compiled = jax.jit(function, out_shardings=replicated(mesh))

    def embed(params: Mapping[str, Any], batch: np.ndarray) -> np.ndarray:
        padded = np.zeros((size, *batch.shape[1:]), batch.dtype)
        padded[: len(batch)] = batch
        with jax.set_mesh(mesh):
            return np.asarray(compiled(params, split_rows(padded, mesh)))[: len(batch)]

    return embed
