"""Layouts: foreign checkpoints as views under our names. One table serves reading and writing.

A row has our leaf (or several, joined by ` + `, that share one tensor), the foreign key (`{layer}` is the layer's
number), and, where it is not torch's order (written axes, then read axes), the foreign order of each part:

    ("image/blocks/attn/query/kernel", "vision_model.encoder.layers.{layer}.self_attn.q_proj.weight")
    ("image/cls_position + image/position", "...position_embedding.weight", "1 embed + (grid_row grid_col) embed")
    ("decoder/up/*/resnets/*/conv1/bias", "decoder.up_blocks.*.resnets.*.conv1.bias")

Modules in a list that are not stacked have a `*` for each number: one row covers all of them. A `{layer}` in the key of
a leaf that is not stacked means that the file repeats the tensor in every layer. Layers with names instead of numbers
are `{layer:base|slope}`. Leaves that share a tensor are concatenated along the first dimension that is not 1 in all.

Copying from a view reads pages of the file, copying to it writes them: nothing is read before it is needed.
"""

import mmap
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from heirloom.common.errors import InputError, nearest
from heirloom.common.surgery.axes import Leaf, Spec, matches

_LAYER = re.compile(r"\{layer(?::([^}]*))?\}")
CLOSE = 1e-5  # tolerance for constants: other libraries compute them in float32, and files may round them further


@dataclass(frozen=True, eq=False)
class View:
    """One of our leaves as strided views of foreign tensors: a part per layer, or a single part.

    copies: further tensors with the same values; they are written, and not read. Parts of different sizes are a leaf
    that is zero-padded in memory: reading adds the padding, writing cuts it off.
    """

    parts: Sequence[np.ndarray]
    layered: bool
    copies: tuple[np.ndarray, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self._padded) if self.layered else self.parts[0].shape

    @property
    def _padded(self) -> tuple[int, ...]:
        return tuple(max(1, *sizes) for sizes in zip(*(part.shape for part in self.parts), strict=True))

    @property
    def dtype(self) -> np.dtype:
        return _common_dtype(part.dtype for part in self.parts)

    def layer(self, i: int) -> np.ndarray:
        """Returns one layer; a view of the file unless it is padded."""
        part = self.parts[i]
        if part.shape == self._padded:
            return part
        return np.pad(part, [(0, n - m) for n, m in zip(self._padded, part.shape, strict=True)])

    def read(self, into: np.ndarray) -> None:
        """Copies to an array or another file's memory map, without an intermediate array."""
        for i, target in enumerate(into if self.layered else [into]):
            np.copyto(target, self.layer(i) if self.layered else self.parts[0], casting="same_kind")

    def write(self, value: "View | np.ndarray") -> None:
        """Copies from an array or a view; from a view part by part, without an intermediate array."""
        if isinstance(value, View):
            sources: Sequence[np.ndarray] = value.parts
        else:
            sources = list(value) if self.layered else [np.asarray(value)]
        for part, source in zip(self.parts, sources, strict=True):
            np.copyto(part, source[tuple(slice(n) for n in part.shape)], casting="same_kind")
        for copy in self.copies:
            np.copyto(copy, sources[0], casting="same_kind")

    def release(self) -> None:
        """Gives the memory of the pages that were read back to the system."""
        for part in self.parts:
            release(part)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        out = np.empty(self.shape, dtype or self.dtype)
        self.read(out)
        return out


def _common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """Returns a floating-point dtype that holds values of all of these: a file may have layers in different ones."""
    found = set(dtypes)
    if len(found) == 1:
        return found.pop()
    return np.dtype(np.float64 if np.dtype(np.float64) in found else np.float32)


