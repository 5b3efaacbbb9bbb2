"""Patch embedding: images to tokens."""

import jax
from flax import nnx

from heirloom.common.nn.dense import Dense, Init, Sizes


class PatchEmbed(nnx.Module):
    """Maps non-overlapping patches linearly to tokens: [batch, height, width, channel] -> [batch, token, embed],
    row-major.
    """

    def __init__(self, sizes: Sizes, *, init: Init, rngs: nnx.Rngs, bias: Init | None = None):
        self.patch = sizes["patch_row"]
        self.project = Dense("patch_row patch_col channel -> embed", sizes, init=init, bias=bias, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        batch, height, width, channels = images.shape
        p = self.patch
        patches = images.reshape(batch, height // p, p, width // p, p, channels).swapaxes(2, 3)
        return self.project(patches.reshape(batch, -1, p, p, channels))


def unpatch(patches: jax.Array, rows: int, cols: int) -> jax.Array:
    """Joins patches [batch, token, patch_row, patch_col, channel], row by row: [batch, height, width, channel]."""
    batch, _, height, width, channels = patches.shape
    images = patches.reshape(batch, rows, cols, height, width, channels).swapaxes(2, 3)
    return images.reshape(batch, rows * height, cols * width, channels)
