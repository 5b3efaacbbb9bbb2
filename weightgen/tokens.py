"""Weights as tokens, and back to exactly the same tree.

Three ways to cut: a whole model as one long row, each tensor in chunks of a length, or neuron by neuron, which needs
our named axes: a token is the incoming weights of one output unit, its bias included. Rows are padded with zeros; the
mask says where the weights are.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import PyTree

from heirloom.common.errors import InputError
from heirloom.common.surgery.axes import Spec

Order = Literal["exchangeable", "ordered"]
"""exchangeable: tokens are known by no place, as the rows of a head are not."""
STATISTICS = r"(^|[./])(running_mean|running_var|num_batches_tracked|mean|var)$"


@dataclass(frozen=True)
class Piece:
    """One tensor's share of the tokens: rows `first` to `first + rows`, columns from `column`, up to `width`."""

    path: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    """Permutation of its dimensions after which it is cut row by row."""
    first: int
    rows: int
    column: int
    width: int
    fan_in: int
    fan_out: int

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class TokenSpec:
    """How a tree becomes tokens [rows, length]. Make it with `chunks` or `neurons`."""

    pieces: tuple[Piece, ...]
    rows: int
    length: int

    @classmethod
    def of(cls, pieces: Sequence[Mapping[str, Any]]) -> "TokenSpec":
        """Build it from the pieces in JSON."""
        fields: list[dict[str, Any]] = [
            {k: tuple(v) if isinstance(v, list) else v for k, v in piece.items()} for piece in pieces
        ]
        found = tuple(Piece(**piece) for piece in fields)
        return cls(found, max(p.first + p.rows for p in found), max(p.column + p.width for p in found))

    @property
    def like(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The tensors it was cut from, in f32: what `unflatten` takes when nothing else is to be kept."""
        return {piece.path: jax.ShapeDtypeStruct(piece.shape, np.float32) for piece in self.pieces}

    def padded(self, weights: np.ndarray) -> np.ndarray:
        """Pad weights [..., count] to tokens [..., rows, length]."""
        out = np.zeros((*weights.shape[:-1], self.rows, self.length), np.float32)
        out[..., self.mask] = weights
        return out

    @property
    def count(self) -> int:
        """Weights in all tokens, padding left out."""
        return sum(piece.size for piece in self.pieces)

    @cached_property
    def mask(self) -> np.ndarray:
        """[rows, length] bool: where a weight is, and not padding."""
        mask = np.zeros((self.rows, self.length), bool)
        for piece in self.pieces:
            self._block(mask, piece)[...] = self._pad(np.ones(piece.size, bool), piece)
        return mask

    @cached_property
    def tensor(self) -> np.ndarray:
        """[rows, length] int32: the index of the tensor a weight belongs to, -1 in the padding."""
        found = np.full((self.rows, self.length), -1, np.int32)
        for i, piece in enumerate(self.pieces):
            here = self._pad(np.ones(piece.size, bool), piece)
            self._block(found, piece)[...] = np.where(here, i, self._block(found, piece))
        return found

    def flatten(self, tree: PyTree) -> np.ndarray:
        """Cut a tree into tokens [..., rows, length]; leaves may share leading axes. The dtype holds all exactly."""
        leaves = dict(named_leaves(tree))
        lead = np.shape(leaves[self.pieces[0].path])[: np.ndim(leaves[self.pieces[0].path]) - len(self.pieces[0].shape)]
        dtype = np.result_type(np.float32, *(_exact(leaves[piece.path].dtype) for piece in self.pieces))
        out = np.zeros((*lead, self.rows, self.length), dtype)
        for piece in self.pieces:
            leaf = np.asarray(leaves[piece.path])
            if leaf.shape[len(lead) :] != piece.shape:
                shape = leaf.shape[len(lead) :]
                raise InputError(f"{piece.path}: shape {shape}, the tokens were cut for {piece.shape}")
            moved = leaf.astype(dtype).transpose((*range(len(lead)), *(len(lead) + i for i in piece.order)))
            self._block(out, piece)[...] = self._pad(moved.reshape((*lead, piece.size)), piece)
        return out

    def unflatten(self, tokens: np.ndarray | jax.Array, like: PyTree) -> PyTree:
        """Invert `flatten`: `like` with its selected leaves replaced, dtype and structure kept; padding is ignored.

        tokens: [..., rows, length] numpy, or traced by jax (leaves then get the leading axes too).
        """
        pieces = {piece.path: piece for piece in self.pieces}
        lead = tokens.shape[:-2]

        def replaced(path: str, leaf: Any) -> Any:
            if path not in pieces:
                return leaf
            piece = pieces[path]
            block = self._block(tokens, piece).reshape((*lead, piece.rows * piece.width))[..., : piece.size]
            moved = block.reshape((*lead, *(piece.shape[i] for i in piece.order)))
            back = np.argsort(piece.order)
            return moved.transpose(*range(len(lead)), *(len(lead) + i for i in back)).astype(leaf.dtype)

        return map_named(replaced, like)

    def _block(self, tokens: Any, piece: Piece) -> Any:
        return tokens[..., piece.first : piece.first + piece.rows, piece.column : piece.column + piece.width]

    @staticmethod
    def _pad(flat: np.ndarray, piece: Piece) -> np.ndarray:
        gap = [(0, 0)] * (flat.ndim - 1) + [(0, piece.rows * piece.width - piece.size)]
        return np.pad(flat, gap).reshape(*flat.shape[:-1], piece.rows, piece.width)


def _exact(dtype: Any) -> Any:
    return np.float64 if np.dtype(dtype) == np.float64 else np.float32


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """List leaves in the tree's own order, names joined by "/"; a flat dict keeps its keys and order."""
    if isinstance(tree, Mapping) and all(not isinstance(v, Mapping | list | tuple) for v in tree.values()):
        return list(tree.items())
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def map_named(change: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Rebuild the tree with each leaf replaced by `change(name, leaf)`."""
    if isinstance(tree, Mapping) and all(not isinstance(v, Mapping | list | tuple) for v in tree.values()):
        return {name: change(name, leaf) for name, leaf in tree.items()}
    return jax.tree_util.tree_map_with_path(lambda path, leaf: change(_name(path), leaf), tree)


def _name(path: Sequence[Any]) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def selected(tree: PyTree, select: str = "") -> list[tuple[str, Any]]:
    """Select floating leaves whose name matches the regex `select`, running statistics left out.

    Raises InputError when nothing is left, for complex numbers, and when an integer or quantised leaf is selected by
    name.
    """
    found = []
    try:
        re.compile(select)
    except re.error as error:
        raise InputError(f"{select!r} is no regular expression ({error}); correct select") from error
    for name, leaf in named_leaves(tree):
        if not re.search(select, name) or re.search(STATISTICS, name):
            continue
        kind = np.dtype(leaf.dtype)
        if kind.kind in "iub":
            if select and re.fullmatch(select, name):
                what = "counters and quantised weights cannot be generated"
                raise InputError(f"{name} is {kind}: {what}; dequantise it or leave it out")
            continue
        if kind.kind == "c":
            raise InputError(f"{name} is {kind}, and only real numbers can be generated; leave it out by select")
        found.append((name, leaf))
    if not found:
        has = ", ".join(n for n, _ in named_leaves(tree))[:200]
        raise InputError(f"no floating tensor matches {select!r}; the tree has {has}")
    return found


def chunks(tree: PyTree, length: int | None = None, *, select: str = "") -> TokenSpec:
    """Cut any tree (or dict of a checkpoint's tensors) into rows; arrays may be `jax.ShapeDtypeStruct`s.

    length None: model-wise, one row with all tensors end to end. Else layer-wise: each tensor by itself, padded to
    whole chunks.
    """
    leaves = selected(tree, select)
    sizes = [prod(leaf.shape) for _, leaf in leaves]
    if length is not None and length < 1:
        raise InputError(f"chunks of {length} weights: choose 1 or more")
    pieces, at = [], 0
    for (name, leaf), size in zip(leaves, sizes, strict=True):
        rows, width = (1, size) if length is None else (-(-size // length), length)
        fan_out = leaf.shape[0] if leaf.shape else 1
        where = {"first": 0, "column": at} if length is None else {"first": at, "column": 0}
        order = tuple(range(len(leaf.shape)))
        where |= dict(rows=rows, width=width, fan_in=size // max(fan_out, 1), fan_out=fan_out)
        pieces.append(Piece(path=name, shape=tuple(leaf.shape), order=order, **where))
        at += size if length is None else rows
    return TokenSpec(tuple(pieces), 1 if length is None else at, at if length is None else length)


def one_chunk(spec: TokenSpec) -> TokenSpec:
    """Describe a single row of a cut as a network by itself."""
    n = spec.length
    place = dict(first=0, rows=1, column=0, width=n)
    piece = Piece(path="chunk", shape=(n,), order=(0,), **place, fan_in=n, fan_out=1)
    return TokenSpec((piece,), 1, n)


def neurons(spec: Spec) -> TokenSpec:
    """Cut a model of ours neuron by neuron: tensors of one module that write the same units share a row.

    A carried tensor (a norm's scale) counts as an output.
    """
    pieces: list[Piece] = []
    first = 0
    for _, group in groupby(spec, key=lambda path: path.rpartition("/")[0]):
        column, rows = 0, None
        for path in sorted(group, key=lambda p: len(spec[p].axes.where("read")) == 0):
            leaf = spec[path]
            out, read = leaf.axes.where("stack", "write", "carry"), leaf.axes.where("read")
            units = prod(leaf.shape[i] for i in out)
            if rows is not None and units != rows:
                first, column = first + rows, 0
            rows, width = units, prod(leaf.shape[i] for i in read)
            place = dict(first=first, rows=rows, column=column, width=width)
            fan = dict(fan_in=leaf.extent("read"), fan_out=leaf.extent("write"))
            pieces.append(Piece(path=path, shape=leaf.shape, order=(*out, *read), **place, **fan))
            column += width
        first += rows or 0
    return TokenSpec(tuple(pieces), first, max(piece.column + piece.width for piece in pieces))
