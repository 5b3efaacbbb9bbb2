"""Alignment of data-set embeddings with latents of weights. weights, data: [batch, latent] f32; each returns a mean (nats)."""

import jax
import jax.numpy as jnp


def soft_target(weights: jax.Array, data: jax.Array, temperature: float = 1.0) -> jax.Array:
    """As released: targets are the softmax of the mean of both similarities, nothing is normalised, and gradients flow into them."""
    scores = weights @ data.T / temperature
    targets = jax.nn.softmax((weights @ weights.T + data @ data.T) / 2 * temperature, axis=1)
    ways = [-(t * jax.nn.log_softmax(s, axis=1)).sum(1) for s, t in ((scores, targets), (scores.T, targets.T))]
    return jnp.mean(ways[0] + ways[1]) / 2


def info_nce(weights: jax.Array, data: jax.Array, temperature: jax.Array | float = 0.07) -> jax.Array:
    """Both directions of the normalised form, the pair on the diagonal against the batch."""
    scores = unit(weights) @ unit(data).T / temperature
    ways = [-jnp.diagonal(jax.nn.log_softmax(s, axis=1)).mean() for s in (scores, scores.T)]
    return (ways[0] + ways[1]) / 2


def siglip(weights: jax.Array, data: jax.Array, scale: jax.Array | float = 10.0, bias: jax.Array | float = -10.0) -> jax.Array:
    """Each pair by itself: softplus(-y (scale cos + bias)), y 1 on the diagonal and -1 elsewhere, summed over a row."""
    scores = scale * unit(weights) @ unit(data).T + bias
    signs = 2 * jnp.eye(len(scores)) - 1
    return jnp.mean(jax.nn.softplus(-signs * scores).sum(1))


def unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