@dataclass(frozen=True)
class Tensor:
    """Shape and dtype of a tensor in a foreign file."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class _Row:
    paths: tuple[str, ...]
    key: str
    orders: tuple[str | None, ...]

    @classmethod
    def parse(cls, row: tuple[str, ...]) -> "_Row":
        paths = tuple(p.strip() for p in row[0].split("+"))
        orders = tuple(o.strip() for o in row[2].split("+")) if len(row) > 2 else (None,) * len(paths)
        if len(orders) != len(paths):
            raise ValueError(f"layout row {row}: {len(paths)} leaves, {len(orders)} orders")
        return cls(paths, row[1], orders)

    def numbered(self, spec: Spec) -> "Iterator[_Row]":
        """Yields the row, or one row per match of its stars; a star matches the same text in every column."""
        if "*" not in self.paths[0]:
            yield self
            return
        stars = re.compile(re.escape(self.paths[0]).replace(r"\*", "([^/]+)"))
        for found in filter(None, map(stars.fullmatch, spec)):
            paths = tuple(_fill(path, found.groups()) for path in self.paths)
            yield _Row(paths, _fill(self.key, found.groups()), self.orders)


def _fill(text: str, stars: Sequence[str]) -> str:
    parts = text.split("*")
    return "".join(part + star for part, star in zip(parts, (*stars, ""), strict=True))


def _terms(order: str | None, leaf: Leaf) -> list[list[int]]:
    """Returns a leaf's foreign dimensions, each as positions in our unstacked shape; an empty one has size 1."""
    names, sides = leaf.axes.names, leaf.axes.sides
    if leaf.layered:
        names, sides = names[1:], sides[1:]
    if order is None:
        written = [i for i, s in enumerate(sides) if s != "read"]
        read = [i for i, s in enumerate(sides) if s == "read"]
        return [group for group in (written, read) if group]
    left = list(range(len(names)))
    terms: list[list[int]] = []
    for term in re.findall(r"\([^)]*\)|\S+", order):
        group = [] if term == "1" else term.strip("()").split()
        positions = []
        for name in group:
            position = next((i for i in left if names[i] == name), None)
            if position is None:
                raise ValueError(f"order {order!r} names the axis {name!r}, which '{leaf.axes}' does not have")
            left.remove(position)
            positions.append(position)
        terms.append(positions)
    if left:
        raise ValueError(f"order {order!r} leaves out {[names[i] for i in left]} of '{leaf.axes}'")
    return terms


