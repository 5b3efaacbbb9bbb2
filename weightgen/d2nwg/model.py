"""D2NWG as released: weight vectors, a VAE, the condition as a UNet's channel, noise prediction, 1,024 steps.

A baseline for comparison; `GeneratorConfig` is what this package recommends. The choices of the release are kept:
weights are divided by a constant and nothing else, latents are drawn from the posterior, and the set encoder does not
know the order of classes.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from heirloom.common.diffusion import Prediction, add_noise, ddpm, scaled_linear_schedule
from heirloom.common.errors import InputError, between, positive
from heirloom.common.nn.dense import param, zeros
from heirloom.common.nn.functional import Functional, Params
from heirloom.common.nn.moments import Moments
from weightgen.codec import vae_loss
from weightgen.d2nwg.unet import Unet, UnetConfig
from weightgen.d2nwg.vae import ConvVae, VaeConfig
from weightgen.generator.conditions import MlpSet, SetConfig, SetOfSets
from weightgen.tokens import TokenSpec
from weightgen.zoo.nets import NetConfig
from weightgen.zoo.zoo import head_tokens


@dataclass(frozen=True)
class D2nwgConfig:
    """The base config of the release: 2,864 weights, 1,024 latents."""

    vae: VaeConfig = field(default_factory=VaeConfig)
    unet: UnetConfig = field(default_factory=UnetConfig)
    encoder: Literal["mlp", "set"] = "mlp"
    """mlp: the default of the released YAML; set: Set Transformers, as the paper stresses."""
    features: SetConfig = field(default_factory=SetConfig)
    slots: int = 50
    """Pictures times classes the mlp has places for."""
    scale: float = 1.0
    """Weights are divided by this: 1 for small CNNs, 0.125 for ResNets, 0.1 for language models."""
    steps: int = 1024
    net: NetConfig = field(default_factory=lambda: NetConfig(kind="cnn", features=3, classes=10))
    """What the weights are of."""
    shots: int = 5

    @property
    def whole(self) -> TokenSpec:
        """The tokens of a network."""
        return head_tokens(self.net)

    def __post_init__(self) -> None:
        positive(self, "steps", "shots", "slots")
        between(self, "scale", least=1e-6)
        row, col, latent = self.vae.latent_shape
        if row * col * latent != self.unet.size**2:
            size = self.unet.size
            raise InputError(f"a latent of {row} x {col} x {latent} does not fill {size} x {size}: change unet.size")


class D2nwg(nnx.Module):
    """Autoencoder, condition and UNet.

    weights: [batch, rows * length]; support: [batch, class, picture, feature]; images NHWC.
    """

    def __init__(self, cfg: D2nwgConfig, *, rngs: nnx.Rngs):
        cells = cfg.unet.size**2
        self.vae = ConvVae(cfg.vae, rngs=rngs)
        if cfg.encoder == "mlp":
            self.condition: Any = MlpSet(cfg.features.features, cfg.slots, cells, rngs=rngs)
        else:
            self.condition = SetOfSets(replace(cfg.features, latent=cells), rngs=rngs)
        self.unet = Unet(cfg.unet, rngs=rngs)
        self.k = param("", {}, zeros, rngs)  # by which latents are multiplied; fitted between the stages
        self.cfg = cfg

    def reconstruct(self, weights: jax.Array, key: jax.Array) -> tuple[jax.Array, Moments]:
        return self.vae(weights / self.cfg.scale, key)

    def code(self, weights: jax.Array) -> jax.Array:
        """Encode and decode by the mean of the posterior, [batch, count]."""
        return self.vae.decode(self.vae.encode(weights / self.cfg.scale).mean) * self.cfg.scale

    def latents(self, weights: jax.Array, key: jax.Array) -> jax.Array:
        """Draw from the posterior, as a one-channel image in memory order, channels first, not spatial."""
        z = self.vae.encode(weights / self.cfg.scale).sample(key)
        return jnp.moveaxis(z, -1, 1).reshape(len(z), self.cfg.unet.size, self.cfg.unet.size, 1)

    def decode(self, image: jax.Array) -> jax.Array:
        row, col, latent = self.cfg.vae.latent_shape
        return self.vae.decode(jnp.moveaxis(image.reshape(len(image), latent, row, col), 1, -1)) * self.cfg.scale

    def embed(self, support: jax.Array) -> jax.Array:
        return self.condition(support).reshape(len(support), self.cfg.unet.size, self.cfg.unet.size, 1)

    def predict(self, noisy: jax.Array, t: jax.Array, condition: jax.Array) -> jax.Array:
        return self.unet(noisy, t, condition)


def stage1_loss(
    model: Functional, cfg: D2nwgConfig, params: Params, weights: jax.Array, key: jax.Array, beta: float = 1e-6
) -> jax.Array:
    """Compute the autoencoder's loss on weights [batch, count]."""
    back, posterior = model.apply(params, weights, key, method="reconstruct")
    return vae_loss(weights / cfg.scale, back, posterior, beta=beta)


def latent_scale(model: Functional, params: Params, weights: jax.Array, key: jax.Array) -> jax.Array:
    """Compute k = 1 / std of the latents of the first batch, computed once."""
    return 1 / model.apply(params, weights, key, method="latents").std()


def stage2_loss(
    model: Functional,
    cfg: D2nwgConfig,
    k: jax.Array,
    params: Params,
    weights: jax.Array,
    support: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Compute the mean squared error of the noise at uniform times; the autoencoder alone gets no gradient."""
    posterior, times, noises = jax.random.split(key, 3)
    schedule = scaled_linear_schedule(cfg.steps)
    clean = k * jax.lax.stop_gradient(model.apply(params, weights, posterior, method="latents"))
    step = jax.random.randint(times, (len(clean),), 0, len(schedule))
    noise = jax.random.normal(noises, clean.shape)
    condition = model.apply(params, support, method="embed")
    noisy, time = add_noise(schedule, clean, step, noise), jnp.asarray(schedule.time)[step]
    found = model.apply(params, noisy, time, condition, method="predict")
    return jnp.mean(jnp.square(found - noise))


def sample(
    model: Functional, cfg: D2nwgConfig, k: jax.Array, params: Params, support: jax.Array, key: jax.Array
) -> jax.Array:
    """Draw weights [batch, count] by ancestral sampling over all steps: posterior variance, nothing clipped."""
    sampler = ddpm(scaled_linear_schedule(cfg.steps))
    condition = model.apply(params, support, method="embed")
    time = jnp.asarray(sampler.time, jnp.float32)

    def denoise(x: jax.Array, i: jax.Array) -> Prediction:
        noise = model.apply(params, x, jnp.full(len(x), time[i]), condition, method="predict")
        return Prediction(noise, -jnp.ones_like(x))  # -1: the smaller of both variances, the posterior's

    start, steps = jax.random.split(key)
    x = jax.random.normal(start, (len(support), cfg.unet.size, cfg.unet.size, 1))
    return model.apply(params, sampler.run(denoise, x, steps) / k, method="decode")
