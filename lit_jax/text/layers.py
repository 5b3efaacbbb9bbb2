"""The blocks of a text encoder, read from their files one by one; the only place that reads their weights."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any

import jax
import numpy as np

from heirloom.common.checkpoint.family import Donor
from heirloom.common.checkpoint.quantized import QuantizedView, stored_layer
from heirloom.common.checkpoint.weights import SCALE
from heirloom.common.nn.functional import Functional
from heirloom.common.nn.quantized import QArray
from heirloom.common.surgery.layout import release

BLOCKS = "blocks/"
ALIGNMENT = 64  # bytes: a CPU then uses an array of ours as it is, where it would copy it
Layer = dict[str, jax.Array | QArray]


class Layers:
    """Parameters of the blocks of an open checkpoint, as `model`, one block, names them.

    A kernel is read as a matrix in the order of the file, [outputs, inputs] or [inputs, outputs], and in its dtype: the
    compiler multiplies by either, and such a copy is many times as fast as one that turns the matrix. `restored` gives
    it the shape of the model.
    """

    def __init__(self, donor: Donor, model: Functional):
        self.count: int = donor.cfg.layers
        self._spec = model.spec
        self._views: dict[str, Any] = {path: donor.source.values[f"{BLOCKS}{path}"] for path in model.spec}
        self._inputs = {path: len(leaf.axes.where("read")) for path, leaf in model.spec.items()}
        plain = {path: view for path, view in self._views.items() if not isinstance(view, QuantizedView)}
        self._turned = {path for path, view in plain.items() if _turned(view.parts[0], self._inputs[path])}
        self._buffers: dict[tuple[int, str], np.ndarray] = {}

    def stream(self) -> Iterator[Layer]:
        """Yields each layer, and reads the next one meanwhile; a layer is valid until the second one after it is asked
        for, so the caller finishes its computation before.

        Two sets of buffers take turns: new memory for every layer would cost more than reading it.
        """
        with ThreadPoolExecutor(1) as reader:
            following = reader.submit(self._read, 0, 0)
            for i in range(1, self.count + 1):
                layer = following.result()
                if i < self.count:
                    following = reader.submit(self._read, i, i % 2)
                yield layer
        self._buffers.clear()

    def read_all(self) -> list[Layer]:
        """Reads all layers into memory of their own."""
        layers = [self._read(i, i) for i in range(self.count)]
        self._buffers.clear()  # a device of its own has copies; a CPU's arrays keep theirs
        return layers

    def restored(self, layer: Layer) -> Layer:
        """Returns the parameters of a layer in the shapes of the model; called inside a compiled function."""
        return {
            path: (value.T if path in self._turned else value).reshape(self._spec[path].shape)
            for path, value in layer.items()
        }

    def _read(self, i: int, slot: int) -> Layer:
        return {path: self._part(path, stored_layer(view, i), slot) for path, view in self._views.items()}

    def _part(self, path: str, part: np.ndarray | QArray, slot: int) -> jax.Array | QArray:
        if isinstance(part, QArray):
            return QArray(self._matrix(path, part.qvalue, slot), self._matrix(path + SCALE, part.scale, slot))
        return self._matrix(path, part, slot)

    def _matrix(self, path: str, part: np.ndarray, slot: int) -> jax.Array:
        """Copies a part of the file and gives its pages back."""
        inputs = self._inputs[path.removesuffix(SCALE)]
        if path in self._turned:
            part = part.transpose(*range(inputs, part.ndim), *range(inputs))
            inputs = part.ndim - inputs
        shape = (prod(part.shape[:inputs]), prod(part.shape[inputs:])) if inputs else part.shape
        copy = self._buffers.get((slot, path))
        if copy is None:
            copy = self._buffers[slot, path] = _aligned(part)
        bits = np.dtype(f"u{part.itemsize}")  # numpy copies bfloat16 number by number
        copy.view(bits)[...] = part.view(bits)
        release(part)
        return jax.device_put(copy.reshape(shape)).block_until_ready()


def _turned(part: np.ndarray, inputs: int) -> bool:
    """Returns whether a view, whose first axes are inputs, lies in the file with its outputs first."""
    return 0 < inputs < part.ndim and part.strides[0] < part.strides[inputs]


def _aligned(like: np.ndarray) -> np.ndarray:
    memory = np.empty(like.nbytes + ALIGNMENT, np.uint8)
    first = -memory.__array_interface__["data"][0] % ALIGNMENT
    return memory[first : first + like.nbytes].view(like.dtype).reshape(like.shape)
