"""Operations with parameters whose gradients are summed in float32, whatever the activations are computed in.

The gradient of a parameter is a sum over rows, and rows are split over devices. The transpose of a bfloat16 product is
bfloat16 too: each device's part of the sum would be rounded to eight bits, and the devices would add rounded parts.
Here the parts are float32, and so is the sum over the devices. The gradient of a bfloat16 kernel is rounded once, when
the sum is complete.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from heirloom.common.nn.quantized import QArray, einsum

Saved = tuple[jax.Array, jax.Array]  # both operands, or their gradients


def product(equation: str, x: jax.Array, kernel: jax.Array | QArray) -> jax.Array:
    """Computes `jnp.einsum(equation, x, kernel)` in the kernel's dtype; `x` is cast to it. The equation names each axis
    once a side.

    With a bfloat16 kernel only reverse-mode differentiation works. A quantised kernel has no gradient.
    """
    if isinstance(kernel, QArray):
        return einsum(equation, x, kernel)
    x = x.astype(kernel.dtype)
    return _product(equation, x, kernel) if _narrow(kernel) else jnp.einsum(equation, x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, kernel)


def _product_forward(equation: str, x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Saved]:
    return _product(equation, x, kernel), (x, kernel)


def _product_backward(equation: str, saved: Saved, gradient: jax.Array) -> Saved:
    x, kernel = saved
    inputs, outputs = equation.split("->")
    inputs, weights = inputs.split(",")
    by_kernel = jnp.einsum(f"{inputs},{outputs}->{weights}", x, gradient, preferred_element_type=jnp.float32)
    return jnp.einsum(f"{outputs},{weights}->{inputs}", gradient, kernel), rounded(by_kernel, kernel)


_product.defvjp(_product_forward, _product_backward)


def wide_matmul(x: jax.Array, kernel: jax.Array | QArray) -> jax.Array:
    """Computes x [..., n] @ kernel [n, m] in float32 for inference, without a float32 copy of a bfloat16 kernel.

    `x` is split into two bfloat16 parts, which together keep 16 of its 24 bits. Their products with the kernel are
    exact and are summed in float32: the result is that of `x` with a relative error of 2^-17, and a CPU that multiplies
    bfloat16 takes a third of the time. The integers of a quantised kernel are bfloat16 exactly, and its scales are
    applied to the result. A kernel of another dtype is widened.
    """
    if isinstance(kernel, QArray):
        return wide_matmul(x, kernel.qvalue.astype(jnp.bfloat16)) * kernel.scale
    x = x.astype(jnp.float32)
    if kernel.dtype != jnp.bfloat16:
        return x @ kernel.astype(jnp.float32)
    upper = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # a cast to bfloat16 and back may be dropped
    parts = jnp.stack([upper, x - upper]).astype(jnp.bfloat16)  # one product, so that the kernel is read once
    return jnp.matmul(parts, kernel, preferred_element_type=jnp.float32).sum(0)


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[int, int]) -> jax.Array:
    """Convolves `x` [batch, row, col, in] with `kernel` [row, col, in, out] in its dtype; stride and padding for both
    dimensions.
    """
    x = x.astype(kernel.dtype)
    return _convolve(stride, padding, x, kernel) if _narrow(kernel) else _conv(x, kernel, stride, padding)


def _conv(x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[int, int]) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (padding, padding), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve(stride: int, padding: tuple[int, int], x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _conv(x, kernel, stride, padding)


def _convolve_forward(
    stride: int, padding: tuple[int, int], x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, Saved]:
    return _convolve(stride, padding, x, kernel), (x, kernel)


def _convolve_backward(stride: int, padding: tuple[int, int], saved: Saved, gradient: jax.Array) -> Saved:
    x, kernel = saved
    (by_x,) = jax.linear_transpose(lambda x: _conv(x, kernel, stride, padding), x)(gradient)
    # A convolution's operands share a dtype: the float32 result needs float32 operands, which hold bfloat16 values.
    wide = x.astype(jnp.float32)
    kernel_type = jax.ShapeDtypeStruct(kernel.shape, jnp.float32)
    (by_kernel,) = jax.linear_transpose(lambda kernel: _conv(wide, kernel, stride, padding), kernel_type)(
        gradient.astype(jnp.float32)
    )
    return by_x, rounded(by_kernel, kernel)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def lookup(table: jax.Array, index: jax.Array | np.ndarray) -> jax.Array:
    """Returns `table[index]`: rows of a table [row, ...] by int indices of any shape."""
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
    """Returns `x + parameter` in the dtype of `x`; the parameter is broadcast against `x`."""
    return (x + parameter.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


def widened(parameter: jax.Array) -> jax.Array:
    """Returns a parameter in float32, or in its own dtype if that is wider.

    For a parameter that is used several times (tiled, or in each step of a scan): the gradients of its uses add up in
    float32.
    """
    return _widened(parameter) if _narrow(parameter) else parameter


@jax.custom_vjp
def _widened(parameter: jax.Array) -> jax.Array:
    return parameter.astype(jnp.float32)


_widened.defvjp(
    lambda parameter: (_widened(parameter), parameter), lambda parameter, gradient: (rounded(gradient, parameter),)
)


def rounded(gradient: jax.Array, parameter: jax.Array) -> jax.Array:
    """Rounds a float32 gradient to the parameter's dtype after the sum over the devices.

    A compiler may compute a float32 sum in bfloat16 if the sum is only used rounded (XLA for TPUs does). The bitcast
    prevents this: a value that is used as bits must keep its type.
    """
    if not _narrow(parameter) or gradient.dtype != jnp.float32:  # float64 is added up as it is
        return gradient.astype(parameter.dtype)
    bits = jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(gradient, jnp.uint32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(parameter.dtype)


def _narrow(parameter: jax.Array) -> bool:
    return parameter.dtype.itemsize < 4
