"""Operations with parameters whose gradients are summed in float32, whatever the activations are computed in.

A gradient of a parameter is a sum over rows, and rows are split over devices. Where a product is bfloat16, its transpose is, too: each
device's part of the sum would be rounded to eight bits, and the devices would add rounded parts. Here the parts are float32, and so is
the sum over the devices; the gradient of a bfloat16 kernel is rounded once, when it is complete.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

Saved = tuple[jax.Array, jax.Array]  # both operands, or their gradients


def product(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`jnp.einsum(equation, x, kernel)` in the kernel's dtype, to which `x` is cast. The equation names every axis, each once a side.

    Differentiable in reverse only where the kernel is bfloat16.
    """
    x = x.astype(kernel.dtype)
    return _product(equation, x, kernel) if _narrow(kernel) else jnp.einsum(equation, x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, kernel)


def _product_forward(equation: str, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Saved]:
    return _product(equation, x, kernel), (x, kernel)


def _product_backward(equation: str, saved: Saved, gradient: jax.Array) -> Saved:
    x, kernel = saved
    inputs, written = equation.split("->")
    read, weights = inputs.split(",")
    by_kernel = jnp.einsum(f"{read},{written}->{weights}", x, gradient, preferred_element_type=jnp.float32)
    return jnp.einsum(f"{written},{weights}->{read}", gradient, kernel), rounded(by_kernel, kernel)


_product.defvjp(_product_forward, _product_backward)


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[int, int]) -> jax.Array:
    """Convolution of `x` [batch, row, col, in] with `kernel` [row, col, in, out], both sides alike, in the kernel's dtype."""
    x = x.astype(kernel.dtype)
    return _convolve(stride, padding, x, kernel) if _narrow(kernel) else _conv(x, kernel, stride, padding)


def _conv(x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[int, int]) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), (padding, padding), dimension_numbers=("NHWC", "HWIO", "NHWC"))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve(stride: int, padding: tuple[int, int], x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _conv(x, kernel, stride, padding)


def _convolve_forward(stride: int, padding: tuple[int, int], x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Saved]:
    return _convolve(stride, padding, x, kernel), (x, kernel)


def _convolve_backward(stride: int, padding: tuple[int, int], saved: Saved, gradient: jax.Array) -> Saved:
    x, kernel = saved
    (by_x,) = jax.linear_transpose(lambda x: _conv(x, kernel, stride, padding), x)(gradient)
    # A convolution's operands share a dtype: the float32 result needs float32 operands, which hold bfloat16 values.
    wide = x.astype(jnp.float32)
    kernel_type = jax.ShapeDtypeStruct(kernel.shape, jnp.float32)
    (by_kernel,) = jax.linear_transpose(lambda kernel: _conv(wide, kernel, stride, padding), kernel_type)(gradient.astype(jnp.float32))
    return by_x, rounded(by_kernel, kernel)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def lookup(table: jax.Array, index: jax.Array | np.ndarray) -> jax.Array:
    """`table[index]`, rows of a table [row, ...] by int indices of any shape."""
    return _lookup(table, index) if _narrow(table) else table[index]


@jax.custom_vjp
def _lookup(table: jax.Array, index: jax.Array | np.ndarray) -> jax.Array:
    return table[index]


def _lookup_forward(table: jax.Array, index: jax.Array) -> tuple[jax.Array, Saved]:
    return table[index], (table, index)


def _lookup_backward(saved: Saved, gradient: jax.Array) -> tuple[jax.Array, None]:
    table, index = saved
    by_table = jnp.zeros(table.shape, jnp.float32).at[index].add(gradient.astype(jnp.float32))
    return rounded(by_table, table), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def add(x: jax.Array, parameter: jax.Array) -> jax.Array:
    """`x + parameter`, which is broadcast against `x`, in the dtype of `x`."""
    return (x + parameter.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


def widened(parameter: jax.Array) -> jax.Array:
    """`parameter` in float32, or wider where it is. For one that is used several times (tiled, or at each turn of a scan): the gradients
    of its uses add up in float32."""
    return _widened(parameter) if _narrow(parameter) else parameter


@jax.custom_vjp
def _widened(parameter: jax.Array) -> jax.Array:
    return parameter.astype(jnp.float32)


_widened.defvjp(lambda parameter: (_widened(parameter), parameter), lambda parameter, gradient: (rounded(gradient, parameter),))


def rounded(gradient: jax.Array, parameter: jax.Array) -> jax.Array:
    """A float32 gradient in the parameter's dtype, rounded after the sum over the devices.

    A compiler that sees a float32 sum whose only use is to be rounded may compute the sum itself in bfloat16 (XLA for TPUs does). It
    must not change the type of what is looked at as bits.
    """
    if not _narrow(parameter) or gradient.dtype != jnp.float32:  # float64 is added up as it is
        return gradient.astype(parameter.dtype)
    bits = jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(gradient, jnp.uint32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(parameter.dtype)


def _narrow(parameter: jax.Array) -> bool:
    return parameter.dtype.itemsize < 4
