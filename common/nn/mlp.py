"""The two-layer perceptron of a transformer block."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
from flax import nnx

from heirloom.common.errors import InputError, nearest
from heirloom.common.nn import for_cpus
from heirloom.common.nn.dense import Dense, Init, Sizes, uniform_fan_in
from heirloom.common.nn.norm import LayerNorm

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), the GELU of OpenAI's CLIP weights."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x), exact."""
    return for_cpus.on_cpus(for_cpus.gelu, partial(jax.nn.gelu, approximate=False), x)


ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": quick_gelu,
    "silu": jax.nn.silu,
}
# The names of transformers (`hidden_act`); the last name of an activation is the one that is written.
HF_ACTIVATIONS: dict[str, Activation] = {
    "gelu_python": "gelu",
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
    "silu": "silu",
}
HF_NAMES: dict[Activation, str] = {ours: theirs for theirs, ours in HF_ACTIVATIONS.items()}


def check_activation(name: str) -> None:
    """Raise InputError for an activation that does not exist."""
    if name not in ACTIVATIONS:
        raise InputError(f"no activation {name!r}{nearest(name, ACTIVATIONS)} ({', '.join(ACTIVATIONS)})")


class Mlp(nnx.Module):
    """embed -> hidden -> embed. `x` is [..., embed]; returns the same shape.

    gated: multiply the activated units with as many linear ones; with SiLU this is SwiGLU (arXiv 2002.05202). norm_eps:
    of a LayerNorm of the hidden units; None: no norm.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        activation: Activation,
        up: Init,
        down: Init,
        bias: Init = uniform_fan_in,
        gated: bool = False,
        norm_eps: float | None = None,
        rngs: nnx.Rngs,
    ):
        self.gate = Dense("embed -> hidden", sizes, init=up, bias=bias, rngs=rngs) if gated else None
        self.up = Dense("embed -> hidden", sizes, init=up, bias=bias, rngs=rngs)
        self.inner_norm = LayerNorm(sizes, eps=norm_eps, axes="hidden", rngs=rngs) if norm_eps else None
        self.down = Dense("hidden -> embed", sizes, init=down, bias=bias, rngs=rngs)
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.activation(self.up(x)) if self.gate is None else self.activation(self.gate(x)) * self.up(x)
        return self.down(y if self.inner_norm is None else self.inner_norm(y))
