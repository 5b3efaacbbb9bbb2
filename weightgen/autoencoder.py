"""The reference KL autoencoder of weight vectors, and a transformer over tokens in its place."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from heirloom.common.errors import InputError, positive
from heirloom.common.nn.attention import Attention, softmax
from heirloom.common.nn.block import Block, scan, stack
from heirloom.common.nn.conv import Conv
from heirloom.common.nn.dense import Dense, normal, param, uniform_fan_in, xavier_uniform, zeros
from heirloom.common.nn.norm import GroupNorm
from weightgen.denoiser import Order
from weightgen.normalise import Kind

GROUPS, EPS = 2, 1e-6
FLOOR, CEILING = -30.0, 20.0  # of the log-variance
XAVIER = xavier_uniform()


class Posterior(NamedTuple):
    """Mean and log-variance of the latent, the same shape each."""

    mean: jax.Array
    log_variance: jax.Array

    def sample(self, key: jax.Array) -> jax.Array:
        return self.mean + jnp.exp(0.5 * self.log_variance) * jax.random.normal(key, self.mean.shape)

    def kl(self) -> jax.Array:
        """KL to N(0, 1), [batch], summed over the latent (nats)."""
        terms = self.mean**2 + jnp.exp(self.log_variance) - 1 - self.log_variance
        return 0.5 * terms.reshape(len(self.mean), -1).sum(1)


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
        if self.rows * self.fdim != self.channels_in * self.resolution**2:
            raise InputError(
                f"rows x fdim must fill the image: {self.rows} x {self.fdim} = {self.rows * self.fdim}, "
                f"channels_in x resolution^2 = {self.channels_in} x {self.resolution}^2 = {self.channels_in * self.resolution**2}"
            )
        if self.resolution % 2 ** (len(self.multiples) - 1):
            raise InputError(f"a resolution of {self.resolution} cannot be halved {len(self.multiples) - 1} times: change it or multiples")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.resolution // 2 ** (len(self.multiples) - 1)
        return side, side, self.latent


class VaeBlock(nnx.Module):
    def __init__(self, read: int, written: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(read, groups=GROUPS, eps=EPS, rngs=rngs)
        self.conv1 = Conv(read, written, rngs=rngs)
        self.norm2 = GroupNorm(written, groups=GROUPS, eps=EPS, rngs=rngs)
        self.conv2 = Conv(written, written, rngs=rngs)
        self.skip = Conv(read, written, size=1, rngs=rngs) if read != written else None

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return (x if self.skip is None else self.skip(x)) + h


class VaeAttention(nnx.Module):
    """Single-head self-attention over the cells of an image, residual."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.norm = GroupNorm(channels, groups=GROUPS, eps=EPS, rngs=rngs)
        sizes = {"embed": channels, "head": 1, "head_dim": channels}
        dense: dict[str, Any] = dict(bias=uniform_fan_in, rngs=rngs)
        self.query = Dense("embed -> head head_dim", sizes, **dense)
        self.key = Dense("embed -> head head_dim", sizes, **dense)
        self.value = Dense("embed -> head head_dim", sizes, **dense)
        self.out = Dense("head head_dim -> embed", sizes, **dense)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.norm(x).reshape(len(x), -1, x.shape[-1])
        h = jax.nn.dot_product_attention(self.query(h), self.key(h), self.value(h))
        return x + self.out(h).reshape(x.shape)


class ConvVae(nnx.Module):
    """Vectors [batch, rows * length] to a latent image [batch, side, side, latent], and back. GroupNorm of 2 groups, as released."""

    def __init__(self, cfg: VaeConfig, *, rngs: nnx.Rngs):
        widths = [cfg.channels * m for m in cfg.multiples]
        sizes = {"weight": cfg.length, "filled": cfg.fdim}
        self.enter = Dense("weight -> filled", sizes, bias=uniform_fan_in, rngs=rngs)
        self.leave = Dense("filled -> weight", sizes, bias=uniform_fan_in, rngs=rngs)

        encoder: list[Any] = [Conv(cfg.channels_in, cfg.channels, rngs=rngs)]
        now, side = cfg.channels, cfg.resolution
        for level, width in enumerate(widths):
            for _ in range(cfg.blocks):
                encoder.append(VaeBlock(now, width, rngs=rngs))
                now = width
                if side in cfg.attention:
                    encoder.append(VaeAttention(now, rngs=rngs))
            if level + 1 < len(widths):
                encoder.append(Conv(now, now, stride=2, padding=(0, 1), rngs=rngs))
                side //= 2
        encoder += [VaeBlock(now, now, rngs=rngs), VaeAttention(now, rngs=rngs), VaeBlock(now, now, rngs=rngs)]
        self.encoder = nnx.List(encoder)
        self.encoder_norm = GroupNorm(now, groups=GROUPS, eps=EPS, rngs=rngs)
        self.encoder_out = Conv(now, 2 * cfg.latent, rngs=rngs)
        self.quant = Conv(2 * cfg.latent, 2 * cfg.latent, size=1, rngs=rngs)

        self.post_quant = Conv(cfg.latent, cfg.latent, size=1, rngs=rngs)
        decoder: list[Any] = [Conv(cfg.latent, now, rngs=rngs)]
        decoder += [VaeBlock(now, now, rngs=rngs), VaeAttention(now, rngs=rngs), VaeBlock(now, now, rngs=rngs)]
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(cfg.blocks + 1):
                decoder.append(VaeBlock(now, width, rngs=rngs))
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

    def encode(self, x: jax.Array) -> Posterior:
        cfg = self.cfg
        h = jax.nn.leaky_relu(self.enter(x.reshape(len(x), cfg.rows, cfg.length)), 0.01)
        # Channel-first in memory, as the released reshape has it.
        h = jnp.moveaxis(h.reshape(len(x), cfg.channels_in, cfg.resolution, cfg.resolution), 1, -1)
        for layer in self.encoder:
            h = layer(h)
        mean, log_variance = jnp.split(self.quant(self.encoder_out(jax.nn.silu(self.encoder_norm(h)))), 2, axis=-1)
        return Posterior(mean, jnp.clip(log_variance, FLOOR, CEILING))

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
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


