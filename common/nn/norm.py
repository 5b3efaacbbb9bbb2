"""Layer normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx

from common.nn.dense import Sizes, ones, param, zeros


class LayerNorm(nnx.Module):
    """Normalise the last axis, `embed`; statistics in f32 whatever the input's dtype, which the result keeps."""

    def __init__(self, sizes: Sizes, *, eps: float, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param("embed", sizes, ones, rngs)
        self.bias = param("embed", sizes, zeros, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)
