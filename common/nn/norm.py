"""Normalisation, of the channels of a token or of groups of channels over an image."""

from functools import partial
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from heirloom.common.nn.dense import Init, Sizes, ones, param, zeros
from heirloom.common.nn.for_cpus import normalised, on_cpus

MOMENTUM = 0.1  # torch's, the share of a batch in the running statistics


@overload
def unit(x: np.ndarray) -> np.ndarray: ...
@overload
def unit(x: jax.Array) -> jax.Array: ...
def unit(x: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Divide vectors [..., embed] by their Euclidean norm; NumPy in, NumPy out. A vector of zeros stays zeros."""
    if isinstance(x, np.ndarray):
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class LayerNorm(nnx.Module):
    """Normalise the last axes, by default `embed`; statistics in f32 whatever the input's dtype, which the result
    keeps.

    `affine=False`: no scale and bias of its own, where a modulation brings them. axes: the names of the last axes, such
    as "head head_dim". keep: [embed], bool, the channels that learned masks have left; statistics are over these alone
    and the others come out as 0 (TinyCLIP §3.2).
    """

    def __init__(self, sizes: Sizes, *, eps: float, affine: bool = True, axes: str = "embed", rngs: nnx.Rngs):
        self.eps, self.last = eps, tuple(range(-len(axes.split()), 0))
        self.scale = param(axes, sizes, ones, rngs) if affine else None
        self.bias = param(axes, sizes, zeros, rngs) if affine else None

    def __call__(self, x: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        own, default = (partial(f, self.last, self.eps) for f in (normalised, plain))
        y = on_cpus(own, default, x.astype(jnp.float32), keep)
        if self.scale is not None and self.bias is not None:
            y = y * self.scale[...] + self.bias[...]
        return (y if keep is None else jnp.where(keep, y, 0)).astype(x.dtype)


def plain(last: tuple[int, ...], eps: float, x: jax.Array, keep: jax.Array | None) -> jax.Array:
    """Returns `x` with mean 0 and variance 1 over the axes `last`. keep: as in `LayerNorm`."""
    y = x - x.mean(last, keepdims=True, where=keep)
    return y * jax.lax.rsqrt(jnp.square(y).mean(last, keepdims=True, where=keep) + eps)


class RmsNorm(nnx.Module):
    """Divides by the root mean square of the last axis, `embed`, and scales; no mean, no bias (Zhang & Sennrich 2019).

    The result is f32, whatever the input's dtype.
    """

    def __init__(self, sizes: Sizes, *, eps: float, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param("embed", sizes, ones, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        return y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps) * self.scale[...]


class GroupNorm(nnx.Module):
    """Normalise groups of the last axis, `channel`, over all axes but the first; statistics in f32, the input's dtype
    out.
    """

    def __init__(self, channels: int, *, groups: int, eps: float, rngs: nnx.Rngs):
        self.groups, self.eps = groups, eps
        self.scale = param("channel", {"channel": channels}, ones, rngs)
        self.bias = param("channel", {"channel": channels}, zeros, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32).reshape(len(x), -1, self.groups, x.shape[-1] // self.groups)
        y = y - y.mean((1, 3), keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean((1, 3), keepdims=True) + self.eps)
        return (y.reshape(x.shape) * self.scale[...] + self.bias[...]).astype(x.dtype)


class BatchNorm(nnx.Module):
    """Normalise each channel of the last axis over all others; statistics in f32, the input's dtype out.

    `mean` and `variance` are the running statistics, leaves of the parameters without a gradient. In training
    (`Functional.train`) the batch's own are used, and the running ones move a tenth of the way to them (the variance's
    unbiased), as torch's do. Sharded rows are one batch: statistics are over all devices.
    """

    def __init__(self, channels: int, *, eps: float, scale: Init = ones, rngs: nnx.Rngs):
        sizes = {"channel": channels}
        self.eps, self.use_running_average = eps, True
        self.scale = param("channel", sizes, scale, rngs)
        self.bias = param("channel", sizes, zeros, rngs)
        self.mean = _statistic(param("channel", sizes, zeros, rngs))
        self.variance = _statistic(param("channel", sizes, ones, rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        y, axes = x.astype(jnp.float32), tuple(range(x.ndim - 1))
        if self.use_running_average:
            mean, variance = jax.lax.stop_gradient((self.mean[...], self.variance[...]))
        else:
            mean, variance = y.mean(axes), y.var(axes)
            count = x.size // x.shape[-1]
            for running, seen in ((self.mean, mean), (self.variance, variance * count / (count - 1))):
                running[...] = jax.lax.stop_gradient(running[...] + MOMENTUM * (seen - running[...]))
        y = (y - mean) * jax.lax.rsqrt(variance + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def _statistic(made: nnx.Param) -> nnx.BatchStat:
    return nnx.BatchStat(made.get_value(), **made.get_metadata())
