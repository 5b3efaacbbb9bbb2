"""The autoencoder of latent diffusion (arXiv 2112.10752; diffusers' AutoencoderKL): sd-vae-ft-ema and -mse, and SDXL's.

A diffusion model sees *scaled* latents, the decoder takes them as the encoder gave them: `sample` and `scale_latents`
go one way, `unscale_latents` the other, and nothing else multiplies.

    model = functional(Autoencoder, cfg)
    moments = model.apply(params, images, method="encode")
    latents = sample_latents(cfg, moments, key)
    images = model.apply(params, unscale_latents(cfg, latents), method="decode")
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from heirloom.common.errors import InputError, between, positive
from heirloom.common.nn.attention import Attention, softmax
from heirloom.common.nn.conv import Conv
from heirloom.common.nn.dense import uniform_fan_in
from heirloom.common.nn.image import ResnetBlock, over_pixels, upsample
from heirloom.common.nn.moments import Moments
from heirloom.common.nn.norm import GroupNorm
from heirloom.common.surgery.axes import Spec
from heirloom.common.surgery.report import attention_macs, count, kernel_macs

EPS = 1e-6


@dataclass(frozen=True)
class AutoencoderConfig:
    """An autoencoder: one level per entry of `channels`, each at half the resolution of the one before."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    """Of each level, from the picture down; a multiple of `groups`."""
    resnets: int = 2
    """Per level of the encoder; the decoder has one more."""
    latent: int = 4
    """Channels of a latent."""
    groups: int = 32
    """Of every GroupNorm."""
    scaling_factor: float = 0.18215
    """What brings latents to unit variance (SDXL: 0.13025)."""
    size: int = 256
    """Side of the pictures it was trained on, pixels; it takes any."""

    def __post_init__(self) -> None:
        between(self, "scaling_factor", least=1e-6)
        positive(self, "channels", "latent", "groups", "size")
        positive(self, "resnets", most=1000)
        if not 1 <= len(self.channels) <= 16:
            raise InputError(f"channels has {len(self.channels)} levels: give 1 to 16")
        if wrong := [c for c in self.channels if c % self.groups]:
            raise InputError(f"{self.groups} groups do not divide {wrong[0]} channels: change groups or channels")

    @property
    def factor(self) -> int:
        """Pixels along the side of one latent position."""
        return 2 ** (len(self.channels) - 1)


def resnet(in_channels: int, out_channels: int, cfg: AutoencoderConfig, rngs: nnx.Rngs) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, groups=cfg.groups, eps=EPS, skip="shortcut", rngs=rngs)


class Middle(nnx.Module):
    """At the lowest resolution: a resnet, attention of one head over all positions, a resnet."""

    def __init__(self, channels: int, cfg: AutoencoderConfig, *, rngs: nnx.Rngs):
        sizes = dict(embed=channels, head=1, head_dim=channels)
        self.before = resnet(channels, channels, cfg, rngs)
        self.attn_norm = GroupNorm(channels, groups=cfg.groups, eps=EPS, rngs=rngs)
        self.attn = Attention(sizes, attend=softmax(), qkv=uniform_fan_in, rngs=rngs)
        self.after = resnet(channels, channels, cfg, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.before(x)
        return self.after(x + over_pixels(self.attn, self.attn_norm(x)))


class Upsample(Conv):
    """Each pixel becomes four, then a convolution."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(upsample(x))


