"""Multi-head attention; the function that mixes tokens is an argument."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from heirloom.common.nn.dense import Dense, Init, Sizes, uniform_fan_in, xavier_uniform, zeros

Attend = Callable[..., jax.Array]
"""`attend(query, key, value, mask)`: the first three and the result are [batch, token, head, head_dim].

mask: [batch, token of keys] bool, True for the keys that count; None: all of them.
"""
Kernel = Literal["xla", "cudnn"]
PACKED = xavier_uniform(packed=3)


def softmax(*, causal: bool = False, kernel: Kernel = "xla") -> Attend:
    """Returns scaled dot-product attention. kernel: "cudnn" is the flash kernel of NVIDIA GPUs (bf16).

    On CPUs many tokens are computed in blocks of queries: the weights of all pairs are never in memory.
    """

    def whole(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
        over_keys = None if mask is None else mask[:, None, None]
        return jax.nn.dot_product_attention(query, key, value, mask=over_keys, is_causal=causal, implementation=kernel)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        if causal or kernel != "xla" or query.shape[1] * key.shape[1] < PAIRS:
            return whole(query, key, value, mask)
        return jax.lax.platform_dependent(query, key, value, mask, cpu=blockwise, default=whole)

    return attend


PAIRS = 2**18  # of queries and keys: from here on blocks are faster on a CPU, by three times at 1,024 tokens
QUERIES, KEYS = 128, 4096  # of a block: its weights are 2 MB, about a core's cache


def blockwise(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Computes softmax attention head by head in blocks of queries and keys, in f32 (Rabe & Staats 2021).

    query, key, value, mask: as `Attend` takes them. The gradient computes each block again.
    """
    batch, tokens, heads, width = query.shape
    scale = width**-0.5
    chunk = min(KEYS, key.shape[1])
    dtype, query = query.dtype, query.astype(jnp.float32) * scale
    key, value = key.astype(jnp.float32), value.astype(jnp.float32)
    valid = jnp.ones((batch, key.shape[1]), bool) if mask is None else mask
    exact = mask is None and key.shape[1] % chunk == 0
    key, value, valid = (_padded(x, chunk) for x in (key, value, valid))

    @jax.checkpoint
    def block(queries: jax.Array, keys: jax.Array, values: jax.Array, valid: jax.Array) -> jax.Array:
        """queries: [query, width]; keys: [chunk, width, key]; values: [chunk, key, width]; valid: [chunk, key]."""

        def weights(keys: jax.Array, valid: jax.Array) -> jax.Array:
            logits = queries @ keys
            return logits if exact else jnp.where(valid, logits, MASKED)

        if len(keys) == 1:
            logits = weights(keys[0], valid[0])
            shares = jnp.exp(logits - logits.max(-1, keepdims=True))
            return (shares @ values[0]) / shares.sum(-1, keepdims=True)

        def add(carry: Sums, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Sums, None]:
            logits = weights(part[0], part[2])
            largest = jnp.maximum(carry.largest, logits.max(-1, keepdims=True))
            shares, before = jnp.exp(logits - largest), jnp.exp(carry.largest - largest)
            total = before * carry.total + shares.sum(-1, keepdims=True)
            return Sums(before * carry.out + shares @ part[1], total, largest), None

        rows = len(queries)
        start = Sums(jnp.zeros((rows, width)), jnp.zeros((rows, 1)), jnp.full((rows, 1), MASKED))
        found = jax.lax.scan(add, start, (keys, values, valid))[0]
        return found.out / found.total

    def head(parts: tuple[jax.Array, ...]) -> jax.Array:
        queries, *others = parts
        return jax.lax.map(lambda queries: block(queries, *others), queries)

    side = min(QUERIES, tokens)
    queries = jnp.moveaxis(_padded(query, side), 2, 1).reshape(batch * heads, -1, side, width)
    keys = jnp.transpose(key.reshape(batch, -1, chunk, heads, width), (0, 3, 1, 4, 2))
    values = jnp.transpose(value.reshape(batch, -1, chunk, heads, width), (0, 3, 1, 2, 4))
    valid = jnp.repeat(valid.reshape(batch, 1, -1, chunk), heads, axis=1)
    flat = (x.reshape(batch * heads, *x.shape[2:]) for x in (keys, values, valid))
    out = jax.lax.map(head, (queries, *flat)).reshape(batch, heads, -1, width)[:, :, :tokens]
    return jnp.moveaxis(out, 1, 2).astype(dtype)


MASKED = -1e30  # instead of minus infinity, whose differences are NaN


class Sums(NamedTuple):
    """Of one block of queries over the keys so far. out: [query, width]; total, largest: [query, 1]."""

    out: jax.Array
    total: jax.Array
    largest: jax.Array


def _padded(x: jax.Array, multiple: int) -> jax.Array:
    """Pads the tokens of [batch, token, ...] with zeros (False) to a multiple."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x


class Attention(nnx.Module):
    """Self-attention with biases on all four projections. `x` is [batch, token, embed]; returns the same shape."""

    def __init__(
        self,
        sizes: Sizes,
        *,
        attend: Attend,
        qkv: Init = PACKED,
        out: Init = uniform_fan_in,
        bias: Init = zeros,
        rngs: nnx.Rngs,
    ):
        self.query = Dense("embed -> head head_dim", sizes, init=qkv, bias=bias, rngs=rngs)
        self.key = Dense("embed -> head head_dim", sizes, init=qkv, bias=bias, rngs=rngs)
        self.value = Dense("embed -> head head_dim", sizes, init=qkv, bias=bias, rngs=rngs)
        self.out = Dense("head head_dim -> embed", sizes, init=out, bias=bias, rngs=rngs)
        self.attend = attend

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.attend(self.query(x), self.key(x), self.value(x)))


class CrossAttention(nnx.Module):
    """Attention from tokens [batch, token, embed] to a text whose keys and values are computed once by `read`."""

    def __init__(self, sizes: Sizes, *, attend: Attend, init: Init, out: Init, rngs: nnx.Rngs):
        self.query = Dense("embed -> head head_dim", sizes, init=init, rngs=rngs)
        self.key = Dense("embed -> head head_dim", sizes, init=init, rngs=rngs)
        self.value = Dense("embed -> head head_dim", sizes, init=init, rngs=rngs)
        self.out = Dense("head head_dim -> embed", sizes, init=out, rngs=rngs)
        self.attend = attend

    def read(self, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values, [batch, token, head, head_dim], of a text [batch, token, embed]."""
        return self.key(text), self.value(text)

    def __call__(self, x: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
        return self.out(self.attend(self.query(x), key, value, mask))
