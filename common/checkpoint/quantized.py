"""Weights folders with quantised kernels: `path` has int8, `path.scale` float32; the weights are their product.

`config.json` has `"quantized": "int8"`. Scales have the rank of the kernel and size 1 along its input axes, so any
safetensors reader computes the weights as `path * path.scale`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from heirloom.common.checkpoint.weights import SCALE
from heirloom.common.errors import InputError
from heirloom.common.nn.quantized import QArray, multiplied, quantizable, quantize, scale_shape
from heirloom.common.surgery.axes import Spec
from heirloom.common.surgery.layout import Tensor, View, own_tensors, own_views, release


@dataclass(frozen=True)
class Dequantized(Sequence[np.ndarray]):
    """The parts of a quantised kernel: each is computed, float32, when it is asked for. values, scales: [part, ...]."""

    values: np.ndarray
    scales: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: Any) -> Any:
        return self.values[i] * self.scales[i]


@dataclass(frozen=True, eq=False)
class QuantizedView(View):
    """A quantised kernel in a file. Who reads it as a `View` gets float32, dequantised one layer at a time."""

    parts: Dequantized

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored().shape

    @property
    def dtype(self) -> np.dtype:
        return self.parts.scales.dtype

    def layer(self, i: int) -> np.ndarray:
        return self.parts[i]

    def release(self) -> None:
        release(self.parts.values)

    def stored(self, layer: int | None = None) -> QArray:
        """Returns the kernel, or one layer of it, as it is stored: views of the file, int8 and float32."""
        index = (... if self.layered else 0) if layer is None else layer
        return QArray(self.parts.values[index], self.parts.scales[index])


def stored_layer(value: View | np.ndarray, i: int) -> np.ndarray | QArray:
    """Returns layer `i` of a stacked leaf as it is stored: floats, or a quantised kernel. For models that load their
    layers one by one.
    """
    if isinstance(value, QuantizedView):
        return value.stored(i)
    return value.layer(i) if isinstance(value, View) else value[i]


def quantized_tensors(spec: Spec) -> dict[str, Tensor]:
    """Returns the tensors of a quantised file of ours. Raises InputError when the model has no kernel to quantise."""
    out: dict[str, Tensor] = {}
    for path, leaf in spec.items():
        if quantizable(path, leaf):
            out[path] = Tensor(leaf.shape, np.dtype(np.int8))
            out[path + SCALE] = Tensor(scale_shape(leaf), np.dtype(np.float32))
        else:
            out |= own_tensors({path: leaf})
    if len(out) == len(own_tensors(spec)):
        raise InputError(
            "this model has no kernel that int8 would help: its kernels are small, convolutions, or differ from layer"
            " to layer; leave out --quantize"
        )
    return out


def quantized_views(tensors: Mapping[str, np.ndarray], spec: Spec, where: str) -> dict[str, View]:
    """Returns the leaves of a quantised file of ours as views. Raises InputError for one that is damaged."""
    scales = {path: tensors[path + SCALE] for path in spec if path + SCALE in tensors}
    rest = {key: value for key, value in tensors.items() if key.removesuffix(SCALE) not in scales or key in scales}
    views = own_views(rest, spec, where)
    for path, view in views.items():
        integers = view.dtype.kind in "iub"
        if path not in scales:
            if integers:
                raise InputError(f"{where}: tensor {path + SCALE!r} is missing: {path!r} has integers")
            continue
        if not multiplied(path, spec[path]):
            raise InputError(f"{where}: tensor {path + SCALE!r} has no use: {path!r} is not the kernel of a matmul")
        scale, shape = scales[path], scale_shape(spec[path])
        if scale.shape != shape or scale.dtype != np.float32 or tensors[path].dtype != np.int8:
            raise InputError(
                f"{where}: {path!r} is {tensors[path].dtype} with scales {scale.dtype} {list(scale.shape)}; a quantised"
                f" kernel is int8 with scales float32 {list(shape)}"
            )
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise InputError(f"{where}: tensor {path + SCALE!r} has scales that are not positive numbers")
        whole = (x if view.layered else x[None] for x in (tensors[path], scale))
        views[path] = QuantizedView(Dequantized(*whole), view.layered)
    return views


def write_quantized(out: Mapping[str, np.ndarray], values: Mapping[str, View], spec: Spec, where: str) -> None:
    """Writes the leaves of a model to the tensors of a file, kernels quantised layer by layer.

    out: tensors as `quantized_tensors` has them. Raises InputError, naming the leaf, for a kernel with NaN or infinity.
    """
    kernels = {path for path in spec if path + SCALE in out}
    rest = {key: value for key, value in out.items() if key.removesuffix(SCALE) not in kernels}
    plain = {path: leaf for path, leaf in spec.items() if path not in kernels}
    for path, view in own_views(rest, plain, where).items():
        view.write(values[path])
    for path in kernels:
        view, target, scales = values[path], out[path], out[path + SCALE]
        for i in range(len(view.parts)):
            index = i if view.layered else ...
            kernel = (view.layer(i) if view.layered else view.parts[0]).astype(np.float32)
            if not np.isfinite(kernel).all():
                raise InputError(
                    f"{where}: {path} holds NaN or infinity, which int8 cannot express; fetch or train it again"
                )
            found = quantize(kernel, scales[index].shape)
            target[index], scales[index] = found.qvalue, found.scale