class Level(nnx.Module):
    """Resnets at one resolution, then, if there is another, the step to it."""

    def __init__(
        self, read: int, written: int, resnets: int, resize: Conv | None, cfg: AutoencoderConfig, *, rngs: nnx.Rngs
    ):
        self.resnets = nnx.List([resnet(written if i else read, written, cfg, rngs) for i in range(resnets)])
        self.resize = resize

    def __call__(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.resize is None else self.resize(x)


class Encoder(nnx.Module):
    """Images [batch, row, col, 3] to mean and logvar side by side, [batch, row, col, 2 latent]."""

    def __init__(self, cfg: AutoencoderConfig, *, rngs: nnx.Rngs):
        first, last = cfg.channels[0], cfg.channels[-1]

        def level(i: int, read: int, written: int) -> Level:
            # One row and one column of zeros, after the picture only: torch pads by hand here, (0, 1, 0, 1).
            down = None if i == len(cfg.channels) - 1 else Conv(written, written, stride=2, padding=(0, 1), rngs=rngs)
            return Level(read, written, cfg.resnets, down, cfg, rngs=rngs)

        steps = enumerate(zip((first, *cfg.channels), cfg.channels, strict=False))
        self.input = Conv(3, first, rngs=rngs)
        self.down = nnx.List([level(i, read, written) for i, (read, written) in steps])
        self.middle = Middle(last, cfg, rngs=rngs)
        self.norm = GroupNorm(last, groups=cfg.groups, eps=EPS, rngs=rngs)
        self.output = Conv(last, 2 * cfg.latent, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.input(x)
        for level in self.down:
            x = level(x)
        return self.output(jax.nn.silu(self.norm(self.middle(x))))


class Decoder(nnx.Module):
    """Latents [batch, row, col, latent] to images [batch, row, col, 3]."""

    def __init__(self, cfg: AutoencoderConfig, *, rngs: nnx.Rngs):
        channels = cfg.channels[::-1]

        def level(i: int, read: int, written: int) -> Level:
            up = None if i == len(channels) - 1 else Upsample(written, written, rngs=rngs)
            return Level(read, written, cfg.resnets + 1, up, cfg, rngs=rngs)

        steps = enumerate(zip((channels[0], *channels), channels, strict=False))
        self.input = Conv(cfg.latent, channels[0], rngs=rngs)
        self.middle = Middle(channels[0], cfg, rngs=rngs)
        self.up = nnx.List([level(i, read, written) for i, (read, written) in steps])
        self.norm = GroupNorm(channels[-1], groups=cfg.groups, eps=EPS, rngs=rngs)
        self.output = Conv(channels[-1], 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.middle(self.input(x))
        for level in self.up:
            x = level(x)
        return self.output(jax.nn.silu(self.norm(x)))


class Autoencoder(nnx.Module):
    """Images [batch, height, width, 3] in [-1, 1] to the moments of their latents and back; any height and width.

    The latents of diffusers: `encode` gives, and `decode` takes, what is *not* scaled.
    """

    def __init__(self, cfg: AutoencoderConfig, *, rngs: nnx.Rngs):
        self.encoder = Encoder(cfg, rngs=rngs)
        self.quant = Conv(2 * cfg.latent, 2 * cfg.latent, size=1, rngs=rngs)
        self.post_quant = Conv(cfg.latent, cfg.latent, size=1, rngs=rngs)
        self.decoder = Decoder(cfg, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The pictures as their mean latents tell them."""
        return self.decode(self.encode(images).mean)

    def encode(self, images: jax.Array) -> Moments:
        """[batch, height / 8, width / 8, latent] each, rounded down, f32; logvar is kept within -30 and 20."""
        mean, logvar = jnp.split(self.quant(self.encoder(images)).astype(jnp.float32), 2, axis=-1)
        return Moments.bounded(mean, logvar)

    def decode(self, latents: jax.Array) -> jax.Array:
        """[batch, 8 row, 8 col, 3] f32, about [-1, 1]."""
        return self.decoder(self.post_quant(latents)).astype(jnp.float32)


def scale_latents(cfg: AutoencoderConfig, latents: jax.Array) -> jax.Array:
    """From what `decode` takes to what a diffusion model sees."""
    return latents * cfg.scaling_factor


def unscale_latents(cfg: AutoencoderConfig, latents: jax.Array) -> jax.Array:
    """From what a diffusion model made to what `decode` takes."""
    return latents / cfg.scaling_factor


def sample_latents(cfg: AutoencoderConfig, moments: Moments, key: jax.Array) -> jax.Array:
    """Scaled latents drawn from their moments, the input of a diffusion model: mean + exp(logvar / 2) noise, f32."""
    return scale_latents(cfg, moments.sample(key))


def parameters(spec: Spec) -> dict[str, int]:
    """Counts by half, the 1x1 convolutions next to the latents included (83,653,863 in total at the published size)."""
    encoder = count(spec, "encoder/**") + count(spec, "quant/*")
    return {"encoder": encoder, "decoder": count(spec, "**") - encoder, "total": count(spec, "**")}


def macs(cfg: AutoencoderConfig, spec: Spec) -> int:
    """Multiply-accumulates of encoding and decoding one picture of `cfg.size`, attention included."""
    levels = len(cfg.channels)
    pixels = [(cfg.size >> i) ** 2 for i in range(levels)]
    uses = [
        ("*/middle/**", pixels[-1]),
        ("*quant/*", pixels[-1]),
        ("encoder/input/*", pixels[0]),
        ("decoder/output/*", pixels[0]),
    ]
    uses += [("encoder/output/*", pixels[-1]), ("decoder/input/*", pixels[-1])]
    for i in range(levels - 1):
        uses += [(f"encoder/down/{i}/resize/*", pixels[i + 1]), (f"decoder/up/{i}/resize/*", pixels[-2 - i])]
    for i in range(levels):
        uses += [(f"encoder/down/{i}/**", pixels[i]), (f"decoder/up/{i}/**", pixels[-1 - i])]
    halves = (attention_macs(spec[f"{half}/middle/attn/query/kernel"], pixels[-1]) for half in ("encoder", "decoder"))
    return sum(kernel_macs(spec, uses).values()) + sum(halves)
