"""Few-head linear attention with a depthwise branch on the values (LiT §3.1; FLatten), forward and gradient in closed
form.

Per head, with phi(x) = ReLU(x) + feature_offset and means over the N tokens,

    out = phi(q) mean(phi(k) v^T) / (phi(q) . mean(phi(k)) + eps) + depthwise(v)

The code computes the same function with centred keys and values. So the large rank-one part of the state, which must
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
from jaxtyping import Array, Float

from heirloom.common.errors import InputError
from heirloom.common.nn.precision import rounded
from lit_jax.kernels import PLATFORMS, FeatureMap, Layout, Order, Problem, Residuals, choice
from lit_jax.kernels.xla import check_branch, depthwise

__all__ = ["depthwise", "linear_attention"]

Implementation = Literal["xla", "mosaic_tpu", "mosaic_gpu", "reference"]
QUADRATIC_UP_TO = 256  # tokens: below this the N x N order does less work and has no state


class Unsupported(InputError, ValueError):
    """The kernel that was selected by name does not support these arrays."""


def linear_attention(
    q: Float[Array, "batch token head head_dim"],
    k: Float[Array, "batch token head head_dim"],
    v: Float[Array, "batch token head head_dim"],
    *,
    eps: float = 1e-6,
    feature_offset: float = 1e-6,
    conv_weight: Float[Array, "row col channel"] | None = None,
    conv_bias: Float[Array, " channel"] | None = None,
    grid: tuple[int, int] | None = None,
    feature_map: FeatureMap = "relu",
    implementation: Implementation | None = None,
    order: Order | None = None,
    layout: Layout = "bnhd",
    shards: PartitionSpec | None = None,
) -> Float[Array, "batch token head head_dim"]:
    """Compute non-causal linear attention of every head, plus the depthwise convolution of the values.

    q, k, v: [batch, token, head, head_dim] (or [batch, head, head_dim, token] with layout "bhdn"), any float dtype; the
    result has the same shape and dtype. eps, feature_offset: constants added to the normaliser and to the features.
    conv_weight: [rows, cols, head * head_dim], odd sizes, zero padding; conv_bias: [head * head_dim]. The tokens are
    images of `grid` = (height, width) in raster order; None: square. The caller tiles a bank that the heads share.
    feature_map: "relu" applies phi; "none" takes q and k as features, to which only the offset is added.
    implementation: "xla" accumulates in f32 whatever the dtype, with a closed-form gradient, and runs everywhere;
    "mosaic_tpu" and "mosaic_gpu" (for Hopper) are kernels for bfloat16, differentiable once, which are fastest with
    layout "bhdn" and "bnhd"; "reference" is the definition in f32 (f64 for f64 input), differentiated by JAX. None: the
    kernel for this device if it was measured on this kind of device, else "xla". order: "linear" builds the head_dim x
    head_dim state, "quadratic" the token x token weights; None chooses by the number of tokens. Both are the same
    function. shards: mesh axes (of `jax.set_mesh`) over which batch and head are split, for a kernel inside a jit over
    several devices; XLA partitions its own code without them. For `jax.checkpoint` policies q, k, v are named
    `lin_attn_q`, ..., the sums over tokens `lin_attn_state`, the result `lin_attn_out`. Raises ValueError for shapes
    that do not fit, `Unsupported` if the named kernel does not support them.
    """
    if not (q.ndim == 4 and q.shape == k.shape == v.shape):
        raise ValueError(
            f"q, k, v must be of one shape [batch, token, head, head_dim], got {q.shape}, {k.shape}, {v.shape}"
        )
    _, tokens, heads, head_dim = q.shape if layout == "bnhd" else (q.shape[0], q.shape[3], *q.shape[1:3])
    if conv_weight is not None:
        grid = check_branch(conv_weight, grid, tokens, heads * head_dim)
    order = order or ("quadratic" if tokens <= QUADRATIC_UP_TO else "linear")
    problem = Problem(eps=eps, offset=feature_offset, feature_map=feature_map, order=order, layout=layout, grid=grid)
    if implementation == "reference":
        return _reference(q, k, v, conv_weight, conv_bias, problem)

    window = None if conv_weight is None else conv_weight.shape[:2]
    picked = implementation or choice().implementation
    if reason := _module(picked).unsupported_reason(problem, head_dim, tokens, v.dtype, window):
        if implementation:
            raise Unsupported(f"linear attention by {implementation}: {reason}; or use implementation xla")
        picked = "xla"
    if picked == "mosaic_gpu" and feature_map == "relu":
        q, k = _rectified(q), _rectified(k)
    run = _Run(problem=problem, implementation=picked, automatic=implementation is None, shards=shards)
    return _attend(q, k, v, conv_weight, conv_bias, run)


@jax.custom_vjp
def _rectified(x: jax.Array) -> jax.Array:
    """ReLU fused by XLA into the projection. Its gradient is the identity: attention's gradient is already masked."""
    return jnp.maximum(x, 0)