@dataclass(frozen=True)
class Layout:
    """The table between one model's leaves and one foreign format.

    ignore: globs of foreign keys that hold no weights (buffers). constant: foreign keys that are not parameters here
    and always have these values, such as fixed position tables; a file may leave them out, and they are written in the
    dtype of the weights. omit: our leaves that files of this format do not hold, such as stored features: they are not
    written, and a model that is read has none. differs: for the error when tensors that a file repeats in every layer
    are not equal: what it means, and what to do.
    """

    name: str
    rows: tuple[tuple[str, ...], ...]
    ignore: tuple[str, ...] = ()
    constant: Mapping[str, np.ndarray] = field(default_factory=dict)
    omit: tuple[str, ...] = ()
    differs: str = ""

    def _entries(self, spec: Spec) -> Iterator[tuple[_Row, str, list[Leaf], int]]:
        """Yields every foreign key of this layout with its row, our leaves, and the number of its layer."""
        covered: set[str] = set()
        for row in (row for text in self.rows for row in _Row.parse(text).numbered(spec)):
            leaves = [spec[p] for p in row.paths if p in spec]
            if not leaves:
                continue  # a part this variant of the model does not have; a missing leaf shows up below
            if len(leaves) != len(row.paths):
                raise ValueError(f"layout {self.name!r}: {row.paths} share a tensor, the model has only some")
            covered.update(row.paths)
            if _LAYER.search(row.key):
                for i in range(leaves[0].shape[0] if leaves[0].layered else _layers(spec)):
                    key = _LAYER.sub(lambda m, i=i: m[1].split("|")[i] if m[1] else str(i), row.key)  # type: ignore[misc]
                    yield row, key, leaves, i
            else:
                yield row, row.key, leaves, 0
        if left := [p for p in spec if p not in covered and p not in self.omit]:
            raise ValueError(f"layout {self.name!r} has no row for {left[0]!r}")

    def foreign(self, spec: Spec) -> dict[str, Tensor]:
        """Returns the tensors that a file of this format has for a model of `spec`, constants included."""
        out = {}
        for row, key, leaves, layer in self._entries(spec):
            terms = [_terms(order, leaf) for leaf, order in zip(leaves, row.orders, strict=True)]
            shapes = [_foreign_shape(leaf, t, layer) for leaf, t in zip(leaves, terms, strict=True)]
            joint = _joint(terms)
            first = shapes[0]
            shape = first if len(shapes) == 1 else (*first[:joint], sum(s[joint] for s in shapes), *first[joint + 1 :])
            if prod(shape):  # a layer without heads has no projections
                out[key] = Tensor(shape, _common_dtype(leaf.dtype for leaf in leaves))
        dtypes = {leaf.dtype for leaf in spec.values()}
        only = next(iter(dtypes)) if len(dtypes) == 1 else None
        return out | {key: Tensor(value.shape, only or value.dtype) for key, value in self.constant.items()}

    def keys(self, spec: Spec) -> dict[str, str]:
        """Returns the foreign key of each of our leaves, with `{layer}` where there are several."""
        return {path: row.key for row, *_ in self._entries(spec) for path in row.paths}

    def view(self, tensors: Mapping[str, np.ndarray], spec: Spec, where: str = "the checkpoint") -> dict[str, View]:
        """Returns our leaves as views of `tensors` (memory-mapped to read lazily, writable to convert to this format);
        not those that the format omits.

        Raises InputError naming the key for a missing tensor, an unexpected one, one of another shape, or one of whole
        numbers.
        """
        expected = self.foreign(spec)
        tensors = {
            key: _squeezed(value, expected[key].shape) if key in expected else value for key, value in tensors.items()
        }
        _check(tensors, expected, self.name, (*self.ignore, *self.constant), where)
        for key in sorted((expected.keys() - self.constant.keys()) & tensors.keys()):
            if (dtype := tensors[key].dtype).kind not in "fV":  # V: bfloat16
                what = f"is {dtype}, and weights are floating-point numbers"
                raise InputError(f"{where}: tensor {key!r} {what}: is it quantised? Take the original")
        parts: dict[str, list[np.ndarray]] = {path: [] for path in spec if path not in self.omit}
        for row, key, leaves, layer in self._entries(spec):
            start, all_terms = 0, [_terms(order, leaf) for leaf, order in zip(leaves, row.orders, strict=True)]
            joint = _joint(all_terms)
            for path, leaf, terms in zip(row.paths, leaves, all_terms, strict=True):
                shape = _foreign_shape(leaf, terms, layer)
                tensor = tensors[key] if key in expected else np.zeros(shape, leaf.dtype)
                piece = tensor
                if len(leaves) > 1:
                    piece = tensor[(*[slice(None)] * joint, slice(start, start + shape[joint]))]
                start += shape[joint] if len(leaves) > 1 else 0
                parts[path].append(_as_ours(piece, leaf, terms, layer))
        return {
            path: View(tuple(p), True) if spec[path].layered else View((p[0],), False, tuple(p[1:]))
            for path, p in parts.items()
        }

    def check_values(self, tensors: Mapping[str, np.ndarray], spec: Spec, where: str = "the checkpoint") -> None:
        """Raises InputError where a constant has other values, or a repeated tensor is not equal in every layer."""
        for key, value in self.constant.items():
            if key in tensors and not agrees(tensors[key], value):
                what = f"is fixed in {self.name} models, but has other values here"
                raise InputError(f"{where}: tensor {key!r} {what}: is it one?")
        keys = self.keys(spec)
        for path, view in self.view(tensors, spec, where).items():
            if not all(np.array_equal(view.parts[0], copy) for copy in view.copies):
                why = f"; {self.differs}" if self.differs else ""
                what = f"differs from layer to layer, but this model has one {path!r} for all{why}"
                raise InputError(f"{where}: {keys[path]!r} {what}")


def _joint(terms: list[list[list[int]]]) -> int:
    """Returns the dimension along which leaves that share a tensor are concatenated."""
    return next((i for i, groups in enumerate(zip(*terms, strict=False)) if any(groups)), 0)


def _layers(spec: Spec) -> int:
    return next(leaf.shape[0] for leaf in spec.values() if leaf.layered)


def agrees(found: np.ndarray, value: np.ndarray) -> bool:
    """Returns whether a tensor of a file equals a constant, as exactly as its dtype allows."""
    if found.shape != value.shape:
        return False
    floats = np.issubdtype(found.dtype, np.floating) or found.dtype == ml_dtypes.bfloat16
    half_step = float(ml_dtypes.finfo(found.dtype).eps) / 2 if floats else 0.0
    return bool(np.allclose(np.asarray(found, np.float64), value, rtol=half_step, atol=CLOSE))


def own_tensors(spec: Spec) -> dict[str, Tensor]:
    """Returns the tensors of our file by path; leaves whose layers differ in size have a tensor per `path/{layer}`."""
    out: dict[str, Tensor] = {}
    for path, leaf in spec.items():
        if leaf.ragged:
            out |= {f"{path}/{i}": Tensor(leaf.in_layer(i), leaf.dtype) for i in range(leaf.shape[0])}
        else:
            out[path] = Tensor(leaf.shape, leaf.dtype)
    return out


