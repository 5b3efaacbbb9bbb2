"""The released denoiser: an ADM-type UNet, the condition as a channel, 102,684,929 parameters as released."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from heirloom.common.errors import positive
from heirloom.common.nn.adaln import time_features
from heirloom.common.nn.conv import Conv
from heirloom.common.nn.dense import Dense, uniform_fan_in, zeros
from heirloom.common.nn.image import Resample, ResnetBlock, over_pixels
from heirloom.common.nn.norm import GroupNorm

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

    def __post_init__(self) -> None:
        positive(self, "size", "channels", "multiples", "blocks", "attention", "heads", "read", "written", "groups")


class ImageAttention(nnx.Module):
    """Residual self-attention over the cells of an image; its output projection starts at zero."""

    def __init__(self, channels: int, heads: int, groups: int, *, rngs: nnx.Rngs):
        sizes = {"embed": channels, "head": heads, "head_dim": channels // heads, "part": 3}
        self.norm = GroupNorm(channels, groups=groups, eps=EPS, rngs=rngs)
        self.qkv = Dense("embed -> part head head_dim", sizes, bias=uniform_fan_in, rngs=rngs)
        self.out = Dense("head head_dim -> embed", sizes, init=zeros, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + over_pixels(self._attend, self.norm(x))

    def _attend(self, x: jax.Array) -> jax.Array:
        return self.out(jax.nn.dot_product_attention(*jnp.moveaxis(self.qkv(x), 2, 0)))


class Stage(nnx.Module):
    """A residual block and, where the config asks for it, attention."""

    def __init__(self, block: ResnetBlock, attention: ImageAttention | None):
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

        def res(in_channels: int, out_channels: int, resample: Resample = "none") -> ResnetBlock:
            sizes: dict[str, Any] = dict(groups=cfg.groups, eps=EPS, time=embed)
            return ResnetBlock(in_channels, out_channels, **sizes, out=zeros, resample=resample, rngs=rngs)

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
