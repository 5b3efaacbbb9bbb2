"""DiT's loss, and LiT's hybrid distillation of the teacher's noise and variance (LiT §3.4)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from heirloom.common.diffusion import Prediction, Schedule, add_noise, log_variance, variational_bound
from heirloom.common.errors import between


@dataclass(frozen=True)
class DistillConfig:
    """Weights of the distillation terms that are added to the loss on the data."""

    noise: float = 0.5
    """Weight of the squared difference of the predicted noise (lambda 1; the text-to-image recipe has 1)."""
    variance: float = 0.05
    """Weight of the squared difference of the variance (lambda 2)."""
    target: Literal["raw", "log_sigma", "sigma"] = "raw"
    """What "variance" compares: the raw output, as in the released code, or its log-variance or variance (Sigma in the
    paper).
    """
    dropped: Literal["shared", "student"] = "shared"
    """Whose labels are dropped. Deviation: both networks see the same label ("shared"), where the released teacher
    always sees the true one ("student"), which pulls the student's unconditional output toward the teacher's
    conditional one, and weakens guidance.
    """

    def __post_init__(self) -> None:
        between(self, "noise", "variance")

    @property
    def active(self) -> bool:
        return self.noise != 0 or self.variance != 0


def split(output: Float[Array, "*place channels"]) -> Prediction:
    """Split the network's output [..., 2 channels] into noise and variance."""
    return Prediction(*jnp.split(output, 2, axis=-1))


class Terms(NamedTuple):
    """The two terms of DiT's loss, [batch] each; the loss is their sum."""

    mse: Float[Array, " batch"]
    bound: Float[Array, " batch"]


def diffusion(
    schedule: Schedule,
    predicted: Prediction,
    clean: Float[Array, "batch *place channel"],
    noisy: Float[Array, "batch *place channel"],
    step: Int[Array, " batch"],
    noise: Float[Array, "batch *place channel"],
) -> Terms:
    """Compute the squared error of the noise, and the variational bound, whose gradient reaches the variance alone.

    The sum is DiT's loss (iDDPM's L_hybrid, without its factor T).
    """
    assert predicted.ratio is not None
    bound = variational_bound(schedule, clean, noisy, step, jax.lax.stop_gradient(predicted.noise), predicted.ratio)
    return Terms(_mean_per_example(jnp.square(noise - predicted.noise)), bound)


class Distilled(NamedTuple):
    """Squared differences of student and teacher, [batch] each, unweighted."""

    noise: Float[Array, " batch"]
    variance: Float[Array, " batch"]


def distillation(
    schedule: Schedule,
    student: Prediction,
    teacher: Prediction,
    step: Int[Array, " batch"],
    target: Literal["raw", "log_sigma", "sigma"] = "raw",
) -> Distilled:
    """Compute the squared differences of both outputs. No gradient reaches the teacher."""
    teacher = jax.lax.stop_gradient(teacher)
    variances = [_variance(schedule, prediction, step, target) for prediction in (student, teacher)]
    noise = _mean_per_example(jnp.square(student.noise - teacher.noise))
    return Distilled(noise, _mean_per_example(jnp.square(variances[0] - variances[1])))


Network = Callable[[jax.Array, jax.Array], jax.Array]
"""`network(noisy, step)` returns noise and variance, [batch, *place, 2 channels]."""


def hybrid(
    schedule: Schedule,
    cfg: DistillConfig,
    clean: Float[Array, "batch *place channel"],
    keys: tuple[jax.Array, jax.Array],
    student: Network,
    teacher: Network | None,
    noisy_weight: float = 1.0,
) -> tuple[Float[Array, " batch"], dict[str, Float[Array, " batch"]]]:
    """Compute DiT's loss of the student at random times, plus the weighted distillation terms (LiT §3.4).

    keys: of the times and of the noise. noisy_weight: both squared errors of the noise are divided by alpha_bar, at
    most multiplied by this. 1 is DiT's loss; without a limit it would be the squared error of the velocity (Salimans &
    Ho 2022), which weighs noisy pictures, where the text decides, far more. Returns the total and its unweighted
    parts: mse, bound, and with a teacher kd_noise and kd_variance.
    """
    step = jax.random.randint(keys[0], (len(clean),), 0, len(schedule))
    noise = jax.random.normal(keys[1], clean.shape)
    noisy = add_noise(schedule, clean, step, noise)
    predicted = split(student(noisy, step))
    parts = diffusion(schedule, predicted, clean, noisy, step, noise)._asdict()
    weight = jnp.asarray(np.minimum(1 / schedule.alpha_bar, noisy_weight), jnp.float32)[step]
    total = weight * parts["mse"] + parts["bound"]
    if teacher:
        terms = distillation(schedule, predicted, split(teacher(noisy, step)), step, cfg.target)
        total = total + cfg.noise * weight * terms.noise + cfg.variance * terms.variance
        parts |= {"kd_noise": terms.noise, "kd_variance": terms.variance}
    return total, parts


def _variance(schedule: Schedule, prediction: Prediction, step: jax.Array, target: str) -> jax.Array:
    assert prediction.ratio is not None
    if target == "raw":
        return prediction.ratio
    logarithm = log_variance(schedule, prediction.ratio, step)
    return logarithm if target == "log_sigma" else jnp.exp(logarithm)


def _mean_per_example(x: jax.Array) -> jax.Array:
    return x.reshape(len(x), -1).mean(1)
