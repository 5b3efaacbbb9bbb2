"""Multi-head attention; the function that mixes tokens is an argument."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx

from heirloom.common.nn.blockwise import blockwise, plain
from heirloom.common.nn.dense import Dense, Init, Sizes, uniform_fan_in, xavier_uniform, zeros
from heirloom.common.nn.for_cpus import attention, on_cpus, platform
from heirloom.common.nn.norm import LayerNorm

Attend = Callable[..., jax.Array]
"""`attend(query, key, value, mask=None)`: query and result are [batch, token, head, head_dim], key and value have as
many heads and any number of tokens. mask: see `softmax`.
"""
Kernel = Literal["xla", "cudnn"]
PACKED = xavier_uniform(packed=3)
# Queries x keys from which CPUs compute in blocks. Two cores (Zen 4), f32, heads of 72, time of the plain form / of
# blocks: 512 x 512 2.4, 1,024 x 300 2.2, 1,024 x 1,024 2.6, 4,096 x 4,096 3.0; with gradients 1.8, 2.0, 1.9, 1.7.
LONG = 2**18


def softmax(*, causal: bool = False, kernel: Kernel = "xla") -> Attend:
    """Returns scaled dot-product attention: `attend(query, key, value, mask=None)`.

    mask: [batch, key token], True where a key is seen; if an example has none, the result is the mean of its values.
    The others get a weight of exactly 0. kernel: "cudnn" is the flash kernel of NVIDIA GPUs (bf16). On CPUs the
    weights are computed again in the backward pass (`for_cpus.attention`), and the scores of long sequences are
    computed in blocks and never held as a whole (`blockwise`, reverse mode only).
    """

    return partial(_softmax, causal, kernel)


def _softmax(
    causal: bool, kernel: Kernel, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    if kernel != "xla":
        return plain(query, key, value, mask, causal, kernel)
    if query.shape[1] * key.shape[1] >= LONG and platform()[0] == "cpu":
        return blockwise(query, key, value, mask, causal)  # compiled for an accelerator, this is the plain form, too
    return on_cpus(partial(attention, causal), partial(plain, causal=causal), query, key, value, mask)


class Attention(nnx.Module):
    """Self-attention. `x` is [batch, token, embed]; returns the same shape.

    qkv_bias: whether queries, keys and values have biases. qk_eps: of LayerNorms of each head's queries and keys;
    norm_eps: of a LayerNorm of all heads' results before the last projection; None: no norms.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        attend: Attend,
        qkv: Init = PACKED,
        out: Init = uniform_fan_in,
        bias: Init = zeros,
        qkv_bias: bool = True,
        qk_eps: float | None = None,
        norm_eps: float | None = None,
        rngs: nnx.Rngs,
    ):
        inner: dict[str, Any] = dict(init=qkv, bias=bias if qkv_bias else None)
        self.query = Dense("embed -> head head_dim", sizes, **inner, rngs=rngs)
        self.key = Dense("embed -> head head_dim", sizes, **inner, rngs=rngs)
        self.value = Dense("embed -> head head_dim", sizes, **inner, rngs=rngs)
        self.query_norm = LayerNorm(sizes, eps=qk_eps, axes="head_dim", rngs=rngs) if qk_eps else None
        self.key_norm = LayerNorm(sizes, eps=qk_eps, axes="head_dim", rngs=rngs) if qk_eps else None
        self.inner_norm = LayerNorm(sizes, eps=norm_eps, axes="head head_dim", rngs=rngs) if norm_eps else None
        self.out = Dense("head head_dim -> embed", sizes, init=out, bias=bias, rngs=rngs)
        self.attend = attend

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key = self.query(x), self.key(x)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        y = self.attend(query, key, self.value(x))
        return self.out(y if self.inner_norm is None else self.inner_norm(y))


class KeyValue(NamedTuple):
    """What cross-attention reads: [batch, token, head, head_dim] both."""

    key: jax.Array
    value: jax.Array


class Memory(nnx.Module):
    """Makes the keys and values of cross-attention from another sequence [batch, token, embed].

    They are a module of their own because they depend on that sequence alone: a caller computes them once.
    """

    def __init__(self, sizes: Sizes, *, init: Init = PACKED, bias: Init = zeros, rngs: nnx.Rngs):
        self.key = Dense("embed -> head head_dim", sizes, init=init, bias=bias, rngs=rngs)
        self.value = Dense("embed -> head head_dim", sizes, init=init, bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> KeyValue:
        return KeyValue(self.key(x), self.value(x))


class CrossAttention(nnx.Module):
    """Attention of `x` [batch, token, embed] to the keys and values of a `Memory`; returns the shape of `x`.

    mask: [batch, key token], True where a key is seen.
    """

    def __init__(self, sizes: Sizes, *, attend: Attend, query: Init, out: Init, bias: Init = zeros, rngs: nnx.Rngs):
        self.query = Dense("embed -> head head_dim", sizes, init=query, bias=bias, rngs=rngs)
        self.out = Dense("head head_dim -> embed", sizes, init=out, bias=bias, rngs=rngs)
        self.attend = attend

    def __call__(self, x: jax.Array, memory: KeyValue, mask: jax.Array | None = None) -> jax.Array:
        return self.out(self.attend(self.query(x), memory.key, memory.value, mask=mask))
