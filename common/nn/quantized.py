"""Quantised kernels: int8 values and a float32 scale for each output channel of each layer.

A quantised kernel is a `qwix.QArray`: a pytree with the shape of the kernel, so a scan slices it by layer and jit, vmap
and shardings take it. It stays int8 in memory; `precision.product` widens it where it is used, one layer of a stack at
a time. Its `dtype`, which is that of its scales, is what it computes in: `astype` changes it.

int4 is left out: on CPUs JAX stores an int4 in a whole byte, so it would save no memory there.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from qwix import QArray

from heirloom.common.surgery.axes import Leaf

__all__ = ["INT8", "QArray", "einsum", "multiplied", "quantizable", "quantize", "quantized", "scale_shape"]

INT8 = "int8"
SMALLEST = 4096  # elements of one layer: below this, scales and errors cost more than the memory that is saved
PICTURES = ("row", "col")  # ends of the names of axes of a picture: kernels that have them are convolved or patches


def multiplied(path: str, leaf: Leaf) -> bool:
    """Returns whether a parameter is the kernel of a matmul, and so may be quantised.

    Biases, norms and tables are not, nor kernels of patches and convolutions, nor those whose layers differ in size.
    """
    return (
        path.rpartition("/")[2] == "kernel"
        and bool(leaf.axes.where("read") and leaf.axes.where("write"))
        and not leaf.ragged
        and not any(name.endswith(PICTURES) for name in leaf.axes.names)
    )


def quantizable(path: str, leaf: Leaf) -> bool:
    """Returns whether a parameter is the kernel of a matmul and large enough to be worth quantising."""
    return multiplied(path, leaf) and leaf.extent("read", "write") >= SMALLEST


def scale_shape(leaf: Leaf) -> tuple[int, ...]:
    """Returns the shape of the scales of a kernel: that of the kernel, with 1 for each input axis."""
    inputs = leaf.axes.where("read")
    return tuple(1 if i in inputs else size for i, size in enumerate(leaf.shape))


def quantize(kernel: np.ndarray, scales: tuple[int, ...]) -> QArray:
    """Quantises a kernel of any float dtype: the largest absolute value of a channel becomes 127.5 steps of its scale.

    scales: shape of the scales, 1 where an axis shares one. Values are off by half a step at most; channels below 1e-19
    become zeros. Returns NumPy arrays.
    """
    channels = tuple(i for i, (n, m) in enumerate(zip(kernel.shape, scales, strict=True)) if n == m)
    found = qwix.quantize(jnp.asarray(kernel, jnp.float32), jnp.int8, channelwise_axes=channels)
    return jax.tree.map(np.asarray, found)


def einsum(equation: str, x: jax.Array, kernel: QArray) -> jax.Array:
    """Computes `jnp.einsum(equation, x, kernel)` in the kernel's dtype: of the integers, then times the scales.

    bfloat16 holds the integers exactly; `qwix.einsum` would round the dequantised kernel to it once more. A gradient
    flows to `x` alone.
    """
    inputs, outputs = equation.split("->")
    names = inputs.split(",")[1]
    written = "".join(name for name in outputs if name in names)
    if any(size > 1 for name, size in zip(names, kernel.scale.shape, strict=True) if name not in written):
        raise ValueError(f"{equation}: scales {kernel.scale.shape} differ along an axis that is summed over")
    y = jnp.einsum(equation, x.astype(kernel.dtype), kernel.qvalue.astype(kernel.dtype))
    scale = jnp.einsum(f"{names}->{written}", kernel.scale)  # drops the input axes, whose size is 1
    sizes = iter(scale.shape)
    return y * scale.reshape([next(sizes) if name in written else 1 for name in outputs])


def quantized(tree: Any) -> bool:
    """Returns whether a tree holds a quantised kernel."""
    return any(isinstance(x, QArray) for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, QArray)))
