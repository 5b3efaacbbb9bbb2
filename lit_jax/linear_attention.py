"""Few-head linear attention with a depthwise branch on the values (LiT §3.1; FLatten), in closed form both ways.

Per head, with phi(x) = ReLU(x) + feature_offset and means over the N tokens,

    out = phi(q) mean(phi(k) v^T) / (phi(q) . mean(phi(k)) + eps) + depthwise(v)

What is computed is the same function with keys and values centred: the large rank-one part of the state, which would have to
cancel in the backward pass, never enters a rounded product.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from heirloom.common.errors import InputError
from heirloom.common.nn.precision import rounded
from lit_jax.kernels import PLATFORMS, FeatureMap, Residuals, Layout, Order, Problem, choice
from lit_jax.kernels.xla import check_branch, depthwise

__all__ = ["depthwise", "linear_attention"]

Implementation = Literal["xla", "mosaic_tpu", "mosaic_gpu", "reference"]
QUADRATIC_UP_TO = 256  # tokens: below this the N x N order does less work and has no state


class Unsupported(InputError, ValueError):
    """A kernel that was asked for by name cannot take these arrays."""


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    eps: float = 1e-6,
    feature_offset: float = 1e-6,
    conv_weight: jax.Array | None = None,
    conv_bias: jax.Array | None = None,
    grid: tuple[int, int] | None = None,
    feature_map: FeatureMap = "relu",
    implementation: Implementation | None = None,
    order: Order | None = None,
    layout: Layout = "bnhd",
    shards: PartitionSpec | None = None,
) -> jax.Array:
    """Non-causal linear attention of every head over its own tokens, plus the depthwise convolution of the values.

    q, k, v: [batch, token, head, head_dim] (or [batch, head, head_dim, token] with layout "bhdn"), any float dtype; so is the result.
    eps, feature_offset: added to the normaliser and to the features.
    conv_weight: [rows, cols, head * head_dim], odd sizes, zero padding; conv_bias: [head * head_dim]. The values are seen as images of
    `grid` = (height, width) in raster order; None: square. A bank shared by the heads is tiled by the caller.
    feature_map: "relu" applies phi; "none" takes q and k as features, to which only the offset is added.
    implementation: "xla" accumulates in f32 whatever the dtype, with a closed-form gradient, and runs everywhere; "mosaic_tpu" and
    "mosaic_gpu" (for Hopper) are kernels for bfloat16, differentiable once, which want layout "bhdn" and "bnhd"; "reference" is the
    definition in f32 (f64 for f64 input), differentiated by JAX. None: the kernel for this device if it was measured on its kind,
    else "xla".
    order: "linear" builds the head_dim x head_dim state, "quadratic" the token x token weights; None chooses by the number of tokens.
    Both are the same function.
    shards: mesh axes (of `jax.set_mesh`) over which batch and head are split, for a kernel inside a jit over several devices; what XLA
    computes it partitions by itself.
    For `jax.checkpoint` policies q, k, v are named `lin_attn_q`, ..., the sums over tokens `lin_attn_state`, the result `lin_attn_out`.
    Raises ValueError for shapes that do not fit, `Unsupported` where a kernel is named that cannot take them.
    """
    if not (q.ndim == 4 and q.shape == k.shape == v.shape):
        raise ValueError(f"q, k, v must be of one shape [batch, token, head, head_dim], got {q.shape}, {k.shape}, {v.shape}")
    _, tokens, heads, head_dim = q.shape if layout == "bnhd" else (q.shape[0], q.shape[3], *q.shape[1:3])
    if conv_weight is not None:
        grid = check_branch(conv_weight, grid, tokens, heads * head_dim)
    problem = Problem(eps, feature_offset, feature_map, order or ("quadratic" if tokens <= QUADRATIC_UP_TO else "linear"), layout, grid)
    if implementation == "reference":
        return _reference(q, k, v, conv_weight, conv_bias, problem)

    window = None if conv_weight is None else conv_weight.shape[:2]
    picked = implementation or choice().implementation
    if reason := _module(picked).unsupported_reason(problem, head_dim, tokens, v.dtype, window):
        if implementation:
            raise Unsupported(f"linear attention by {implementation}: {reason}; or take the implementation xla")
        picked = "xla"
    if picked == "mosaic_gpu" and feature_map == "relu":
        q, k = _rectified(q), _rectified(k)
    run = _Run(problem, picked, implementation is None, shards)
    return _attend(q, k, v, conv_weight, conv_bias, run)


@jax.custom_vjp
def _rectified(x: jax.Array) -> jax.Array:
    """ReLU where the projection ends, so that XLA makes it one kernel; its gradient is attention's, which masks what it returns."""
    return jnp.maximum(x, 0)


_rectified.defvjp(lambda x: (jnp.maximum(x, 0), None), lambda _, grad: (grad,))


