"""DiT's loss, and the hybrid distillation of LiT (LiT §3.4): the teacher's noise and its variance, beside the data's."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from heirloom.common.diffusion import Prediction, Schedule, log_variance, variational_bound


@dataclass(frozen=True)
class DistillConfig:
    """What a student learns from its teacher beside the data."""

    noise: float = 0.5
    """Weight of the squared difference of the predicted noise (lambda 1; the text-to-image recipe has 1)."""
    variance: float = 0.05
    """Weight of the squared difference of the variance (lambda 2)."""
    target: Literal["raw", "log_sigma", "sigma"] = "raw"
    """What "variance" compares: the head's output as released, or the log-variance or variance it stands for (the paper writes Sigma)."""
    dropped: Literal["shared", "student"] = "shared"
    """Whose labels are dropped. Deviation: both networks see the same label ("shared"), where the released teacher always sees the true one
    ("student"), which pulls what the student says of no class toward what the teacher says of a class, and weakens guidance."""

    @property
    def active(self) -> bool:
        return self.noise != 0 or self.variance != 0


def split(output: jax.Array) -> Prediction:
    """[..., 2 channels] of the network to noise and variance."""
    return Prediction(*jnp.split(output, 2, axis=-1))


class Terms(NamedTuple):
    """The two terms of DiT's loss, [batch] each; the loss is their sum."""

    mse: jax.Array
    bound: jax.Array


def diffusion(schedule: Schedule, predicted: Prediction, clean: jax.Array, noisy: jax.Array, step: jax.Array, noise: jax.Array) -> Terms:
    """Squared error of the noise, and the variational bound, which teaches the variance alone (DiT; iDDPM's L_hybrid, not times T)."""
    assert predicted.ratio is not None
    bound = variational_bound(schedule, clean, noisy, step, jax.lax.stop_gradient(predicted.noise), predicted.ratio)
    return Terms(_mean(jnp.square(noise - predicted.noise)), bound)


class Distilled(NamedTuple):
    """How far student and teacher are apart, [batch] each, before their weights."""

    noise: jax.Array
    variance: jax.Array


def distillation(
    schedule: Schedule, student: Prediction, teacher: Prediction, step: jax.Array, target: Literal["raw", "log_sigma", "sigma"] = "raw"
) -> Distilled:
    """Squared differences of both heads. No gradient reaches the teacher."""
    teacher = jax.lax.stop_gradient(teacher)
    spreads = [_spread(schedule, prediction, step, target) for prediction in (student, teacher)]
    return Distilled(_mean(jnp.square(student.noise - teacher.noise)), _mean(jnp.square(spreads[0] - spreads[1])))


def _spread(schedule: Schedule, prediction: Prediction, step: jax.Array, target: str) -> jax.Array:
    assert prediction.ratio is not None
    if target == "raw":
        return prediction.ratio
    logarithm = log_variance(schedule, prediction.ratio, step)
    return logarithm if target == "log_sigma" else jnp.exp(logarithm)


def _mean(x: jax.Array) -> jax.Array:
    return x.reshape(len(x), -1).mean(1)
