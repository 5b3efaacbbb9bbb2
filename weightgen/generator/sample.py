"""Drawing weights from a generator."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from heirloom.common.diffusion import Prediction, ddim, ddpm, respace
from heirloom.common.errors import InputError, between
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
        between(self, "guidance")
        # The first is at the noisiest time and the last at the cleanest: one alone would be the latter.
        if self.steps < 2:
            raise InputError(f"{self.steps} steps: take 2 or more")
        if not 0 < self.strength <= 1:
            raise InputError(f"a strength of {self.strength:g}: choose above 0 and up to 1")


Draw = Callable[..., jax.Array]


def drawer(model: Functional, cfg: GeneratorConfig, how: SampleConfig) -> Draw:
    """`draw(params, support, mask, key, index, start=None)`: tokens [batch, token, length] f32, jitted per shape.

    support, mask: the condition, as `Generator` takes it. index: [batch] int32, which sample of the seed a row is:
    (key, index) fixes its noise, that of ddpm's steps too, on any number of devices. start: tokens to refine, with a
    `strength` below 1. ddpm has the posterior's variance. Raises InputError for a strength below 1 and nothing to start
    from.
    """
    full = cfg.chain()
    chain = respace(full, min(how.steps, len(full)))
    sampler = ddim(chain) if how.sampler == "ddim" else ddpm(chain)
    first = len(sampler) - max(round(how.strength * len(sampler)), 1)
    sampler = type(sampler)(*(getattr(sampler, name)[first:] for name in sampler.__dataclass_fields__))

    @jax.jit
    def draw(
        params: Any, support: jax.Array, mask: jax.Array, key: jax.Array, index: jax.Array, start: Any = None
    ) -> jax.Array:
        if start is None and how.strength < 1:
            raise InputError(f"a strength of {how.strength:g} refines given weights, and none are given: leave it at 1")
        keys = jax.vmap(partial(jax.random.fold_in, key))(index)
        x = jax.vmap(lambda k: jax.random.normal(k, (cfg.tokens.rows, cfg.latent_size)))(keys)
        if how.strength < 1:
            clean = model.apply(params, start, support, mask, method="encode")
            x = float(sampler.alpha[0]) * clean + float(sampler.sigma[0]) * x
        condition = model.apply(params, support, mask, method="embed")
        absent = jnp.zeros_like(mask)
        unconditional = model.apply(params, support, absent, method="embed") if how.guidance != 1 else None

        def denoise(x: jax.Array, i: jax.Array) -> Prediction:
            t = jnp.full(len(x), jnp.asarray(sampler.time, jnp.float32)[i])
            alpha, sigma = (jnp.asarray(table, jnp.float32)[i] for table in (sampler.alpha, sampler.sigma))
            v = model.apply(params, x, t, condition, method="predict")
            if unconditional is not None:
                away = model.apply(params, x, t, unconditional, method="predict")
                v = away + how.guidance * (v - away)
            # -1: the smaller of both variances, the posterior's.
            return Prediction(sigma * x + alpha * v, -jnp.ones_like(x))

        return model.apply(params, sampler.run(denoise, x, keys), support, mask, method="decode")

    return draw