def _reference(q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array | None, bias: jax.Array | None, problem: Problem) -> jax.Array:
    wide = jnp.promote_types(v.dtype, jnp.float32)
    turned = problem.layout == "bhdn"
    q, k, values = (jnp.moveaxis(x, 3, 1).astype(wide) if turned else x.astype(wide) for x in (q, k, v))
    q, k = ((jax.nn.relu(x) if problem.feature_map == "relu" else x) + problem.offset for x in (q, k))
    state = jnp.einsum("bnhd,bnhe->bhde", k, values) / k.shape[1]
    normaliser = jnp.einsum("bnhd,bhd->bnh", q, k.mean(1)) + problem.eps
    out = jnp.einsum("bnhd,bhde->bnhe", q, state) / normaliser[..., None]
    if weight is not None:
        out = out + depthwise(values, weight, bias, problem.grid)
    return (jnp.moveaxis(out, 1, 3) if turned else out).astype(v.dtype)


class _Run(NamedTuple):
    """How a call is computed. chosen: by us for this device, so that lowered for another platform it is XLA's."""

    problem: Problem
    implementation: str
    chosen: bool
    shards: PartitionSpec | None

    def forward(self, *arrays: Any) -> Any:
        """out, known."""
        return self._on_platform(self._forward, "forward", *arrays)

    def backward(self, *arrays: Any) -> Any:
        """dq, dk, dv, dweight, dbias."""
        return self._on_platform(self._backward, "backward", *arrays)

    def _on_platform(self, kernel: Any, name: str, *arrays: Any) -> Any:
        xla = partial(_by_xla, name, self.problem)
        if self.implementation == "xla":
            return xla(*arrays)
        kernel = _differentiable_once(kernel)
        if not self.chosen:
            return kernel(*arrays)
        platform = {"tpu": "tpu", "gpu": "cuda"}[PLATFORMS[self.implementation]]
        return jax.lax.platform_dependent(*arrays, default=xla, **{platform: kernel})

    def _forward(self, *arrays: Any) -> Any:
        module = _module(self.implementation)
        return self._split(lambda *x: module.forward(*x, self.problem), "qqqwb", "qs", arrays)

    def _backward(self, *arrays: Any) -> Any:
        batch, _ = self._axes

        def local(*arrays: Any) -> Any:
            *of_tokens, dweight, dbias = _module(self.implementation).backward(*arrays, self.problem)
            if dweight is not None and batch:
                dweight, dbias = jax.lax.psum((dweight, dbias), batch)
            return *of_tokens, dweight, dbias

        return self._split(local, "qqqwsq", "qqqwb", arrays)

    @property
    def _axes(self) -> tuple[Any, Any]:
        return (*(self.shards or ()), None, None)[:2]

    def _split(self, kernel: Any, given: str, returned: str, arrays: Any) -> Any:
        """`kernel` on each device's part of batch and heads: a compiled kernel cannot be partitioned by XLA."""
        if not self.shards:
            return kernel(*arrays)
        batch, head = self._axes
        of_tokens = PartitionSpec(batch, None, head) if self.problem.layout == "bnhd" else PartitionSpec(batch, head)
        by_head, quadratic = PartitionSpec(batch, head), self.problem.order == "quadratic"
        known: Any = (by_head, by_head, by_head, PartitionSpec(batch, None, head))
        specs: dict[str, Any] = {
            "q": of_tokens,
            "w": PartitionSpec(None, None, head),
            "b": PartitionSpec(head),
            "s": PartitionSpec() if quadratic else Residuals(*known),
        }
        # No residual varies over an axis it is not split over, but that is not the kernels' to prove.
        return jax.shard_map(kernel, in_specs=tuple(map(specs.get, given)), out_specs=tuple(map(specs.get, returned)), check_vma=False)(
            *arrays
        )


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array | None, bias: jax.Array | None, run: _Run) -> jax.Array:
    return _forward(q, k, v, weight, bias, run)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array | None, bias: jax.Array | None, run: _Run
) -> tuple[jax.Array, Any]:
    # Named for `jax.checkpoint` policies: saving state and result spares the backward pass the whole forward one.
    q, k, v = (checkpoint_name(x, f"lin_attn_{name}") for x, name in zip((q, k, v), "qkv", strict=True))
    out, known = run.forward(q, k, v, weight, bias)
    known = checkpoint_name(known, "lin_attn_state")
    return checkpoint_name(out, "lin_attn_out"), (q, k, v, weight, bias, known)


def _backward(run: _Run, residuals: Any, grad: jax.Array) -> Any:
    q, k, v, weight, bias, known = residuals
    dq, dk, dv, dweight, dbias = run.backward(q, k, v, weight, known, grad)
    return dq, dk, dv, None if weight is None else rounded(dweight, weight), None if bias is None else rounded(dbias, bias)


_attend.defvjp(_forward, _backward)


def _differentiable_once(kernel: Callable[..., Any]) -> Callable[..., Any]:
    called = jax.custom_jvp(kernel)

    @called.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError("a kernel of linear attention is differentiated once; second derivatives are with implementation='xla'")

    return called


def _by_xla(name: str, problem: Problem, *arrays: Any) -> Any:
    return getattr(_module("xla"), name)(*arrays, problem)


def _module(implementation: str) -> Any:
    return import_module(f"lit_jax.kernels.{implementation}")
