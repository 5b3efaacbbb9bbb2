"""The two-layer perceptron of a transformer block."""

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx

from heirloom.common.nn.dense import Dense, Init, Sizes, uniform_fan_in


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), the GELU of OpenAI's CLIP weights."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
}


class Mlp(nnx.Module):
    """embed -> hidden -> embed. `x` is [..., embed]; returns the same shape."""

    def __init__(self, sizes: Sizes, *, activation: str, up: Init, down: Init, bias: Init = uniform_fan_in, rngs: nnx.Rngs):
        self.up = Dense("embed -> hidden", sizes, init=up, bias=bias, rngs=rngs)
        self.down = Dense("hidden -> embed", sizes, init=down, bias=bias, rngs=rngs)
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.up(x)))
