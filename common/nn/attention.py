"""Multi-head attention; the function that mixes tokens is an argument."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
from flax import nnx

from heirloom.common.nn.dense import Dense, Init, Sizes, uniform_fan_in, xavier_uniform, zeros

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`attend(query, key, value)`: all three and the result are [batch, token, head, head_dim]."""
Kernel = Literal["xla", "cudnn"]
PACKED = xavier_uniform(packed=3)


def softmax(*, causal: bool = False, kernel: Kernel = "xla") -> Attend:
    """Returns scaled dot-product attention. kernel: "cudnn" is the flash kernel of NVIDIA GPUs (bf16)."""
    return partial(jax.nn.dot_product_attention, is_causal=causal, implementation=kernel)


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
