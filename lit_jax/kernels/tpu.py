"""Few-head linear attention on TPUs (Mosaic), in bfloat16 with tokens along the lanes: [batch * head, head_dim, token].

Means over tokens are rows, f32 [batch * head, 1, ...], because a column of one lane would be padded 128 times in
memory. The formulas are those of `lit_jax.linear_attention`; sums and elementwise operations are f32.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lit_jax.kernels import Terms

BLOCKS = (512, 384, 256, 128)  # tokens at a time; if none divides the tokens, they are padded, which copies them
QUADRATIC = 512  # tokens: up to here the token x token weights of a head stay in VMEM


class Forward(NamedTuple):
    """out: like v. state: [batch * head, head_dim, head_dim] bf16, keys and values centred. The others are f32 rows."""

    out: jax.Array
    state: jax.Array
    key: jax.Array
    value: jax.Array
    normaliser: jax.Array


class Gradients(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array


def forward(q: jax.Array, k: jax.Array, v: jax.Array, terms: Terms) -> Forward:
    """Compute the linear order in two passes over the tokens: first state and means, kept in VMEM, then the outputs."""
    heads, d, tokens = q.shape
    q, k, v = map(_pad, (q, k, v))
    n = q.shape[2]
    size = _block(n)
    steps = n // size
    # The index of a block that a phase does not use stays constant, so that nothing is copied twice.
    late = pl.BlockSpec((None, d, size), lambda h, phase, i: (h, 0, i * phase))
    early = pl.BlockSpec((None, d, size), lambda h, phase, i: (h, 0, i * (1 - phase) + (steps - 1) * phase))
    row = pl.BlockSpec((None, 1, d), lambda h, phase, i: (h, 0, 0))
    state = jax.ShapeDtypeStruct((heads, d, d), q.dtype)
    out, mixed, key, value, normaliser = pl.pallas_call(
        partial(_forward, terms, tokens),
        grid=(heads, 2, steps),
        in_specs=[late, early, early],
        out_specs=[
            late,
            pl.BlockSpec((None, d, d), lambda h, phase, i: (h, 0, 0)),
            row,
            row,
            pl.BlockSpec((None, 1, size), lambda h, phase, i: (h, 0, i * phase)),
        ],
        out_shape=[_like(v), state, *(jax.ShapeDtypeStruct((heads, 1, m), jnp.float32) for m in (d, d, n))],
        scratch_shapes=[
            pltpu.VMEM((d, d), jnp.float32),
            pltpu.VMEM((d, d), q.dtype),
            *[pltpu.VMEM((d, 1), jnp.float32)] * 2,
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        name="linear_attention_forward",
    )(q, k, v)
    return Forward(out=out[..., :tokens], state=mixed, key=key, value=value, normaliser=normaliser[..., :tokens])


def backward(q: jax.Array, k: jax.Array, v: jax.Array, residuals: Forward, grad: jax.Array, terms: Terms) -> Gradients:
    """Compute the gradient of the linear order: a kernel over queries also sums the state's gradient, then one over
    keys and values.
    """
    dq, dstate, shift = query_gradient(q, residuals, grad, terms)
    return Gradients(dq, *key_value_gradients(k, v, dstate, shift, terms))


def query_gradient(
    q: jax.Array, residuals: Forward, grad: jax.Array, terms: Terms
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute dq, the state's gradient rounded to bf16, and the shift of every key's gradient, [batch * head, 1,
    head_dim] f32.
    """
    n = q.shape[2]
    q, grad, normaliser = _pad(q), _pad(grad), _pad(residuals.normaliser, 1)
    heads, d, padded = q.shape
    size = _block(padded)
    tokens = pl.BlockSpec((None, d, size), lambda h, i: (h, 0, i))
    state = pl.BlockSpec((None, d, d), lambda h, i: (h, 0, 0))
    row = pl.BlockSpec((None, 1, d), lambda h, i: (h, 0, 0))
    dq, dstate, shift = pl.pallas_call(
        partial(_query_gradient, terms),
        grid=(heads, padded // size),
        in_specs=[tokens, tokens, state, row, row, pl.BlockSpec((None, 1, size), lambda h, i: (h, 0, i))],
        out_specs=[tokens, state, row],
        out_shape=[_like(q), _like(residuals.state), _like(residuals.key)],
        scratch_shapes=[pltpu.VMEM((d, d), jnp.float32), *[pltpu.VMEM((d, 1), jnp.float32)] * 3],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="linear_attention_query_gradient",
    )(q, grad, residuals.state, residuals.key, residuals.value, normaliser)
    return dq[..., :n], dstate, shift


def key_value_gradients(
    k: jax.Array, v: jax.Array, dstate: jax.Array, shift: jax.Array, terms: Terms
) -> tuple[jax.Array, jax.Array]:
    """Compute dk and dv from the state's gradient, which is a sum over the tokens: it is divided by their number
    here.
    """
    n = k.shape[2]
    k, v = _pad(k), _pad(v)
    heads, d, padded = k.shape
    size = _block(padded)
    tokens = pl.BlockSpec((None, d, size), lambda h, i: (h, 0, i))
    dk, dv = pl.pallas_call(
        partial(_key_value_gradients, terms, n),
        grid=(heads, padded // size),
        in_specs=[
            tokens,
            tokens,
            pl.BlockSpec((None, d, d), lambda h, i: (h, 0, 0)),
            pl.BlockSpec((None, 1, d), lambda h, i: (h, 0, 0)),
        ],
        out_specs=[tokens, tokens],
        out_shape=[_like(k), _like(v)],
        scratch_shapes=[pltpu.VMEM((d, d), k.dtype), *[pltpu.VMEM((d, 1), jnp.float32)] * 2],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="linear_attention_key_value_gradients",
    )(k, v, dstate, shift)
    return dk[..., :n], dv[..., :n]


def forward_quadratic(q: jax.Array, k: jax.Array, v: jax.Array, terms: Terms) -> jax.Array:
    """Compute the quadratic order, a whole head at a time."""
    (out,) = _by_head(partial(_forward_quadratic, terms), "quadratic_attention_forward", (q, k, v), (v,))
    return out


def backward_quadratic(q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array, terms: Terms) -> Gradients:
    """Compute the gradient of the quadratic order in one kernel, which recomputes the weights."""
    return Gradients(
        *_by_head(partial(_backward_quadratic, terms), "quadratic_attention_backward", (q, k, v, grad), (q, k, v))
    )


def _by_head(
    kernel: Any, name: str, operands: tuple[jax.Array, ...], results: tuple[jax.Array, ...]
) -> list[jax.Array]:
    whole = pl.BlockSpec((None, *operands[0].shape[1:]), lambda h: (h, 0, 0))
    return pl.pallas_call(
        kernel,
        grid=operands[0].shape[:1],
        in_specs=[whole] * len(operands),
        out_specs=[whole] * len(results),
        out_shape=[_like(x) for x in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name=name,
    )(*operands)


def _forward(
    terms: Terms, n: int, q: Any, k: Any, v: Any, out: Any, state: Any, key: Any, value: Any, normaliser: Any,
    products: Any, turned: Any, keys: Any, values: Any,
) -> None:  # fmt: skip
    phase, i = pl.program_id(1), pl.program_id(2)

    @pl.when(phase == 0)
    def _() -> None:
        @pl.when(i == 0)
        def _() -> None:
            for total in (products, keys, values):
                total[...] = jnp.zeros(total.shape, total.dtype)

        features = _map(k[...], terms)
        products[...] += _dot(features, v[...], 1, 1)
        keys[...] += _wide(features).sum(1, keepdims=True)
        values[...] += _wide(v[...]).sum(1, keepdims=True)

        @pl.when(i == pl.num_programs(2) - 1)
        def _() -> None:
            values[...] /= n
            mean_value = _row(values[...])
            centred = products[...] / n - keys[...] / n * mean_value
            keys[...] = keys[...] / n + terms.offset
            state[...] = centred.astype(state.dtype)
            turned[...] = centred.T.astype(turned.dtype)
            key[...], value[...] = _row(keys[...]), mean_value

    @pl.when(phase == 1)
    def _() -> None:
        features = _wide(_map(q[...], terms)) + terms.offset
        z = (features * keys[...]).sum(0, keepdims=True) + terms.eps
        normaliser[...] = z
        query = (features / z).astype(q.dtype)
        out[...] = (_dot(turned[...], query, 1, 0) + values[...] * (1 - terms.eps / z)).astype(out.dtype)


def _query_gradient(
    terms: Terms, q: Any, grad: Any, state: Any, key: Any, value: Any, normaliser: Any, dq: Any, dstate: Any,
    shift: Any,
    products: Any, keys: Any, values: Any, along_queries: Any,
) -> None:  # fmt: skip
    i = pl.program_id(1)

    @pl.when(i == 0)
    def _() -> None:
        products[...] = jnp.zeros(products.shape, products.dtype)
        along_queries[...] = jnp.zeros(along_queries.shape, along_queries.dtype)
        keys[...], values[...] = _column(key[...]), _column(value[...])

    z = normaliser[...]
    query = ((_wide(_map(q[...], terms)) + terms.offset) / z).astype(q.dtype)
    back = _dot(state[...], grad[...], 1, 0)
    common = (_wide(grad[...]) * values[...]).sum(0, keepdims=True)
    along = (back * _wide(query)).sum(0, keepdims=True) - terms.eps / z * common
    dq[...] = _mask((back - keys[...] * along) / z, q[...], terms).astype(dq.dtype)
    products[...] += _dot(query, grad[...], 1, 1)
    along_queries[...] += (_wide(query) * along).sum(1, keepdims=True)

    @pl.when(i == pl.num_programs(1) - 1)
    def _() -> None:
        rounded = products[...].astype(dstate.dtype)
        dstate[...] = rounded
        # Both terms of dk use the rounded gradient of the state, so that their large parts cancel exactly.
        shift[...] = _row(along_queries[...] + (_wide(rounded) * value[...]).sum(1, keepdims=True))


def _key_value_gradients(
    terms: Terms, n: int, k: Any, v: Any, dstate: Any, shift: Any, dk: Any, dv: Any, turned: Any, shifts: Any, sums: Any
) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        wide = _wide(dstate[...])
        turned[...] = wide.T.astype(turned.dtype)
        shifts[...] = _column(shift[...])
        sums[...] = _column(wide.sum(0, keepdims=True)) * terms.offset

    dk[...] = _mask((_dot(dstate[...], v[...], 1, 0) - shifts[...]) / n, k[...], terms).astype(dk.dtype)
    dv[...] = ((_dot(turned[...], _map(k[...], terms), 1, 0) + sums[...]) / n).astype(dv.dtype)


def _forward_quadratic(terms: Terms, q: Any, k: Any, v: Any, out: Any) -> None:
    scores = _scores(_map(q[...], terms), _map(k[...], terms), terms)
    weights = scores / (scores.sum(0, keepdims=True) + terms.eps)
    out[...] = _dot(v[...], weights.astype(v.dtype), 1, 0).astype(out.dtype)


def _backward_quadratic(terms: Terms, q: Any, k: Any, v: Any, grad: Any, dq: Any, dk: Any, dv: Any) -> None:
    features, n = (_map(q[...], terms), _map(k[...], terms)), q.shape[1]
    scores = _scores(*features, terms)
    z = scores.sum(0, keepdims=True) + terms.eps
    weights = (scores / z).astype(q.dtype)
    # A value common to all tokens reaches the scores through eps alone: it is subtracted here, as in the linear order.
    mean_value = _wide(v[...]).sum(1, keepdims=True) / n
    common = (_wide(grad[...]) * mean_value).sum(0, keepdims=True)
    dweights = _dot(v[...], grad[...], 0, 0) - common
    along = (dweights * _wide(weights)).sum(0, keepdims=True) - common * terms.eps / z
    dscores = (dweights - along) / z
    query_sums, key_sums = dscores.sum(0, keepdims=True), _row(dscores.sum(1, keepdims=True))
    dscores = dscores.astype(q.dtype)
    dq[...] = _mask((_dot(features[1], dscores, 1, 0) + terms.offset * query_sums) / n, q[...], terms).astype(dq.dtype)
    dk[...] = _mask((_dot(features[0], dscores, 1, 1) + terms.offset * key_sums) / n, k[...], terms).astype(dk.dtype)
    dv[...] = _dot(grad[...], weights, 1, 1).astype(dv.dtype)


def _scores(q: jax.Array, k: jax.Array, terms: Terms) -> jax.Array:
    """Compute scores [key, query] f32 of features [head_dim, token]; the offset is added here, in f32."""
    scores = _dot(k, q, 0, 0)
    if terms.offset:
        queries, keys = (_wide(x).sum(0, keepdims=True) for x in (q, k))
        scores = scores + terms.offset * (queries + _column(keys) + q.shape[0] * terms.offset)
    return scores / q.shape[1]


def _dot(a: jax.Array, b: jax.Array, over: int, and_over: int) -> jax.Array:
    # The process default may be "highest", which Mosaic does not support for bfloat16, whose products are exact anyway.
    precision = jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (((over,), (and_over,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _map(x: jax.Array, terms: Terms) -> jax.Array:
    return jnp.maximum(x, 0) if terms.relu else x


def _mask(x: jax.Array, of: jax.Array, terms: Terms) -> jax.Array:
    return jnp.where(_wide(of) > 0, x, 0) if terms.relu else x


def _column(row: jax.Array) -> jax.Array:
    """[1, d] -> [d, 1] by a diagonal and a sum, which every chip supports for every d."""
    return jnp.where(_diagonal(row.shape[1]), row, 0).sum(1, keepdims=True)


def _row(column: jax.Array) -> jax.Array:
    return jnp.where(_diagonal(column.shape[0]), column, 0).sum(0, keepdims=True)


def _diagonal(d: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (d, d), 0) == jax.lax.broadcasted_iota(jnp.int32, (d, d), 1)


def _block(tokens: int) -> int:
    return next(size for size in BLOCKS if tokens % size == 0)


def _pad(x: jax.Array, value: float = 0) -> jax.Array:
    """Pad the tokens to a multiple of the smallest block. Keys and values of zero change no sum."""
    missing = -x.shape[2] % BLOCKS[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, missing)), constant_values=value) if missing else x


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
