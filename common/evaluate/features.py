"""Features of a whole data set on any mesh; the last batch may be short."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from heirloom.common.errors import InputError
from heirloom.common.mesh import replicated, split_rows

Embed = Callable[[Mapping[str, Any], Any], jax.Array]


def finite(values: np.ndarray, what: str) -> np.ndarray:
    """Returns values [rows, ...]. Raises InputError for NaN or infinity, as ranks would ignore NaN."""
    bad = ~np.isfinite(values).reshape(len(values), -1).all(1)
    if bad.any():
        given = f"NaN or infinite for {bad.sum():,} of {len(values):,} (first: {int(bad.argmax())})"
        why = "its weights are damaged, or its computation overflows"
        raise InputError(f"{what}: {given}; cannot compute a score: {why}")
    return values


def embedder(function: Embed, mesh: Mesh, size: int) -> Callable[[Mapping[str, Any], np.ndarray], np.ndarray]:
    """Compiles `function(params, rows) -> [rows, joint]` once for `size` rows, split over the devices.

    The result takes any number of rows up to `size`: it pads short batches and cuts the padding off, so every example
    counts once. Rows are padded further until the mesh divides them.
    """
    compiled = jax.jit(function, out_shardings=replicated(mesh))

    def embed(params: Mapping[str, Any], batch: np.ndarray) -> np.ndarray:
        padded = np.zeros((size, *batch.shape[1:]), batch.dtype)
        padded[: len(batch)] = batch
        with jax.set_mesh(mesh):
            return np.asarray(compiled(params, split_rows(padded, mesh)))[: len(batch)]

    return embed
