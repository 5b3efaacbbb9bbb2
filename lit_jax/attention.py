"""LiT's linear attention as a module: projections, feature map, depthwise branch (LiT §3.1; FLatten for the focused
map).
"""

from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from heirloom.common.errors import InputError
from heirloom.common.mesh import ROWS
from heirloom.common.nn.block import Grid
from heirloom.common.nn.dense import Dense, Sizes, param, uniform_fan_in, xavier_uniform, zeros
from heirloom.common.nn.precision import add, product, widened
from lit_jax.kernels import choice
from lit_jax.linear_attention import Implementation, linear_attention

Features = Literal["relu", "gelu", "focused", "focused_gelu"]
Filters = Literal["shared", "channel", "none"]
OFFSET = 1e-6  # added to the features and to the normaliser
FOCUS = 3  # the power of the focused map


class LinearAttention(nnx.Module):
    """Linear attention plus a depthwise convolution of the values. `x` is [batch, token, embed] in raster order of
    `grid`, its (rows, columns); None: a square.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        features: Features = "relu",
        filters: Filters = "shared",
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        # Xavier fans as in the released code: q is one matrix, k and v are packed in another.
        self.query = Dense("embed -> head head_dim", sizes, init=xavier_uniform(), rngs=rngs)
        self.key = Dense("embed -> head head_dim", sizes, init=xavier_uniform(packed=2), rngs=rngs)
        self.value = Dense("embed -> head head_dim", sizes, init=xavier_uniform(packed=2), rngs=rngs)
        self.out = Dense("head head_dim -> embed", sizes, init=xavier_uniform(), rngs=rngs)
        self.depthwise = None if filters == "none" else Depthwise(sizes, filters, rngs=rngs)
        self.scale = param("head head_dim", sizes, zeros, rngs) if features.startswith("focused") else None
        self.features = features
        self.heads = sizes["head"]
        self.implementation = implementation

    def __call__(self, x: jax.Array, grid: Grid | None = None) -> jax.Array:
        # Projections write the layout that the kernel reads, so that no transpose is needed between them.
        feature_major = self.features == "relu" and (self.implementation or choice().implementation) == "mosaic_tpu"
        project = _feature_major if feature_major else Dense.__call__
        query, key, value = project(self.query, x), project(self.key, x), project(self.value, x)
        weight = bias = None
        if self.depthwise is not None:
            weight, bias = self.depthwise.banks(self.heads)
        options: dict[str, Any] = dict(eps=OFFSET, feature_offset=OFFSET, conv_weight=weight, conv_bias=bias)
        options |= dict(implementation=self.implementation, shards=_shards(len(x), self.heads), grid=grid)
        if feature_major:
            mixed = linear_attention(query, key, value, layout="bhdn", **options)
            y = product("bhdn,hde->bne", mixed, self.out.kernel[...])
            return y if self.out.bias is None else add(y, self.out.bias[...])
        if self.features != "relu":
            query, key = self.feature_map(query), self.feature_map(key)
            options |= dict(feature_map="none", feature_offset=0.0)
        return self.out(linear_attention(query, key, value, **options))

    def feature_map(self, x: jax.Array) -> jax.Array:
        """Apply a feature map other than ReLU to [batch, token, head, head_dim]: computed in f32, returned in the dtype
        of `x`.
        """
        y = x.astype(jnp.float32)
        y = (jax.nn.relu(y) if self.features == "focused" else jax.nn.gelu(y)) + OFFSET
        if self.scale is not None:
            # A power sharpens the features; their norm over all channels is kept (FLatten eq. 5). The scale is learned,
            # via softplus.
            y = y / jax.nn.softplus(self.scale[...].astype(jnp.float32))
            sharp = y**FOCUS
            y = sharp * _norm(y) / (_norm(sharp) + OFFSET)
        return y.astype(x.dtype)


class Depthwise(nnx.Module):
    """Filters of the depthwise branch: one bank of head_dim filters shared by all heads, or a filter for each channel.

    Raises InputError for filters of an even size.
    """

    def __init__(self, sizes: Sizes, filters: Filters, *, rngs: nnx.Rngs):
        channels = "head_dim" if filters == "shared" else "head head_dim"
        taps = sizes["filter_row"] * sizes["filter_col"]
        if taps % 2 == 0:
            window = f"{sizes['filter_row']} x {sizes['filter_col']}"
            raise InputError(f"filters of {window} tokens have no centre tap: set student.window to an odd number")
        self.kernel = param(f"filter_row filter_col {channels}", sizes, uniform_fan_in, rngs, fan_in=taps)
        self.bias = param(channels, sizes, uniform_fan_in, rngs, fan_in=taps)

    def banks(self, heads: int) -> tuple[jax.Array, jax.Array]:
        """Return weights [row, col, channel] and bias [channel] of all channels, head-major, f32: a shared bank is
        tiled.
        """
        kernel, bias = widened(self.kernel[...]), widened(self.bias[...])
        if bias.ndim == 1:
            return jnp.tile(kernel, (1, 1, heads)), jnp.tile(bias, heads)
        return kernel.reshape(*kernel.shape[:2], -1), bias.reshape(-1)


def _feature_major(dense: Dense, x: jax.Array) -> jax.Array:
    """Apply `dense` to [batch, token, embed]; returns [batch, head, head_dim, token]."""
    y = product("bne,ehd->bhdn", x, dense.kernel[...])
    return y if dense.bias is None else add(y, dense.bias[...][..., None])


def _shards(batch: int, heads: int) -> PartitionSpec | None:
    """Return the mesh axes over which batch and heads are split: those whose sizes divide them. None without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return None
    rows = [name for name in ROWS if name in mesh.shape]
    over_rows = batch % prod(mesh.shape[name] for name in rows) == 0
    over_heads = "tensor" in mesh.shape and heads % mesh.shape["tensor"] == 0
    return PartitionSpec(tuple(rows) if over_rows else None, "tensor" if over_heads else None)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(x).sum((-2, -1), keepdims=True))
