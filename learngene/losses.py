"""Learning from labels and from a teacher's logits (SWS: losses.py of the release, after DeiT)."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from heirloom.common.errors import InputError, between


@dataclass(frozen=True)
class DistillConfig:
    """Weight and form of the distillation loss."""

    alpha: float = 1.0
    """Weight of the distillation loss; the labels have weight 1 - alpha. 1, as released, uses no label."""
    kind: Literal["soft", "hard"] = "soft"
    """soft: match the teacher's distribution. hard: learn its most probable class."""
    temperature: float = 1.0
    """Temperature of both distributions, for kind "soft"."""
    reduction: Literal["batchmean", "numel"] = "batchmean"
    """batchmean: divide the divergence by the batch. numel, as released: by batch times classes, which makes it that
    many times smaller.
    """

    def __post_init__(self) -> None:
        between(self, "temperature", least=1e-3)
        if not 0 <= self.alpha <= 1:
            raise InputError(f"distill.alpha is {self.alpha}: choose a weight between 0 and 1")
        if self.reduction == "numel" and self.kind == "soft" and self.alpha < 1:
            what = "the teacher loss is divided by the number of classes, so the labels outweigh it"
            raise InputError(f"with distill.reduction 'numel' {what}: use 'batchmean'")

    def idle(self) -> dict[str, str]:
        """Fields that have no effect, and why."""
        return dict.fromkeys(("temperature", "reduction"), "distill.kind is hard") if self.kind == "hard" else {}


def cross_entropy(
    logits: Float[Array | np.ndarray, "batch classes"], targets: Float[Array | np.ndarray, "batch classes"]
) -> Float[Array, ""]:
    """Mean over the batch of -sum(targets log softmax(logits)), nats."""
    return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()


def distillation(
    student: Float[Array | np.ndarray, "batch classes"],
    teacher: Float[Array | np.ndarray, "batch classes"],
    cfg: DistillConfig,
) -> Float[Array, ""]:
    """Distillation loss before its weight, nats: T^2 KL(teacher || student), or CE with the teacher's top class.

    student, teacher: f32 logits; the caller stops the teacher's gradient. Labels and teacher use the logits of the same
    head.
    """
    if cfg.kind == "hard":
        return cross_entropy(student, jax.nn.one_hot(teacher.argmax(-1), teacher.shape[-1]))
    log_p, log_q = (jax.nn.log_softmax(x / cfg.temperature) for x in (teacher, student))
    total = cfg.temperature**2 * (jnp.exp(log_p) * (log_p - log_q)).sum()
    return total / (student.size if cfg.reduction == "numel" else len(student))
