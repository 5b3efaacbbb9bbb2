"""The released KL autoencoder of weight vectors."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from heirloom.common.errors import InputError, positive
from heirloom.common.nn.attention import Attention, softmax
from heirloom.common.nn.conv import Conv
from heirloom.common.nn.dense import Dense, uniform_fan_in
from heirloom.common.nn.image import ResnetBlock, over_pixels, upsample
from heirloom.common.nn.moments import Moments
from heirloom.common.nn.norm import GroupNorm

GROUPS, EPS = 2, 1e-6


@dataclass(frozen=True)
class VaeConfig:
    """The released base config: vectors of 2,864 weights, 38,566,165 parameters."""

    rows: int = 1
    """`my_channels`: rows the vector is folded into."""
    length: int = 2864
    """`in_dim`: weights per row."""
    fdim: int = 4096
    channels_in: int = 1
    """`in_channels` of the image."""
    resolution: int = 64
    channels: int = 128
    multiples: tuple[int, ...] = (1, 1, 2)
    blocks: int = 2
    attention: tuple[int, ...] = ()
    """Resolutions with attention. The released lists name none that occurs, so only the middle attends."""
    latent: int = 4

    def __post_init__(self) -> None:
        positive(self, "rows", "length", "fdim", "channels_in", "resolution", "latent")
        positive(self, "channels", "multiples", "blocks", "attention")
        if self.rows * self.fdim != self.channels_in * self.resolution**2:
            raise InputError(
                f"rows x fdim must fill the image: {self.rows} x {self.fdim} = {self.rows * self.fdim}, channels_in x"
                f" resolution^2 = {self.channels_in} x {self.resolution}^2 = {self.channels_in * self.resolution**2}"
            )
        if self.resolution % 2 ** (len(self.multiples) - 1):
            halved = f"{self.resolution} cannot be halved {len(self.multiples) - 1} times"
            raise InputError(f"a resolution of {halved}: change it or multiples")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.resolution // 2 ** (len(self.multiples) - 1)
        return side, side, self.latent


class VaeAttention(Attention):
    """Single-head self-attention over the cells of an image, residual."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.norm = GroupNorm(channels, groups=GROUPS, eps=EPS, rngs=rngs)
        sizes = {"embed": channels, "head": 1, "head_dim": channels}
        super().__init__(sizes, attend=softmax(), qkv=uniform_fan_in, bias=uniform_fan_in, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + over_pixels(super().__call__, self.norm(x))


def block(in_channels: int, out_channels: int, rngs: nnx.Rngs) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, groups=GROUPS, eps=EPS, rngs=rngs)


class ConvVae(nnx.Module):
    """Vectors [batch, rows * length] to a latent image [batch, side, side, latent], and back; GroupNorm of 2 groups."""

    def __init__(self, cfg: VaeConfig, *, rngs: nnx.Rngs):
        widths = [cfg.channels * m for m in cfg.multiples]
        sizes = {"weight": cfg.length, "filled": cfg.fdim}
        self.enter = Dense("weight -> filled", sizes, bias=uniform_fan_in, rngs=rngs)
        self.leave = Dense("filled -> weight", sizes, bias=uniform_fan_in, rngs=rngs)

        encoder: list[Any] = [Conv(cfg.channels_in, cfg.channels, rngs=rngs)]
        now, side = cfg.channels, cfg.resolution
        for level, width in enumerate(widths):
            for _ in range(cfg.blocks):
                encoder.append(block(now, width, rngs))
                now = width
                if side in cfg.attention:
                    encoder.append(VaeAttention(now, rngs=rngs))
            if level + 1 < len(widths):
                encoder.append(Conv(now, now, stride=2, padding=(0, 1), rngs=rngs))
                side //= 2
        encoder += [block(now, now, rngs), VaeAttention(now, rngs=rngs), block(now, now, rngs)]
        self.encoder = nnx.List(encoder)
        self.encoder_norm = GroupNorm(now, groups=GROUPS, eps=EPS, rngs=rngs)
        self.encoder_out = Conv(now, 2 * cfg.latent, rngs=rngs)
        self.quant = Conv(2 * cfg.latent, 2 * cfg.latent, size=1, rngs=rngs)

        self.post_quant = Conv(cfg.latent, cfg.latent, size=1, rngs=rngs)
        decoder: list[Any] = [Conv(cfg.latent, now, rngs=rngs)]
        decoder += [block(now, now, rngs), VaeAttention(now, rngs=rngs), block(now, now, rngs)]
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(cfg.blocks + 1):
                decoder.append(block(now, width, rngs))
                now = width
                if side in cfg.attention:
                    decoder.append(VaeAttention(now, rngs=rngs))
            if level:
                decoder.append(UpConv(now, rngs=rngs))
                side *= 2
        self.decoder = nnx.List(decoder)
        self.decoder_norm = GroupNorm(now, groups=GROUPS, eps=EPS, rngs=rngs)
        self.decoder_out = Conv(now, cfg.channels_in, rngs=rngs)
        self.cfg = cfg

    def encode(self, x: jax.Array) -> Moments:
        cfg = self.cfg
        h = jax.nn.leaky_relu(self.enter(x.reshape(len(x), cfg.rows, cfg.length)), 0.01)
        # Channel-first in memory, as the released reshape has it.
        h = jnp.moveaxis(h.reshape(len(x), cfg.channels_in, cfg.resolution, cfg.resolution), 1, -1)
        for layer in self.encoder:
            h = layer(h)
        return Moments.bounded(*jnp.split(self.quant(self.encoder_out(jax.nn.silu(self.encoder_norm(h)))), 2, axis=-1))

    def decode(self, z: jax.Array) -> jax.Array:
        h = self.post_quant(z)
        for layer in self.decoder:
            h = layer(h)
        h = self.decoder_out(jax.nn.silu(self.decoder_norm(h)))
        return self.leave(jnp.moveaxis(h, -1, 1).reshape(len(z), self.cfg.rows, self.cfg.fdim)).reshape(len(z), -1)

    def __call__(self, x: jax.Array, key: jax.Array) -> Any:
        """(reconstruction, posterior), the latent drawn from the posterior."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(key)), posterior


class UpConv(nnx.Module):
    """Nearest x 2, then a convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = Conv(channels, channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(upsample(x))
