"""Parts of convolutional networks over images [batch, row, col, channel]: residual blocks, pooling, and layers over
pixels as tokens.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from heirloom.common.nn.conv import Conv
from heirloom.common.nn.dense import Dense, Init, uniform_fan_in
from heirloom.common.nn.norm import GroupNorm

Resample = Literal["none", "up", "down"]


class ResnetBlock(nnx.Module):
    """skip(x) + conv(silu(norm(conv(silu(norm(x)))))): [batch, row, col, in_channels] -> [batch, row, col,
    out_channels].

    The block of ADM (arXiv 2105.05233) and of latent diffusion (arXiv 2112.10752). `skip` is the identity, or a 1 x 1
    convolution where the channels differ.

    out: initialiser of the last convolution's kernel and bias. skip: the name of that 1 x 1 convolution in the paths of
    parameters. time: width of a time embedding [batch, time], which the call then takes and which scales and shifts the
    second norm. resample: halve or double both sides, before the first convolution and on the way past it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        eps: float,
        out: Init = uniform_fan_in,
        skip: str = "skip",
        time: int | None = None,
        resample: Resample = "none",
        rngs: nnx.Rngs,
    ):
        self.norm1 = GroupNorm(in_channels, groups=groups, eps=eps, rngs=rngs)
        self.conv1 = Conv(in_channels, out_channels, rngs=rngs)
        sizes = {"time": time, "part": 2, "channel": out_channels}
        self.time = None if time is None else Dense("time -> part channel", sizes, bias=uniform_fan_in, rngs=rngs)
        self.norm2 = GroupNorm(out_channels, groups=groups, eps=eps, rngs=rngs)
        self.conv2 = Conv(out_channels, out_channels, init=out, bias=out, rngs=rngs)
        setattr(self, skip, Conv(in_channels, out_channels, size=1, rngs=rngs) if in_channels != out_channels else None)
        self.resample, self.skip_name = resample, skip

    def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
        y = self.conv1(resampled(jax.nn.silu(self.norm1(x)), self.resample))
        y = self.norm2(y)
        if self.time is not None:
            assert time is not None
            scale, shift = jnp.moveaxis(self.time(jax.nn.silu(time)), 1, 0)[:, :, None, None]
            y = y * (1 + scale) + shift
        y = self.conv2(jax.nn.silu(y))
        x, skip = resampled(x, self.resample), getattr(self, self.skip_name)
        return (x if skip is None else skip(x)) + y


def resampled(x: jax.Array, how: Resample) -> jax.Array:
    """Double both sides, halve them, or leave the image as it is."""
    return {"none": lambda: x, "up": lambda: upsample(x), "down": lambda: average_pool(x, 2)}[how]()


def upsample(x: jax.Array) -> jax.Array:
    """Double both sides: each pixel becomes four (nearest neighbour)."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def average_pool(x: jax.Array, size: int) -> jax.Array:
    """Means of size x size squares, which must fill the image; `size` 1 is the identity."""
    if size == 1:
        return x
    batch, row, col, channels = x.shape
    return x.reshape(batch, row // size, size, col // size, size, channels).mean((2, 4))


def over_pixels(layer: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Apply a layer of tokens [batch, token, channel], such as self-attention, to the pixels of an image, row by
    row.
    """
    return layer(x.reshape(len(x), -1, x.shape[-1])).reshape(x.shape)
