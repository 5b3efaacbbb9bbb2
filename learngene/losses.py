"""Learning from labels and from a teacher's logits (SWS: losses.py of the release, after DeiT)."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from heirloom.common.errors import InputError


@dataclass(frozen=True)
class DistillConfig:
    """How much of the loss is the teacher's, and in which form."""

    alpha: float = 1.0
    """Weight of the teacher; the rest goes to the labels. 1, as released, never looks at a label."""
    kind: Literal["soft", "hard"] = "soft"
    """Match the teacher's distribution, or learn its most probable class."""
    temperature: float = 1.0
    """Of both distributions, where they are soft."""
    reduction: Literal["batchmean", "numel"] = "batchmean"
    """Divide the divergence by the batch, or, as released, by batch times classes, which makes it that many times smaller."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError(f"distill.alpha is {self.alpha}: choose a weight between 0 and 1")
        if self.reduction == "numel" and self.kind == "soft" and self.alpha < 1:
            raise InputError("distill.reduction 'numel' next to labels would drown the teacher by a factor of the classes: use 'batchmean'")


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over the batch of -sum(targets log softmax(logits)), nats. logits, targets: [batch, classes] f32."""
    return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()


def distillation(student: jax.Array, teacher: jax.Array, cfg: DistillConfig) -> jax.Array:
    """The teacher's term, before its weight: T^2 KL(teacher || student) of softened distributions, or cross-entropy with its choice.

    student, teacher: [batch, classes] f32 logits; the caller stops the teacher's gradient. One head's logits serve both terms.
    """
    if cfg.kind == "hard":
        return cross_entropy(student, jax.nn.one_hot(teacher.argmax(-1), teacher.shape[-1]))
    log_p, log_q = (jax.nn.log_softmax(x / cfg.temperature) for x in (teacher, student))
    total = cfg.temperature**2 * (jnp.exp(log_p) * (log_p - log_q)).sum()
    return total / (student.size if cfg.reduction == "numel" else len(student))
