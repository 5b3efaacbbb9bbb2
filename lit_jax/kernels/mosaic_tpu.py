"""`implementation="mosaic_tpu"`: the kernels of `tpu` and `tpu_depthwise`. Token-major arrays are transposed."""

from typing import Any

import jax
import jax.numpy as jnp

from lit_jax.kernels import Known, Problem, merge, tpu, tpu_depthwise

LARGEST = 576  # head_dim: the state and its gradient have to fit into VMEM beside the tokens


def refuses(problem: Problem, head_dim: int, tokens: int, dtype: Any, window: tuple[int, int] | None) -> str | None:
    if dtype != jnp.bfloat16:
        return f"it computes in bfloat16, the arrays are {jnp.dtype(dtype)}"
    if head_dim % 32 or head_dim > LARGEST:
        return f"head_dim must be a multiple of 32 up to {LARGEST}, not {head_dim}"
    if problem.order == "quadratic" and tokens > tpu.QUADRATIC:
        return f"its quadratic order ends at {tpu.QUADRATIC} tokens, not {tokens}"
    if window and tokens > tpu_depthwise.MOST:
        return f"its depthwise branch ends at {tpu_depthwise.MOST} tokens, not {tokens}"
    return None


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array | None, bias: jax.Array | None, problem: Problem
) -> tuple[jax.Array, Known | None]:
    q, k, v = (_feature_major(x, problem) for x in (q, k, v))
    batch, heads, d, n = v.shape
    known = None
    if problem.order == "quadratic":
        out = tpu.forward_quadratic(merge(q), merge(k), merge(v), problem.terms)
    else:
        out, *rest = tpu.forward(merge(q), merge(k), merge(v), problem.terms)
        state, key, value, normaliser = (x.reshape(batch, heads, *x.shape[1:]) for x in rest)
        known = Known(state, key[:, :, 0], value[:, :, 0], jnp.moveaxis(normaliser[:, :, 0], 1, 2))
    if weight is not None:
        images = out.reshape(batch, heads * d, n)
        out = tpu_depthwise.depthwise(v.reshape(images.shape), weight, bias, images, problem.grid or (1, n))
    return _as_given(out.reshape(v.shape), problem), known


def backward(
    q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array | None, known: Known | None, grad: jax.Array, problem: Problem
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    q, k, v, grad = (_feature_major(x, problem) for x in (q, k, v, grad))
    batch, heads, d, n = v.shape
    if known is None:
        found = tpu.backward_quadratic(merge(q), merge(k), merge(v), merge(grad), problem.terms)
    else:
        key, value, normaliser = (merge(x)[:, None] for x in (known.key, known.value, jnp.moveaxis(known.normaliser, 2, 1)))
        rest = tpu.Forward(merge(v), merge(known.state), key, value, normaliser)
        found = tpu.backward(merge(q), merge(k), merge(v), rest, merge(grad), problem.terms)
    dv, dweight, dbias = found.value, None, None
    if weight is not None:
        images = (x.reshape(batch, heads * d, n) for x in (v, grad, dv))
        v, grad, dv = images
        dv, dweight, dbias = tpu_depthwise.depthwise_gradients(v, weight, grad, dv, problem.grid or (1, n))
    dq, dk, dv = (_as_given(x.reshape(batch, heads, d, n), problem) for x in (found.query, found.key, dv))
    return dq, dk, dv, dweight, dbias


def _feature_major(x: jax.Array, problem: Problem) -> jax.Array:
    return x if problem.layout == "bhdn" else jnp.transpose(x, (0, 2, 3, 1))


def _as_given(x: jax.Array, problem: Problem) -> jax.Array:
    return x if problem.layout == "bhdn" else jnp.transpose(x, (0, 3, 1, 2))
