"""Opens the msgpack files of Flax (`flax_model.msgpack`) as memory maps, writes them, and gives torch's names.

A file is a tree of maps from names to arrays, each an extension with its shape, dtype and bytes (flax.serialization).
msgpack's own reader copies every array; here only the heads between the arrays are read.
"""

import re
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

from heirloom.common.checkpoint.weights import Tensors
from heirloom.common.errors import InputError

SUFFIX = ".msgpack"
_ARRAYS = (1, 3)  # types of extensions: an array, a numpy scalar
_CHUNKS = "__msgpack_chunked_array__"
_DEEPEST = 64  # maps inside one another; published models have ten
_DTYPES = {np.dtype(d).name: np.dtype(d) for d in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?")}
_DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
# First bytes: kind, and the bytes of the length or number that follows.
_HEADS = {
    0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4), 0xC7: ("array", 1), 0xC8: ("array", 2),
    0xC9: ("array", 4), 0xCC: ("number", 1), 0xCD: ("number", 2), 0xCE: ("number", 4), 0xCF: ("number", 8),
    0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4), 0xDC: ("list", 2), 0xDD: ("list", 4),
    0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
_FIXED = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}  # extensions without a length


class _Damaged(Exception):
    """The file does not continue as msgpack."""


def is_flax(start: bytes) -> bool:
    """Returns whether a file begins as a map whose first key is a text."""
    kind, key = start[:1], start[1:2]
    if kind in (b"\xde", b"\xdf"):
        key = start[3:4] if kind == b"\xde" else start[5:6]
    elif not b"\x81" <= kind <= b"\x8f":
        return False
    return b"\xa1" <= key <= b"\xbf" or key in (b"\xd9", b"\xda")


def open_flax(path: Path) -> Tensors:
    """Opens the arrays of a file under their paths (`vit/encoder/layer/0/...`) as read-only memory maps.

    Raises InputError for a damaged file, and for one with anything but arrays.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
        reader = _Reader(data)
        reader.tree((), _DEEPEST)
        if reader.at != len(data):
            raise _Damaged("more bytes after the end")
    except (_Damaged, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable file of Flax ({error}); fetch it again") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return reader.tensors


class _Reader:
    """A position in a file, and the arrays before it."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.at, self.tensors = data, 0, Tensors()

    def take(self, count: int) -> np.ndarray:
        if self.at + count > len(self.data):
            raise _Damaged("cut short")
        self.at += count
        return self.data[self.at - count : self.at]

    def head(self) -> tuple[str, int]:
        """Reads the kind of the next object, and its length or its number."""
        first = int(self.take(1)[0])
        if first in _FIXED:
            return "array", _FIXED[first]
        if first in _HEADS:
            kind, size = _HEADS[first]
            return kind, int.from_bytes(self.take(size).tobytes(), "big")
        for below, kind, mask in ((0x80, "number", 0x7F), (0x90, "map", 0x0F), (0xA0, "list", 0x0F)):
            if first < below:
                return kind, first & mask
        return ("text", first & 0x1F) if first < 0xC0 else ("other", first)

    def expect(self, wanted: str) -> int:
        kind, size = self.head()
        if kind != wanted:
            raise _Damaged(f"a {kind} where a {wanted} must be")
        return size

    def text(self) -> str:
        found = self.take(self.expect("text")).tobytes().decode()  # a UnicodeDecodeError is a ValueError
        if not found.isprintable():
            raise _Damaged(f"a name is {found[:40]!r}")
        return found

    def tree(self, path: tuple[str, ...], depth: int) -> None:
        """Reads a map or an array; only arrays may be in maps."""
        kind, size = self.head()
        name = "/".join(path)
        if kind == "array":
            if name in self.tensors:
                raise _Damaged(f"{name!r} is there twice")
            self.tensors[name] = self.array(size, name)
        elif kind == "map" and depth:
            for _ in range(size):
                key = self.text()
                if key == _CHUNKS:
                    raise InputError(f"{name!r} is over 1 GiB and stored in chunks, which are not read")
                self.tree((*path, key), depth - 1)
        elif kind == "map":
            raise _Damaged("maps within maps without end")
        else:
            alone = "save the parameters alone, flax.serialization.to_bytes(params)"
            raise InputError(f"{name!r} is a {kind}, and only arrays can be read; {alone}")

    def array(self, size: int, name: str) -> np.ndarray:
        """Reads shape and dtype of an array and returns its bytes as a view."""
        if int(self.take(1)[0]) not in _ARRAYS:
            raise InputError(f"{name!r} is a complex number or of an unknown kind; only arrays of numbers can be read")
        end = self.at + size
        if self.expect("list") != 3:
            raise _Damaged(f"{name!r} is no array")
        shape = tuple(self.expect("number") for _ in range(self.expect("list")))
        dtype = self.text()
        if dtype not in _DTYPES:
            raise InputError(f"{name!r} has dtype {dtype}, which is not one of {', '.join(_DTYPES)}")
        count = self.expect("bytes")
        values = self.take(count)
        if self.at != end or count != prod(shape) * _DTYPES[dtype].itemsize:
            raise _Damaged(f"{name!r} has {count} bytes, which {dtype} of shape {shape} has not")
        return np.asarray(values).view(_DTYPES[dtype]).reshape(shape)


def write_flax(path: Path, tensors: Tensors) -> None:
    """Writes arrays under their paths as Flax does; the file is in memory once."""
    from flax import serialization
    from flax.traverse_util import unflatten_dict

    tree = unflatten_dict(dict(tensors), sep="/")
    path.write_bytes(serialization.msgpack_serialize(tree, in_place=True))


def as_torch(tensors: Tensors) -> Tensors:
    """Returns views of Flax's arrays under the names and in the axis orders of torch.

    The rules are those by which transformers and diffusers loaded one from the other: kernels are transposed, `scale`
    and `embedding` are `weight`, and diffusers' numbers follow a dot (`resnets_0` is `resnets.0`).
    """
    out: Tensors = {}
    for path, value in tensors.items():
        *module, leaf = re.sub(r"_(\d+)(?=/)", r"/\1", path).split("/")
        if leaf == "kernel":
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        out[".".join([*module, "weight" if leaf in ("kernel", "scale", "embedding") else leaf])] = value
    return out