def own_views(tensors: Mapping[str, np.ndarray], spec: Spec, where: str) -> dict[str, View]:
    """Returns the leaves of a file of ours as views. Raises what `Layout.view` raises."""
    _check(tensors, own_tensors(spec), "heirloom", (), where)

    def parts(path: str, leaf: Leaf) -> tuple[np.ndarray, ...]:
        if leaf.ragged:
            return tuple(tensors[f"{path}/{i}"] for i in range(leaf.shape[0]))
        return tuple(tensors[path]) if leaf.layered else (tensors[path],)

    return {path: View(parts(path, leaf), leaf.layered) for path, leaf in spec.items()}


def _check(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, Tensor], name: str, ignore: Sequence[str], where: str
) -> None:
    """Raises InputError for a missing, unexpected or misshapen tensor. ignore: globs of keys that are optional."""
    optional = {key for key in {*tensors, *expected} if any(matches(p, key) for p in ignore)}
    if missing := expected.keys() - tensors.keys() - optional:
        key = min(missing)
        raise InputError(f"{where}: tensor {key!r} is missing{nearest(key, tensors.keys() - expected.keys())}")
    if unexpected := tensors.keys() - expected.keys() - optional:
        key = min(unexpected)
        part = key.partition(".")[0]
        inside, known = ([one for one in names if one.startswith(f"{part}.")] for names in (unexpected, expected))
        if len(inside) > 2 and not known:  # a weight and a bias are a layer
            advice = f"; if {part!r} is another model, save the state_dict() of this one alone"
            raise InputError(f"{where}: tensor {key!r} is not part of this {name} model{advice}")
        raise InputError(f"{where}: tensor {key!r} is not part of this {name} model{nearest(key, expected)}")
    for key, tensor in expected.items():
        if key in tensors and tuple(tensors[key].shape) != tensor.shape:
            shape = tuple(tensors[key].shape)
            raise InputError(f"{where}: tensor {key!r} has shape {shape}, this configuration needs {tensor.shape}")


def _squeezed(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Reshapes a tensor to `shape` if only trailing ones differ: a file may have a 1x1 convolution for a linear map."""
    rank = min(tensor.ndim, len(shape))
    return tensor.reshape(shape) if tensor.shape[:rank] == shape[:rank] and tensor.size == prod(shape) else tensor


def _inner(leaf: Leaf, layer: int) -> tuple[int, ...]:
    return leaf.in_layer(layer) if leaf.layered else leaf.shape


def _foreign_shape(leaf: Leaf, terms: list[list[int]], layer: int) -> tuple[int, ...]:
    sizes = _inner(leaf, layer)
    return tuple(prod(sizes[i] for i in term) for term in terms)


def _as_ours(tensor: np.ndarray, leaf: Leaf, terms: list[list[int]], layer: int) -> np.ndarray:
    """Splits the grouped dimensions and transposes them to our order: strides only, no copy."""
    sizes, order = _inner(leaf, layer), [i for term in terms for i in term]
    split = tensor.reshape([sizes[i] for i in order])
    if tensor.size and not np.may_share_memory(split, tensor):
        raise ValueError("a foreign tensor must be contiguous to be seen as a view")
    return split.transpose(np.argsort(order)) if order else split


def release(array: np.ndarray) -> None:
    """Gives the pages of a memory-mapped array back to the system: they are read from the file again when needed.

    Does nothing for an array in memory, for one that torch mapped, and where the system has no madvise (Windows).
    """
    owner: Any = array
    while owner is not None and not isinstance(owner, np.memmap):
        owner = getattr(owner, "base", None)
    mapped: Any = getattr(owner, "_mmap", None)
    if owner is None or mapped is None or owner.mode == "c" or not hasattr(mapped, "madvise"):
        return  # of a copy-on-write map ("c") the changes are only in memory
    origin = np.frombuffer(mapped, np.uint8).__array_interface__["data"][0]
    first, last = (int(bound) - origin for bound in np.lib.array_utils.byte_bounds(array))
    start = first - first % mmap.PAGESIZE
    if last > start:
        mapped.madvise(mmap.MADV_DONTNEED, start, last - start)
