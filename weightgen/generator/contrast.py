"""Alignment of data-set embeddings with latents. weights, data: [batch, latent] f32; each gives a mean (nats)."""

from math import log
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from heirloom.common.nn.dense import param
from heirloom.common.nn.norm import unit
from weightgen.generator.conditions import SetConfig, SetOfSets

Loss = Literal["soft_target", "info_nce", "siglip"]
MOST = log(100)  # of the learned scale's logarithm, as in CLIP


class Aligned(nnx.Module):
    """A data-set encoder with the scalars that its loss learns.

    info_nce: a temperature from 0.07 down to 0.01; siglip: a scale from 10 up to 100 and a bias from -10; soft_target:
    none, as released.
    """

    def __init__(self, cfg: SetConfig, loss: Loss, *, rngs: nnx.Rngs):
        self.encoder = SetOfSets(cfg, rngs=rngs)
        begin = log(10) if loss == "siglip" else -log(0.07)
        self.logit_scale = param("", {}, lambda *_: jnp.float32(begin), rngs)
        self.logit_bias = param("", {}, lambda *_: jnp.float32(-10), rngs)
        self.loss = loss

    def __call__(self, support: jax.Array) -> jax.Array:
        return self.encoder(support)

    def nats(self, weights: jax.Array, data: jax.Array) -> jax.Array:
        scale = jnp.exp(jnp.minimum(self.logit_scale[...], MOST))
        scaled = {"scale": scale, "bias": self.logit_bias[...]}
        learned: dict[str, Any] = {"info_nce": {"temperature": 1 / scale}, "siglip": scaled}
        return LOSSES[self.loss](weights, data, **learned.get(self.loss, {}))


def soft_target(weights: jax.Array, data: jax.Array) -> jax.Array:
    """As released: targets are the softmax of both mean similarities, unnormalised, and get gradients."""
    scores = weights @ data.T
    targets = jax.nn.softmax((weights @ weights.T + data @ data.T) / 2, axis=1)
    ways = [-(t * jax.nn.log_softmax(s, axis=1)).sum(1) for s, t in ((scores, targets), (scores.T, targets.T))]
    return jnp.mean(ways[0] + ways[1]) / 2


def info_nce(weights: jax.Array, data: jax.Array, temperature: jax.Array | float = 0.07) -> jax.Array:
    """Both directions of the normalised form, the pair on the diagonal against the batch."""
    scores = unit(weights) @ unit(data).T / temperature
    ways = [-jnp.diagonal(jax.nn.log_softmax(s, axis=1)).mean() for s in (scores, scores.T)]
    return (ways[0] + ways[1]) / 2


def siglip(
    weights: jax.Array, data: jax.Array, scale: jax.Array | float = 10.0, bias: jax.Array | float = -10.0
) -> jax.Array:
    """Each pair by itself: softplus(-y (scale cos + bias)), y 1 on the diagonal and -1 elsewhere, summed over a row."""
    scores = scale * unit(weights) @ unit(data).T + bias
    signs = 2 * jnp.eye(len(scores)) - 1
    return jnp.mean(jax.nn.softplus(-signs * scores).sum(1))


LOSSES: dict[Loss, Any] = {"soft_target": soft_target, "info_nce": info_nce, "siglip": siglip}
