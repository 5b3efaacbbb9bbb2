"""`implementation="mosaic_tpu"`: the kernels of `tpu` and `tpu_depthwise`. Token-major arrays are transposed."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lit_jax.kernels import HEADS, Problem, Residuals, merge, tpu, tpu_depthwise

WINDOW = (
    5,
    5,
)  # rows and columns of the filters that were compiled; shifted copies for larger ones do not always fit into VMEM


def unsupported_reason(
    problem: Problem, head_dim: int, tokens: int, dtype: DTypeLike, window: tuple[int, int] | None
) -> str | None:
    if dtype != jnp.bfloat16:
        return f"it computes in bfloat16, the arrays are {jnp.dtype(dtype)}"
    if head_dim not in HEADS:
        return f"head_dim must be one of {', '.join(map(str, HEADS))}, not {head_dim}"
    if problem.order == "quadratic" and tokens > tpu.QUADRATIC:
        return f"its quadratic order supports up to {tpu.QUADRATIC} tokens, not {tokens}"
    if window and window != WINDOW:
        return f"its depthwise branch supports filters of 5 x 5, not {window[0]} x {window[1]}"
    if window and tokens > tpu_depthwise.MOST:
        return f"its depthwise branch supports up to {tpu_depthwise.MOST} tokens, not {tokens}"
    return None


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array | None, bias: jax.Array | None, problem: Problem
) -> tuple[jax.Array, Residuals | None]:
    q, k, v = (_head_major(x, problem) for x in (q, k, v))
    residuals = None
    if problem.order == "quadratic":
        out = tpu.forward_quadratic(merge(q), merge(k), merge(v), problem.terms)
    else:
        out, *rest = tpu.forward(merge(q), merge(k), merge(v), problem.terms)
        state, key, value, normaliser = (x.reshape(*v.shape[:2], *x.shape[1:]).swapaxes(0, 1) for x in rest)
        residuals = Residuals(
            state=state, key=key[:, :, 0], value=value[:, :, 0], normaliser=jnp.moveaxis(normaliser[:, :, 0], 1, 2)
        )
    out = out.reshape(v.shape)
    if weight is not None:
        out = tpu_depthwise.depthwise(v, weight, bias, out, problem.grid or (1, v.shape[-1]))
    return _as_given(out, problem), residuals


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weight: jax.Array | None,
    residuals: Residuals | None,
    grad: jax.Array,
    problem: Problem,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    q, k, v, grad = (_head_major(x, problem) for x in (q, k, v, grad))
    if residuals is None:
        found = tpu.backward_quadratic(merge(q), merge(k), merge(v), merge(grad), problem.terms)
    else:
        state, key, value, normaliser = (
            merge(x.swapaxes(0, 1)) for x in (*residuals[:3], jnp.moveaxis(residuals.normaliser, 2, 1))
        )
        rest = tpu.Forward(
            out=merge(v), state=state, key=key[:, None], value=value[:, None], normaliser=normaliser[:, None]
        )
        found = tpu.backward(merge(q), merge(k), merge(v), rest, merge(grad), problem.terms)
    dq, dk, dv = (x.reshape(v.shape) for x in found)
    dweight = dbias = None
    if weight is not None:
        dv, dweight, dbias = tpu_depthwise.depthwise_gradients(v, weight, grad, dv, problem.grid or (1, v.shape[-1]))
    return _as_given(dq, problem), _as_given(dk, problem), _as_given(dv, problem), dweight, dbias


def _head_major(x: jax.Array, problem: Problem) -> jax.Array:
    """Transpose to [head, batch, head_dim, token], the order in which XLA's matmul writes a feature-major projection:
    no copy there.
    """
    return jnp.transpose(x, (1, 0, 2, 3) if problem.layout == "bhdn" else (2, 0, 3, 1))


def _as_given(x: jax.Array, problem: Problem) -> jax.Array:
    return jnp.transpose(x, (1, 0, 2, 3) if problem.layout == "bhdn" else (1, 3, 0, 2))
