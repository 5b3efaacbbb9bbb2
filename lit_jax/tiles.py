"""Decodes a large picture tile by tile, with the memory of one tile."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from heirloom.common.errors import InputError
from heirloom.common.nn.functional import Functional


def decode_tiled(
    model: Functional, params: Mapping[str, Any], latents: jax.Array, tile: int, overlap: int
) -> jax.Array:
    """Decode unscaled latents [batch, row, col, latent] tile by tile: pictures [batch, height, width, 3] f32.

    tile, overlap: latent positions along a side; overlap is a minimum. Where tiles overlap, one fades linearly into the
    next. The decoder is compiled once, for one tile, and runs over the tiles in a loop. Attention and GroupNorm see one
    tile, not the picture, so the result approaches that of `decode` as tiles grow; with a tile as large as the picture
    they are equal. Raises InputError if the overlap is not less than the tile.
    """
    if not 0 <= overlap < tile:
        raise InputError(f"tiles of {tile} cannot overlap by {overlap}: choose an overlap from 0 to {tile - 1}")
    sides = tuple(min(tile, n) for n in latents.shape[1:3])

    def decode(latents: jax.Array) -> jax.Array:
        return model.apply(params, latents, method="decode")

    batch, height, width, channels = jax.eval_shape(decode, latents).shape
    factor = height // latents.shape[1]
    rows, cols = (_place_tiles(n, side, overlap, factor) for n, side in zip(latents.shape[1:3], sides, strict=True))

    def add(i: jax.Array, picture: jax.Array) -> jax.Array:
        row, col = i // len(cols.starts), i % len(cols.starts)
        top, left = rows.starts[row], cols.starts[col]
        piece = decode(jax.lax.dynamic_slice(latents, (0, top, left, 0), (batch, *sides, latents.shape[-1])))
        piece = piece * rows.weights[row][:, None, None] * cols.weights[col][:, None]
        corner = (0, factor * top, factor * left, 0)
        return jax.lax.dynamic_update_slice(
            picture, jax.lax.dynamic_slice(picture, corner, piece.shape) + piece, corner
        )

    return jax.lax.fori_loop(0, len(rows.starts) * len(cols.starts), add, jnp.zeros((batch, height, width, channels)))


class _Line(NamedTuple):
    """Tiles along one side: where each starts, [tile] int32 latent positions, and its weights, [tile, pixel] f32."""

    starts: jax.Array
    weights: jax.Array


def _place_tiles(length: int, side: int, overlap: int, factor: int) -> _Line:
    """Place as few tiles as cover `length`, evenly spread, each overlapping by at least `overlap`. Weights sum to one
    at every pixel.
    """
    count = 1 if length == side else -(-(length - overlap) // (side - overlap))
    starts = np.linspace(0, length - side, count).round().astype(int)
    shared = factor * (side - int(np.diff(starts).max(initial=0)))
    pixels = np.arange(side * factor)
    ramp = np.minimum((np.minimum(pixels, pixels[::-1]) + 0.5) / max(shared, 0.5), 1)
    total = np.zeros(length * factor)
    spans = [slice(start * factor, (start + side) * factor) for start in starts]
    for span in spans:
        total[span] += ramp
    weights = np.stack([ramp / total[span] for span in spans])
    return _Line(jnp.asarray(starts, jnp.int32), jnp.asarray(weights, jnp.float32))
