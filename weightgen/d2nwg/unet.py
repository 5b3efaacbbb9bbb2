"""The released denoiser: an ADM-type UNet with the condition as a further channel, 102,684,929 parameters as released."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from heirloom.common.nn.conv import Conv
from heirloom.common.nn.dense import Dense, uniform_fan_in, zeros
from heirloom.common.nn.norm import GroupNorm
from weightgen.generator.denoiser import time_features

GROUPS, EPS = 32, 1e-5


@dataclass(frozen=True)
class UnetConfig:
    """The released base config."""

    size: int = 32
    """Side of the latent image, 1 channel of 32 x 32 for 1,024 numbers."""
    channels: int = 256
    multiples: tuple[int, ...] = (1, 1, 1, 2)
    blocks: int = 2
    """Residual blocks per level."""
    attention: tuple[int, ...] = (4, 8)
    """Down-sampling rates at which there is attention."""
    heads: int = 2
    read: int = 2
    """Input channels: the noisy latent and the condition."""
    written: int = 1
    groups: int = GROUPS


Resample = Literal["none", "up", "down"]


class ResBlock(nnx.Module):
    """Norm, SiLU, conv; norm scaled and shifted by time, SiLU, conv that starts at zero. x: [batch, row, col, channel]."""

    def __init__(self, in_channels: int, out_channels: int, embed: int, groups: int, resample: Resample = "none", *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(in_channels, groups=groups, eps=EPS, rngs=rngs)
        self.conv1 = Conv(in_channels, out_channels, rngs=rngs)
        sizes = {"time": embed, "part": 2, "channel": out_channels}
        self.time = Dense("time -> part channel", sizes, bias=uniform_fan_in, rngs=rngs)
        self.norm2 = GroupNorm(out_channels, groups=groups, eps=EPS, rngs=rngs)
        self.conv2 = Conv(out_channels, out_channels, init=zeros, bias=zeros, rngs=rngs)
        self.skip = Conv(in_channels, out_channels, size=1, rngs=rngs) if in_channels != out_channels else None
        self.resample = resample

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        h = self.conv1(_resampled(jax.nn.silu(self.norm1(x)), self.resample))
        x = _resampled(x, self.resample)
        scale, shift = jnp.moveaxis(self.time(jax.nn.silu(time)), 1, 0)[:, :, None, None]
        h = self.conv2(jax.nn.silu(self.norm2(h) * (1 + scale) + shift))
        return (x if self.skip is None else self.skip(x)) + h


def _resampled(x: jax.Array, how: Resample) -> jax.Array:
    if how == "none":
        return x
    n, row, col, channel = x.shape
    if how == "up":
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return x.reshape(n, row // 2, 2, col // 2, 2, channel).mean((2, 4))


class ImageAttention(nnx.Module):
    """Residual self-attention over the cells of an image; its output projection starts at zero."""

    def __init__(self, channels: int, heads: int, groups: int, *, rngs: nnx.Rngs):
        sizes = {"embed": channels, "head": heads, "head_dim": channels // heads, "part": 3}
        self.norm = GroupNorm(channels, groups=groups, eps=EPS, rngs=rngs)
        self.qkv = Dense("embed -> part head head_dim", sizes, bias=uniform_fan_in, rngs=rngs)
        self.out = Dense("head head_dim -> embed", sizes, init=zeros, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        n, row, col, channel = x.shape
        query, key, value = jnp.moveaxis(self.qkv(self.norm(x).reshape(n, row * col, channel)), 2, 0)
        return x + self.out(jax.nn.dot_product_attention(query, key, value)).reshape(x.shape)


class Stage(nnx.Module):
    """A residual block and, where the config asks for it, attention."""

    def __init__(self, block: ResBlock, attention: ImageAttention | None):
        self.block, self.attention = block, attention

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        x = self.block(x, time)
        return x if self.attention is None else self.attention(x)


class Unet(nnx.Module):
    """x: [batch, size, size, 1] noisy latent; t: [batch]; condition: the shape of x. Returns the noise, 0 at first."""

    def __init__(self, cfg: UnetConfig, *, rngs: nnx.Rngs):
        width, embed = cfg.channels, 4 * cfg.channels
        self.time_up = Dense("frequency -> embed", {"frequency": width, "embed": embed}, bias=uniform_fan_in, rngs=rngs)
        self.time_down = Dense("embed -> embed", {"embed": embed}, bias=uniform_fan_in, rngs=rngs)
        self.enter = Conv(cfg.read, width, rngs=rngs)

        def res(in_channels: int, out_channels: int, resample: Resample = "none") -> ResBlock:
            return ResBlock(in_channels, out_channels, embed, groups=cfg.groups, resample=resample, rngs=rngs)

        def attend(channels: int, rate: int) -> ImageAttention | None:
            return ImageAttention(channels, cfg.heads, cfg.groups, rngs=rngs) if rate in cfg.attention else None

        down: list[Any] = []
        kept, now, rate = [width], width, 1
        for level, multiple in enumerate(cfg.multiples):
            for _ in range(cfg.blocks):
                down.append(Stage(res(now, width * multiple), attend(width * multiple, rate)))
                now = width * multiple
                kept.append(now)
            if level + 1 < len(cfg.multiples):
                down.append(Stage(res(now, now, "down"), None))
                kept.append(now)
                rate *= 2
        self.down = nnx.List(down)
        self.middle1 = Stage(res(now, now), ImageAttention(now, cfg.heads, cfg.groups, rngs=rngs))
        self.middle2 = res(now, now)
        up: list[Any] = []
        for level, multiple in reversed(list(enumerate(cfg.multiples))):
            for _ in range(cfg.blocks + 1):
                up.append(Stage(res(now + kept.pop(), width * multiple), attend(width * multiple, rate)))
                now = width * multiple
            if level:
                up.append(res(now, now, "up"))
                rate //= 2
        self.up = nnx.List(up)
        self.norm = GroupNorm(now, groups=cfg.groups, eps=EPS, rngs=rngs)
        self.leave = Conv(now, cfg.written, init=zeros, bias=zeros, rngs=rngs)
        self.frequencies = width

    def __call__(self, x: jax.Array, t: jax.Array, condition: jax.Array) -> jax.Array:
        time = self.time_down(jax.nn.silu(self.time_up(time_features(t, self.frequencies))))
        h = self.enter(jnp.concatenate([x, condition], axis=-1))
        kept = [h]
        for stage in self.down:
            h = stage(h, time)
            kept.append(h)
        h = self.middle2(self.middle1(h, time), time)
        for stage in self.up:
            h = stage(jnp.concatenate([h, kept.pop()], axis=-1), time) if isinstance(stage, Stage) else stage(h, time)
        return self.leave(jax.nn.silu(self.norm(h)))
