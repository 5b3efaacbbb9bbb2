"""Drawing weights from a generator."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from heirloom.common.diffusion import Prediction, ddim, ddpm, respace
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import Functional
from weightgen.generator.config import GeneratorConfig


@dataclass(frozen=True)
class SampleConfig:
    """How weights are drawn."""

    sampler: Literal["ddim", "ddpm"] = "ddim"
    steps: int = 50
    guidance: float = 1.0
    """Above 1: away from what is predicted without a condition."""
    strength: float = 1.0
    """How far given weights are noised before they are denoised, as a share of the chain; 1: from pure noise."""

    def __post_init__(self) -> None:
        if self.steps < 2:  # the first is at the noisiest time and the last at the cleanest: one alone would be the latter
            raise InputError(f"{self.steps} steps: take 2 or more")
        if not 0 < self.strength <= 1:
            raise InputError(f"a strength of {self.strength:g}: choose above 0 and up to 1")


Draw = Callable[..., jax.Array]


def drawer(model: Functional, cfg: GeneratorConfig, how: SampleConfig) -> Draw:
    """`draw(params, support, there, key, index, start=None, known=None)`: tokens [batch, token, length] f32, compiled once per shape.

    index: [batch] int32, which sample of the seed a row is: (key, index) fixes its noise, that of ddpm's steps too, on any number of
    devices. start: tokens to refine (with `strength` below 1), or whose parts are kept where `known` [token] is True (in-painting).
    ddpm has the posterior's variance. Raises InputError for a strength below 1 and nothing to start from.
    """
    full = cfg.chain()
    chain = respace(full, min(how.steps, len(full)))
    sampler = ddim(chain) if how.sampler == "ddim" else ddpm(chain)
    first = len(sampler) - max(round(how.strength * len(sampler)), 1)
    sampler = type(sampler)(*(getattr(sampler, name)[first:] for name in sampler.__dataclass_fields__))

    @jax.jit
    def draw(
        params: Any, support: jax.Array, there: jax.Array, key: jax.Array, index: jax.Array, start: Any = None, known: Any = None
    ) -> jax.Array:
        if start is None and how.strength < 1:
            raise InputError(f"a strength of {how.strength:g} refines given weights, and none are given: leave it at 1")
        latent = cfg.latent if cfg.codec is None else cfg.codec.latent
        keys = jax.vmap(partial(jax.random.fold_in, key))(index)
        noise = jax.vmap(lambda k: jax.random.normal(k, (cfg.tokens.rows, latent)))(keys)
        clean = None if start is None else model.apply(params, start, support, there, method="encode")
        told = model.apply(params, support, there, method="told")
        untold = model.apply(params, support, jnp.zeros_like(there), method="told") if how.guidance != 1 else None

        def denoise(x: jax.Array, i: jax.Array) -> Prediction:
            t = jnp.full(len(x), jnp.asarray(sampler.time, jnp.float32)[i])
            alpha, sigma = (jnp.asarray(table, jnp.float32)[i] for table in (sampler.alpha, sampler.sigma))
            if clean is not None and known is not None:
                x = jnp.where(known[:, None], alpha * clean + sigma * noise, x)
            v = model.apply(params, x, t, told, method="predict")
            if untold is not None:
                away = model.apply(params, x, t, untold, method="predict")
                v = away + how.guidance * (v - away)
            predicted = sigma * x + alpha * v
            if clean is not None and known is not None:
                predicted = jnp.where(known[:, None], noise, predicted)
            return Prediction(predicted, -jnp.ones_like(x))  # -1: the smaller of both variances, the posterior's

        x = noise
        if clean is not None and how.strength < 1:
            x = float(sampler.alpha[0]) * clean + float(sampler.sigma[0]) * noise
        out = model.apply(params, sampler.run(denoise, x, keys), support, there, method="decode")
        return out if start is None or known is None else jnp.where(known[:, None], start, out)

    return draw


def reduce_mean(tokens: np.ndarray) -> np.ndarray:
    """The average of samples [n, ...] in weight space: for convex heads the conditional mean, which one sample is not."""
    return np.mean(tokens, axis=0)