@dataclass(frozen=True)
class TokenVaeConfig:
    """A transformer over the tokens of a network."""

    tokens: int = 21
    length: int = 65
    latent: int = 16
    """Numbers each token becomes."""
    width: int = 64
    layers: int = 2
    heads: int = 4
    normalise: Kind = "tensor"
    """What is done to weights before."""
    order: Order = "ordered"
    """exchangeable: tokens are known by no place, as the rows of a head are not; the codec is equivariant to their order."""

    def __post_init__(self) -> None:
        positive(self, "latent", "layers")
        if self.order == "exchangeable" and self.normalise == "row":
            raise InputError("rows of a head are exchangeable, normalising each by itself would tell them apart: set normalise to tensor")


class TokenVae(nnx.Module):
    """Tokens [batch, token, length] to a latent for each, [batch, token, latent], and back; tokens inform one another on either way."""

    def __init__(self, cfg: TokenVaeConfig, *, rngs: nnx.Rngs):
        if cfg.width % cfg.heads:
            raise InputError(f"{cfg.heads} heads do not divide a width of {cfg.width}: change heads or width")
        sizes = dict(embed=cfg.width, head=cfg.heads, head_dim=cfg.width // cfg.heads, hidden=4 * cfg.width)
        sizes |= dict(weight=cfg.length, latent=cfg.latent, token=cfg.tokens, part=2)
        block: dict[str, Any] = dict(activation="gelu_tanh", eps=EPS, up=XAVIER, down=XAVIER, bias=zeros)

        def blocks() -> nnx.Module:
            def attention(*, rngs: nnx.Rngs) -> Attention:
                return Attention(sizes, attend=softmax(), rngs=rngs)

            return stack(lambda rngs: Block(sizes, attention=attention, **block, rngs=rngs), cfg.layers, rngs)

        self.enter, self.leave = Dense("weight -> embed", sizes, rngs=rngs), Dense("embed -> weight", sizes, rngs=rngs)
        self.shrink, self.grow = Dense("embed -> part latent", sizes, rngs=rngs), Dense("latent -> embed", sizes, rngs=rngs)
        self.position = param("token -> embed", sizes, normal(0.02), rngs) if cfg.order == "ordered" else None
        self.encoder, self.decoder = blocks(), blocks()

    def _placed(self, h: jax.Array) -> jax.Array:
        return h if self.position is None else h + self.position[...]

    def encode(self, x: jax.Array) -> Posterior:
        h = scan(self.encoder, self._placed(self.enter(x)))
        mean, log_variance = jnp.moveaxis(self.shrink(h), 2, 0)
        return Posterior(mean, jnp.clip(log_variance, FLOOR, CEILING))

    def decode(self, z: jax.Array) -> jax.Array:
        return self.leave(scan(self.decoder, self._placed(self.grow(z))))

    def __call__(self, x: jax.Array, key: jax.Array) -> Any:
        posterior = self.encode(x)
        return self.decode(posterior.sample(key)), posterior


class TokenCodec(nnx.Module):
    """A token autoencoder in the place of `Pca`: weights in, latents with spread 1 out, and back.

    `mean`, `std` (of the normaliser) and `scale` (of the latents) are fitted; the rest is trained.
    """

    def __init__(self, cfg: TokenVaeConfig, *, rngs: nnx.Rngs):
        sizes = {"token": cfg.tokens, "weight": cfg.length}
        self.mean, self.std = (param("token weight", sizes, zeros, rngs) for _ in range(2))
        self.scale = param("", sizes, zeros, rngs)
        self.vae = TokenVae(cfg, rngs=rngs)
        self.asinh = cfg.normalise == "asinh"

    def normalise(self, tokens: jax.Array) -> jax.Array:
        scaled = (tokens - self.mean[...]) / self.std[...]
        return jnp.arcsinh(scaled) if self.asinh else scaled

    def encode(self, tokens: jax.Array) -> jax.Array:
        return self.vae.encode(self.normalise(tokens)).mean / self.scale[...]

    def decode(self, latents: jax.Array) -> jax.Array:
        scaled = self.vae.decode(latents * self.scale[...])
        return (jnp.sinh(scaled) if self.asinh else scaled) * self.std[...] + self.mean[...]

    def __call__(self, tokens: jax.Array, key: jax.Array) -> Any:
        """Normalised tokens, their reconstruction from a drawn latent, and the posterior: what `vae_loss` takes."""
        x = self.normalise(tokens)
        return x, *self.vae(x, key)


def vae_loss(x: jax.Array, back: jax.Array, posterior: Posterior, *, beta: float = 1e-6, squared: float = 1000.0) -> jax.Array:
    """Summed L1 + beta KL, means over the batch, + `squared` times the mean squared error (nats).

    The released log-variance of the L1 term is left out: its optimizer never sees it, so it stays at 0 and changes nothing.
    """
    l1 = jnp.abs(x - back).reshape(len(x), -1).sum(1).mean()
    return l1 + beta * posterior.kl().mean() + squared * jnp.square(x - back).mean()
