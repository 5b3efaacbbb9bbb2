"""Parameters that name their axes, their initialisers, and the linear layer: the names *are* the shape."""

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
"""The size of each axis, an int; a tuple of ints: another one in each layer of the stack, zero-padded to the largest."""
Init = Callable[[jax.Array, tuple[int, ...], int, int], jax.Array]
"""`init(key, shape, fan_in, fan_out)`: f32 values; the fans are the extents read and written."""


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
    """A parameter whose shape is its axes' sizes. `fan_in` overrides what the axes say (a bias knows its kernel's).

    Raises InputError for a size below 1.
    """
    parsed = Axes.parse(axes)
    shape = tuple(extent(sizes, name) for name in parsed.names)
    if empty := next((name for name, size in zip(parsed.names, shape, strict=True) if size < 1), None):
        raise InputError(f"the axis {empty!r} of a parameter has size {sizes[empty]}: every size must be 1 or more")
    read, written = (prod(shape[i] for i in parsed.where(side)) for side in ("read", "write"))
    ragged = tuple((name, size) for name in parsed.names if isinstance(size := sizes[name], tuple))
    return nnx.Param(init(rngs.params(), shape, fan_in or read, written), axes=str(parsed), ragged=ragged)


def extent(sizes: Sizes, name: str) -> int:
    """The size of an axis in memory: of one that differs by layer the largest, and at least 1."""
    size = sizes[name]
    return max(1, *size) if isinstance(size, tuple) else size


class Dense(nnx.Module):
    """A linear map over named axes: `x` is [..., *read], the result [..., *written], in the kernel's dtype.

    Pass `bias=None` for a map without bias; the default is zeros.
    """

    def __init__(self, axes: str, sizes: Sizes, *, rngs: nnx.Rngs, init: Init = uniform_fan_in, bias: Init | None = zeros):
        parsed = Axes.parse(axes)
        read = [parsed.names[i] for i in parsed.where("read")]
        written = [parsed.names[i] for i in parsed.where("write")]
        self.rank = len(read)
        self.kernel = param(axes, sizes, init, rngs)
        fan_in = prod(extent(sizes, name) for name in read)
        self.bias = None if bias is None else param(f"-> {' '.join(written)}", sizes, bias, rngs, fan_in=fan_in)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        lead = x.ndim - self.rank
        names = ascii_letters[: lead + kernel.ndim]  # of x's leading axes, then of the kernel's
        read, written = names[: x.ndim], names[:lead] + names[x.ndim :]
        y = product(f"{read},{names[lead:]}->{written}", x, kernel)
        return y if self.bias is None else add(y, self.bias[...])
