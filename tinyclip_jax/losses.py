"""Losses of TinyCLIP (§3; clip_soft_loss.py). Features are unit norm and f32; the batch is the global one."""

import jax
import jax.numpy as jnp


def affinity_mimicking(
    image: jax.Array,
    text: jax.Array,
    teacher_image: jax.Array,
    teacher_text: jax.Array,
    scale: jax.Array | float,
    teacher_scale: jax.Array | float,
) -> jax.Array:
    """Cross-entropy between teacher's and student's image-text affinities (TinyCLIP eq. 2-4).

    image, text: [batch, joint] student features, unit norm, f32. teacher_*: same, any joint width, no gradient.
    scale, teacher_scale: inverse temperatures (1/0.02 in the released recipes).
    Returns the mean over the global batch of both directions, halved each (nats).
    """
    logits = scale * similarity(image, text)
    teacher = jax.lax.stop_gradient(teacher_scale * similarity(teacher_image, teacher_text))
    return (soft_cross_entropy(logits, teacher) + soft_cross_entropy(logits.T, teacher.T)) / 2


def similarity(image: jax.Array, text: jax.Array) -> jax.Array:
    """Cosines [images, captions]. In full precision: a TPU's bf16 passes would move logits by a tenth at a scale of 50."""
    return jnp.matmul(image, text.T, precision=jax.lax.Precision.HIGHEST)


def soft_cross_entropy(logits: jax.Array, target_logits: jax.Array) -> jax.Array:
    """Mean over rows of the cross-entropy of softmax(logits) under softmax(target_logits), nats. Both [rows, columns]."""
    return -jnp.mean(jnp.sum(jax.nn.softmax(target_logits, axis=-1) * jax.nn.log_softmax(logits, axis=-1), axis=-1))


def contrastive(image: jax.Array, text: jax.Array, scale: jax.Array | float, group: jax.Array | None = None) -> jax.Array:
    """CLIP's InfoNCE, both directions, halved each (nats).

    image, text: [batch, joint] unit norm, f32. group: [batch] int; pairs of one group are positives of one another, and
    share the target evenly (None: every pair is its own group).
    """
    logits = scale * similarity(image, text)
    if group is None:
        group = jnp.arange(len(image))
    target = (group[:, None] == group[None]).astype(jnp.float32)
    target = target / target.sum(-1, keepdims=True)
    rows = jnp.sum(target * jax.nn.log_softmax(logits, axis=-1), axis=-1)
    columns = jnp.sum(target * jax.nn.log_softmax(logits.T, axis=-1), axis=-1)
    return -(jnp.mean(rows) + jnp.mean(columns)) / 2
