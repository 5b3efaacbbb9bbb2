"""Softmax attention for CPUs, one block of scores at a time: memory grows with the tokens, not with their square.

The forward pass keeps a running maximum and sum of each query (online softmax, arXiv 1805.02867). The backward pass
computes the scores again from these two (FlashAttention, arXiv 2205.14135).
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from heirloom.common.nn.for_cpus import lowest

BLOCK = 1024  # queries, and keys, of a block of scores: 4 MiB in f32, fastest of 256 to 4096 where caches hold that


class Sums(NamedTuple):
    """Of each query, in blocks: the result, the maximum of its scores, and the sum of their exponentials."""

    out: jax.Array
    largest: jax.Array
    total: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, causal: bool) -> jax.Array:
    """Computes scaled dot-product attention as `plain` does, but never holds all scores; sums are f32 or wider.

    Shapes as in `plain`. A program for an accelerator that is compiled on a CPU uses `plain`. Reverse mode only.
    """
    return _forward(query, key, value, mask, causal)[0]


def plain(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    causal: bool,
    kernel: Literal["xla", "cudnn"] = "xla",
) -> jax.Array:
    """Computes scaled dot-product attention by `jax.nn`; returns the query's shape.

    query: [batch, query token, head, head_dim]; key, value: [batch, key token, head, head_dim]; mask: [batch, key
    token], True where a key is seen, or None.
    """
    mask = None if mask is None else mask[:, None, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal, implementation=kernel)


Given = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, causal: bool
) -> tuple[jax.Array, tuple[Given, Sums]]:
    def by_jax(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, Sums]:
        out = plain(query, key, value, mask, causal)
        wide = jnp.promote_types(out.dtype, jnp.float32)
        blocks = _blocks(out, _sizes(out.shape[1]), wide)
        return out, Sums(blocks, none := jnp.zeros((*blocks.shape[:-1], 1), wide), none)

    given = query, key, value, mask
    out, sums = jax.lax.platform_dependent(*given, cpu=partial(_forward_in_blocks, causal), default=by_jax)
    return out, (given, sums)


def _backward(causal: bool, saved: tuple[Given, Sums], grad: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    def by_jax(grad: jax.Array, given: Given, _: Sums) -> tuple[jax.Array, jax.Array, jax.Array]:
        return jax.vjp(lambda query, key, value: plain(query, key, value, given[3], causal), *given[:3])[1](grad)

    in_blocks = partial(_backward_in_blocks, causal)
    return *jax.lax.platform_dependent(grad, *saved, cpu=in_blocks, default=by_jax), None


blockwise.defvjp(_forward, _backward)


def _forward_in_blocks(
    causal: bool, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, Sums]:
    q, k, v = _in_blocks(query, key, value)

    def of_head(q: jax.Array, k: jax.Array, v: jax.Array, limits: jax.Array | None) -> Any:
        def of_rows(row: Any) -> Any:
            i, q = row

            def add(carry: Any, column: Any) -> tuple[Any, None]:
                largest, total, out = carry
                j, k, v, limits = column
                scores = _limited(_dot("qd,kd->qk", q, k), _limit(q, k, limits, i, j, causal))
                peak = jnp.maximum(largest, scores.max(-1, keepdims=True))
                weights, decay = jnp.exp(scores - peak), jnp.exp(largest - peak)
                total = total * decay + weights.sum(-1, keepdims=True)
                return (peak, total, out * decay + _dot("qk,kd->qd", weights, v)), None

            zeros = jnp.zeros((len(q), 1), q.dtype)
            first = zeros + jnp.finfo(q.dtype).min, zeros, jnp.zeros_like(q)
            (largest, total, out), _ = jax.lax.scan(add, first, (jnp.arange(len(k)), k, v, limits))
            return out / total, largest, total

        return jax.lax.map(of_rows, (jnp.arange(len(q)), q))

    sums = Sums(*_for_each_head(of_head, (q, k, v), _limits(key, mask, k.shape[2:4])))
    return _in_tokens(sums.out, query.shape[1], value.dtype), sums


def _backward_in_blocks(
    causal: bool, grad: jax.Array, given: Given, sums: Sums
) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value, mask = given
    q, k, v = _in_blocks(query, key, value)
    grad = _blocks(grad, q.shape[2:4], q.dtype) / sums.total
    along = (grad * sums.out).sum(-1, keepdims=True)

    def of_head(q: jax.Array, grad: jax.Array, along: jax.Array, largest: jax.Array, k: jax.Array, v: jax.Array,
                limits: jax.Array | None) -> Any:  # fmt: skip
        def of_columns(dq: jax.Array, column: Any) -> Any:
            j, k, v, limits = column
            across, values = k.T, v.T

            def add(carry: Any, row: Any) -> Any:
                dk, dv = carry
                i, q, grad, along, largest = row
                limit = _limit(q, k, limits, i, j, causal)
                # The weights times their sum, by which `grad` and `along` were divided.
                weights = jnp.exp(_limited(_dot("qd,dk->qk", q, across), limit) - largest)
                dscores = weights * (_dot("qd,dk->qk", grad, values) - along)
                if limit is not None:  # a query that sees no key weighs all alike, whatever their scores
                    dscores = jnp.where(limit < 0, 0, dscores)
                # [channel, key]: a block of scores is never transposed, which would take a third of the time.
                dk, dv = dk + _dot("dq,qk->dk", q.T, dscores), dv + _dot("dq,qk->dk", grad.T, weights)
                return (dk, dv), _dot("qk,kd->qd", dscores, k)

            rows = jnp.arange(len(q)), q, grad, along, largest
            found, through = jax.lax.scan(add, (jnp.zeros_like(across), jnp.zeros_like(values)), rows)
            return dq + through, jax.tree.map(jnp.transpose, found)

        dq, (dk, dv) = jax.lax.scan(of_columns, jnp.zeros_like(q), (jnp.arange(len(k)), k, v, limits))
        return dq * query.shape[-1] ** -0.5, dk, dv

    found = _for_each_head(of_head, (q, grad, along, sums.largest, k, v), _limits(key, mask, k.shape[2:4]))
    dq, dk, dv = (_in_tokens(x, of.shape[1], of.dtype) for x, of in zip(found, given[:3], strict=True))
    return dq, dk, dv


def _in_blocks(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the scaled queries, keys and values as [batch, head, block, token, head_dim], f32 or wider."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    rows, columns = _sizes(query.shape[1]), _sizes(key.shape[1])
    scaled = query.astype(wide) * query.shape[-1] ** -0.5
    return _blocks(scaled, rows, wide), _blocks(key, columns, wide), _blocks(value, columns, wide)


def _sizes(tokens: int) -> tuple[int, int]:
    """Returns the number of blocks and the tokens of each: blocks of one size, the last one padded."""
    count = -(-tokens // BLOCK)
    return count, -(-tokens // count)


def _blocks(x: jax.Array, sizes: tuple[int, ...], dtype: Any) -> jax.Array:
    """[batch, token, head, channel] to [batch, head, block, token, channel], padded with zeros."""
    batch, tokens, heads, channels = x.shape
    x = jnp.pad(x.astype(dtype), ((0, 0), (0, sizes[0] * sizes[1] - tokens), (0, 0), (0, 0)))
    return jnp.moveaxis(x.reshape(batch, *sizes, heads, channels), 3, 1)


def _in_tokens(x: jax.Array, tokens: int, dtype: Any) -> jax.Array:
    """The inverse of `_blocks`."""
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(len(x), -1, *x.shape[3:])[:, :tokens].astype(dtype)


def _limits(key: jax.Array, mask: jax.Array | None, sizes: tuple[int, ...]) -> jax.Array | None:
    """Returns what replaces the scores of keys that are not seen, [batch, block, token]; 0 for keys that are seen.

    None if all are. Padding gets -inf. A masked key gets a large number: where all keys are masked, the result is the
    mean of their values, as in JAX.
    """
    batch, tokens = key.shape[:2]
    padding = sizes[0] * sizes[1] - tokens
    if mask is None and not padding:
        return None
    wide = jnp.promote_types(key.dtype, jnp.float32)
    limits = jnp.zeros((batch, tokens), wide) if mask is None else jnp.where(mask, 0, lowest(wide))
    return jnp.pad(limits, ((0, 0), (0, padding)), constant_values=-jnp.inf).reshape(batch, *sizes)


def _limit(
    q: jax.Array, k: jax.Array, limits: jax.Array | None, i: jax.Array, j: jax.Array, causal: bool
) -> jax.Array | None:
    """Returns the limits of block (i, j) of the scores, broadcastable; None if there are none."""
    if not causal:
        return limits
    seen = i * len(q) + jnp.arange(len(q))[:, None] >= j * len(k) + jnp.arange(len(k))
    future = jnp.where(seen, 0, lowest(q.dtype))
    return future if limits is None else jnp.minimum(future, limits)


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Contracts two matrices. The batch dimension of one keeps checkpoint policies that save the dots of weights
    (`block.Remat`) from saving all scores.
    """
    a_axes, b_axes, axes = equation.replace("->", ",").split(",")
    return jnp.einsum(f"h{a_axes},h{b_axes}->h{axes}", a[None], b[None])[0]


def _limited(scores: jax.Array, limit: jax.Array | None) -> jax.Array:
    return scores if limit is None else jnp.where(limit < 0, limit, scores)


def _for_each_head(of_head: Any, arrays: tuple[jax.Array, ...], limits: jax.Array | None) -> Any:
    """Maps over batch and head, one at a time: a head's dots use all cores, and its keys stay in cache.

    arrays: [batch, head, ...]; limits: [batch, block, token].
    """
    lead = arrays[0].shape[:2]
    limits = None if limits is None else jnp.repeat(limits, lead[1], 0)
    # One loop, not one in another: an outer loop would copy its part of each array.
    heads = [x.reshape(-1, *x.shape[2:]) for x in arrays]
    found = jax.lax.map(lambda head: of_head(*head[0], head[1]), (heads, limits))
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)
