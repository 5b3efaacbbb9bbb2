"""Convolutions over images, NHWC."""

import jax
from flax import nnx

from heirloom.common.nn.dense import Init, param, uniform_fan_in
from heirloom.common.nn.precision import add, convolve


class Conv(nnx.Module):
    """A square convolution: [batch, row, col, in_channels] -> [batch, row, col, out_channels], in the kernel's dtype.

    size: side of the kernel. padding: zeros before and after rows and columns; the default keeps the size at stride 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        size: int = 3,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        init: Init = uniform_fan_in,
        bias: Init | None = uniform_fan_in,
        rngs: nnx.Rngs,
    ):
        sizes = {"row": size, "col": size, "in": in_channels, "out": out_channels}
        self.kernel = param("row col in -> out", sizes, init, rngs)
        self.bias = None if bias is None else param("-> out", sizes, bias, rngs, fan_in=size**2 * in_channels)
        self.stride, self.padding = stride, padding or (size // 2, (size - 1) // 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = convolve(x, self.kernel[...], self.stride, self.padding)
        return y if self.bias is None else add(y, self.bias[...])
