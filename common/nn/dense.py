"""Parameters that name their axes, initialisers, and the linear layer. The names of the axes give the shape."""

from collections.abc import Callable, Mapping
from math import prod
from string import ascii_letters
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from heirloom.common.errors import InputError
from heirloom.common.nn.precision import add, product
from heirloom.common.surgery.axes import Axes

Sizes = Mapping[str, Any]
"""The size of each axis: an int, or a tuple of ints with the size in each layer of a stack, zero-padded to the largest.
"""
Init = Callable[[jax.Array, tuple[int, ...], int, int], jax.Array]
"""`init(key, shape, fan_in, fan_out)` returns f32 values. fan_in, fan_out: number of inputs and outputs of the layer.
"""


def zeros(key: jax.Array, shape: tuple[int, ...], fan_in: int, fan_out: int) -> jax.Array:
    return jnp.zeros(shape)


def ones(key: jax.Array, shape: tuple[int, ...], fan_in: int, fan_out: int) -> jax.Array:
    return jnp.ones(shape)


def constant(value: float) -> Init:
    return lambda key, shape, fan_in, fan_out: jnp.full(shape, value, jnp.float32)


def normal(std: float) -> Init:
    """N(0, std^2)."""
    return lambda key, shape, fan_in, fan_out: std * jax.random.normal(key, shape)


def uniform_fan_in(key: jax.Array, shape: tuple[int, ...], fan_in: int, fan_out: int) -> jax.Array:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch's default for linear and convolution, weights and biases alike."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def xavier_uniform(packed: int = 1) -> Init:
    """U(-b, b), b = sqrt(6 / (fan_in + packed * fan_out)). `packed=3`: torch initialises q, k and v as one matrix."""

    def init(key: jax.Array, shape: tuple[int, ...], fan_in: int, fan_out: int) -> jax.Array:
        bound = (6 / (fan_in + packed * fan_out)) ** 0.5
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    return init


def param(axes: str, sizes: Sizes, init: Init, rngs: nnx.Rngs, *, fan_in: int | None = None) -> nnx.Param:
    """Creates a parameter; its shape is the sizes of its axes. fan_in: replaces the one of the axes (for a bias, that
    of its kernel).

    Raises InputError for a size below 1.
    """
    parsed = Axes.parse(axes)
    shape = tuple(extent(sizes, name) for name in parsed.names)
    if empty := next((name for name, size in zip(parsed.names, shape, strict=True) if size < 1), None):
        raise InputError(f"the axis {empty!r} of a parameter has size {sizes[empty]}: every size must be 1 or more")
    inputs, outputs = (prod(shape[i] for i in parsed.where(side)) for side in ("read", "write"))
    ragged = tuple((name, size) for name in parsed.names if isinstance(size := sizes[name], tuple))
    return nnx.Param(init(rngs.params(), shape, fan_in or inputs, outputs), axes=str(parsed), ragged=ragged)


def extent(sizes: Sizes, name: str) -> int:
    """Returns the size of an axis in memory; of sizes that differ by layer, the largest, and at least 1."""
    size = sizes[name]
    return max(1, *size) if isinstance(size, tuple) else size


class Dense(nnx.Module):
    """A linear map over named axes: [..., *inputs] -> [..., *outputs], in the kernel's dtype.

    axes: "inputs -> outputs". bias: initialiser of the bias, zeros by default; None for no bias.
    """

    def __init__(
        self, axes: str, sizes: Sizes, *, rngs: nnx.Rngs, init: Init = uniform_fan_in, bias: Init | None = zeros
    ):
        parsed = Axes.parse(axes)
        inputs = [parsed.names[i] for i in parsed.where("read")]
        outputs = [parsed.names[i] for i in parsed.where("write")]
        self.rank = len(inputs)
        self.kernel = param(axes, sizes, init, rngs)
        fan_in = prod(extent(sizes, name) for name in inputs)
        self.bias = None if bias is None else param(f"-> {' '.join(outputs)}", sizes, bias, rngs, fan_in=fan_in)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        lead = x.ndim - self.rank
        names = ascii_letters[: lead + kernel.ndim]  # of x's leading axes, then of the kernel's
        inputs, outputs = names[: x.ndim], names[:lead] + names[x.ndim :]
        y = product(f"{inputs},{names[lead:]}->{outputs}", x, kernel)
        return y if self.bias is None else add(y, self.bias[...])