_rectified.defvjp(lambda x: (jnp.maximum(x, 0), None), lambda _, grad: (grad,))


def _reference(
    q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array | None, bias: jax.Array | None, problem: Problem
) -> jax.Array:
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
    """How a call is computed. automatic: the kernel was chosen for this device, so lowering for another platform uses
    XLA instead.
    """

    problem: Problem
    implementation: str
    automatic: bool
    shards: PartitionSpec | None

    def forward(self, *arrays: Any) -> Any:
        """Return out, residuals."""
        return self._on_platform(self._forward, "forward", *arrays)

    def backward(self, *arrays: Any) -> Any:
        """Return dq, dk, dv, dweight, dbias."""
        return self._on_platform(self._backward, "backward", *arrays)

    def _on_platform(self, kernel: Any, name: str, *arrays: Any) -> Any:
        xla = partial(_by_xla, name, self.problem)
        if self.implementation == "xla":
            return xla(*arrays)
        kernel = _differentiable_once(kernel)
        if not self.automatic:
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

    def _split(self, kernel: Any, inputs: str, outputs: str, arrays: Any) -> Any:
        """Run `kernel` on each device's part of batch and heads, because XLA cannot partition a compiled kernel.

        inputs, outputs: a letter for the sharding of each array: q tokens, w conv_weight, b conv_bias, s residuals.
        """
        if not self.shards:
            return kernel(*arrays)
        batch, head = self._axes
        of_tokens = PartitionSpec(batch, None, head) if self.problem.layout == "bnhd" else PartitionSpec(batch, head)
        by_head, quadratic = PartitionSpec(batch, head), self.problem.order == "quadratic"
        residuals: Any = (by_head, by_head, by_head, PartitionSpec(batch, None, head))
        specs: dict[str, Any] = {
            "q": of_tokens,
            "w": PartitionSpec(None, None, head),
            "b": PartitionSpec(head),
            "s": PartitionSpec() if quadratic else Residuals(*residuals),
        }
        # No residual varies over an axis that it is not split over, but the kernels cannot prove that.
        return jax.shard_map(
            kernel, in_specs=tuple(map(specs.get, inputs)), out_specs=tuple(map(specs.get, outputs)), check_vma=False
        )(*arrays)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array | None, bias: jax.Array | None, run: _Run
) -> jax.Array:
    return _forward(q, k, v, weight, bias, run)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array | None, bias: jax.Array | None, run: _Run
) -> tuple[jax.Array, Any]:
    # Names for `jax.checkpoint` policies: with state and result saved, the backward pass needs no second forward pass.
    q, k, v = (checkpoint_name(x, f"lin_attn_{name}") for x, name in zip((q, k, v), "qkv", strict=True))
    out, residuals = run.forward(q, k, v, weight, bias)
    residuals = checkpoint_name(residuals, "lin_attn_state")
    return checkpoint_name(out, "lin_attn_out"), (q, k, v, weight, bias, residuals)


def _backward(run: _Run, saved: Any, grad: jax.Array) -> Any:
    q, k, v, weight, bias, residuals = saved
    dq, dk, dv, dweight, dbias = run.backward(q, k, v, weight, residuals, grad)
    return (
        dq,
        dk,
        dv,
        None if weight is None else rounded(dweight, weight),
        None if bias is None else rounded(dbias, bias),
    )


_attend.defvjp(_forward, _backward)


def _differentiable_once(kernel: Callable[..., Any]) -> Callable[..., Any]:
    called = jax.custom_jvp(kernel)

    @called.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            "kernels of linear attention can be differentiated once; use implementation='xla' for second derivatives"
        )

    return called


def _by_xla(name: str, problem: Problem, *arrays: Any) -> Any:
    return getattr(_module("xla"), name)(*arrays, problem)


def _module(implementation: str) -> Any:
    return import_module(f"lit_jax.kernels.{implementation}")
