"""Convolutions over images, NHWC."""

import jax
from flax import nnx

from heirloom.common.nn.dense import Init, param, uniform_fan_in
from heirloom.common.nn.precision import add, convolve


class Conv(nnx.Module):
    """`x` is [batch, row, col, read], the result [batch, row, col, written], in the kernel's dtype.

    size: side of the kernel. padding: zeros before and after either side; unless given, what keeps the size at stride 1.
    """

    def __init__(
        self,
        read: int,
        written: int,
        *,
        size: int = 3,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        init: Init = uniform_fan_in,
        bias: Init | None = uniform_fan_in,
        rngs: nnx.Rngs,
    ):
        sizes = {"row": size, "col": size, "in": read, "out": written}
        self.kernel = param("row col in -> out", sizes, init, rngs)
        self.bias = None if bias is None else param("-> out", sizes, bias, rngs, fan_in=size**2 * read)
        self.stride, self.padding = stride, padding or (size // 2, (size - 1) // 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = convolve(x, self.kernel[...], self.stride, self.padding)
        return y if self.bias is None else add(y, self.bias[...])
