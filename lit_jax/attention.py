"""LiT's attention as a module: projections, the feature map, the depthwise branch (LiT §3.1; FLatten for the focused map)."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from common.nn.dense import Dense, Sizes, param, uniform_fan_in, xavier_uniform, zeros
from lit_jax.linear_attention import linear_attention

Features = Literal["relu", "gelu", "focused", "focused_gelu"]
Filters = Literal["shared", "channel", "none"]
OFFSET = 1e-6  # added to the features and to the normaliser
FOCUS = 3  # the power of the focused map


class LinearAttention(nnx.Module):
    """Linear attention plus a depthwise convolution of the values. `x` is [batch, token, embed], a square in raster order."""

    def __init__(self, sizes: Sizes, *, features: Features = "relu", filters: Filters = "shared", rngs: nnx.Rngs):
        # Xavier of the matrices as the release has them: q alone, k and v as one.
        self.query = Dense("embed -> head head_dim", sizes, init=xavier_uniform(), rngs=rngs)
        self.key = Dense("embed -> head head_dim", sizes, init=xavier_uniform(packed=2), rngs=rngs)
        self.value = Dense("embed -> head head_dim", sizes, init=xavier_uniform(packed=2), rngs=rngs)
        self.out = Dense("head head_dim -> embed", sizes, init=xavier_uniform(), rngs=rngs)
        self.depthwise = None if filters == "none" else Depthwise(sizes, filters, rngs=rngs)
        self.scale = param("head head_dim", sizes, zeros, rngs) if features.startswith("focused") else None
        self.features = features
        self.heads = sizes["head"]

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = self.query(x), self.key(x), self.value(x)
        weight = bias = None
        if self.depthwise is not None:
            weight, bias = self.depthwise.banks(self.heads)
        options: dict[str, Any] = dict(eps=OFFSET, feature_offset=OFFSET, conv_weight=weight, conv_bias=bias)
        if self.features != "relu":
            query, key = self.map(query), self.map(key)
            options |= dict(feature_map="none", feature_offset=0.0)
        return self.out(linear_attention(query, key, value, **options))

    def map(self, x: jax.Array) -> jax.Array:
        """Features other than LiT's own, [batch, token, head, head_dim]; f32 inside, the dtype of `x` outside."""
        y = x.astype(jnp.float32)
        y = (jax.nn.relu(y) if self.features == "focused" else jax.nn.gelu(y)) + OFFSET
        if self.scale is not None:
            # Sharpened by a power, the norm over all channels kept (FLatten eq. 5); its scale is learned, through a softplus.
            y = y / jax.nn.softplus(self.scale[...].astype(jnp.float32))
            sharp = y**FOCUS
            y = sharp * _norm(y) / (_norm(sharp) + OFFSET)
        return y.astype(x.dtype)


class Depthwise(nnx.Module):
    """Filters over the grid of tokens: one bank of head_dim filters for all heads, or a filter for each channel."""

    def __init__(self, sizes: Sizes, filters: Filters, *, rngs: nnx.Rngs):
        channels = "head_dim" if filters == "shared" else "head head_dim"
        taps = sizes["filter_row"] * sizes["filter_col"]
        self.kernel = param(f"filter_row filter_col {channels}", sizes, uniform_fan_in, rngs, fan_in=taps)
        self.bias = param(channels, sizes, uniform_fan_in, rngs, fan_in=taps)

    def banks(self, heads: int) -> tuple[jax.Array, jax.Array]:
        """Weights [row, col, channel] and bias [channel] over all channels, head-major: a shared bank is tiled."""
        kernel, bias = self.kernel[...], self.bias[...]
        if bias.ndim == 1:
            return jnp.tile(kernel, (1, 1, heads)), jnp.tile(bias, heads)
        return kernel.reshape(*kernel.shape[:2], -1), bias.reshape(-1)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(x).sum((-2, -1), keepdims=True))
