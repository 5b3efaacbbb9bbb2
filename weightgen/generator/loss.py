"""The diffusion loss of a generator."""

from typing import Any

import jax
import jax.numpy as jnp

from heirloom.common.diffusion import Schedule, add_noise
from heirloom.common.nn.functional import Functional
from heirloom.common.train.step import Batch, LossFn, LossOutput, Params
from weightgen.generator.config import GeneratorConfig


def loss(model: Functional, cfg: GeneratorConfig, dropout: float) -> LossFn:
    """Build the loss: mean squared error of v = alpha noise - sigma clean at uniform times.

    The condition is dropped with probability `dropout`.

    batch: tokens [b, token, length] f32, support [b, class, shots, feature] f32, shots [b] int32.
    Deviation: the released model predicts the noise; v keeps the conditional mean well scaled at all times.
    """
    schedule = cfg.chain()

    def value(params: Params, batch: Batch, key: jax.Array, frozen: Any) -> LossOutput:
        times, noises, drops = jax.random.split(key, 3)
        shots = jnp.arange(batch["support"].shape[2]) < batch["shots"][:, None, None]
        seen = jnp.broadcast_to(shots, batch["support"].shape[:3])
        clean = jax.lax.stop_gradient(model.apply(params, batch["tokens"], batch["support"], seen, method="encode"))
        step = jax.random.randint(times, (len(clean),), 0, len(schedule))
        noise = jax.random.normal(noises, clean.shape)
        kept = jax.random.uniform(drops, (len(clean), 1, 1)) >= dropout
        mask = seen & kept
        noisy, time = add_noise(schedule, clean, step, noise), jnp.asarray(schedule.time)[step]
        predicted = model.apply(params, noisy, time, batch["support"], mask)
        alpha, sigma = _alpha_sigma(schedule, step)
        error = jnp.mean(jnp.square(predicted - (alpha * noise - sigma * clean)))
        return error, {}

    return value


def _alpha_sigma(schedule: Schedule, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    bar = jnp.asarray(schedule.alpha_bar, jnp.float32)[step][:, None, None]
    return jnp.sqrt(bar), jnp.sqrt(1 - bar)
