"""Axes: the name of each dimension of a parameter, and how a layer uses it.

`"layer embed -> head head_dim"` means: stacked along `layer`, reads `embed`, writes `head x head_dim`. Without an arrow
the axes are carried (norm scales). Inheritance, sharding, weight decay, counting and initialisation read these names.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Literal

import numpy as np

from heirloom.common.errors import InputError, nearest

Side = Literal["stack", "read", "write", "carry"]
STACKING = ("layer", "member")


@dataclass(frozen=True)
class Axes:
    """Names and sides of the dimensions of one array, in order."""

    names: tuple[str, ...]
    sides: tuple[Side, ...]

    @classmethod
    @cache
    def parse(cls, text: str) -> "Axes":
        """Parses the notation. Raises ValueError for a name twice on one side, or a stacking axis that is not first."""
        left, arrow, right = text.partition("->")
        names = left.split() + right.split()
        default: Side = "read" if arrow else "carry"
        sides: list[Side] = [*[default] * len(left.split()), *["write"] * len(right.split())]  # type: ignore[list-item]
        for i, name in enumerate(names):
            if name in STACKING:
                if i and sides[i - 1] != "stack":
                    raise ValueError(f"axes {text!r}: the stacking axis {name!r} must come first")
                sides[i] = "stack"
        if len(set(zip(names, sides, strict=True))) != len(names):
            raise ValueError(f"axes {text!r}: a name is used twice on one side")
        return cls(tuple(names), tuple(sides))

    def __str__(self) -> str:
        left = " ".join(n for n, s in zip(self.names, self.sides, strict=True) if s != "write")
        right = " ".join(n for n, s in zip(self.names, self.sides, strict=True) if s == "write")
        return f"{left} -> {right}".strip() if right or "read" in self.sides else left

    def where(self, *sides: Side) -> tuple[int, ...]:
        """Returns the positions of the dimensions on any of `sides`."""
        return tuple(i for i, s in enumerate(self.sides) if s in sides)

    def stacked(self) -> "Axes":
        """Returns the same axes with a stacking axis `layer` in front."""
        return Axes(("layer", *self.names), ("stack", *self.sides))


@dataclass(frozen=True)
class Leaf:
    """One parameter of a model: its axes, shape and dtype.

    ragged: true sizes per layer of an array that is zero-padded: `{"head": (3, 5, ...)}`.
    """

    axes: Axes
    shape: tuple[int, ...]
    dtype: np.dtype
    ragged: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.axes.names) != len(self.shape):
            named = f"axes '{self.axes}' name {len(self.axes.names)} dimensions"
            raise ValueError(f"{named}, the shape {self.shape} has {len(self.shape)}")

    @property
    def layered(self) -> bool:
        return bool(self.axes.names) and self.axes.names[0] == "layer"

    @property
    def count(self) -> int:
        """Number of elements without padding."""
        if not self.ragged:
            return prod(self.shape)
        layers = self.shape[0]
        rest = [self.ragged.get(n, (s,) * layers) for n, s in zip(self.axes.names[1:], self.shape[1:], strict=True)]
        return sum(prod(sizes[i] for sizes in rest) for i in range(layers))

    def filled(self) -> np.ndarray:
        """Returns the mask of elements that are not padding: bool, broadcasts over the array."""
        mask = np.ones((self.shape[0], *[1] * (len(self.shape) - 1)), bool)
        for i, (name, size) in enumerate(zip(self.axes.names, self.shape, strict=True)):
            if name in self.ragged:
                shape = [self.shape[0], *[1] * (len(self.shape) - 1)]
                shape[i] = size
                mask = mask & (np.arange(size) < np.array(self.ragged[name])[:, None]).reshape(shape)
        return mask

    def in_layer(self, layer: int) -> tuple[int, ...]:
        """Returns the shape in one layer of the stack without padding."""
        sizes = zip(self.axes.names[1:], self.shape[1:], strict=True)
        return tuple(self.ragged[n][layer] if n in self.ragged else s for n, s in sizes)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def extent(self, *sides: Side) -> int:
        """Returns the product of the sizes on `sides`: `extent("read")` is the fan-in of a kernel."""
        return prod(self.shape[i] for i in self.axes.where(*sides))

    def __str__(self) -> str:
        sizes = iter(self.shape)
        return re.sub(r"[^\s>-]+", lambda m: f"{m[0]}={next(sizes)}", str(self.axes)) or "scalar"


Spec = dict[str, Leaf]


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    parts = (re.escape(p).replace(r"\*", "[^/]*") for p in pattern.split("**"))
    return re.compile(".*".join(parts))


def matches(pattern: str, path: str) -> bool:
    """Returns whether a glob matches a path: `*` matches within one part, `**` across parts."""
    return _regex(pattern).fullmatch(path) is not None


def select(pattern: str, paths: Iterable[str]) -> list[str]:
    """Returns the paths that a glob matches. Raises InputError when there is none: such a pattern is a mistake."""
    paths = list(paths)
    found = [p for p in paths if matches(pattern, p)]
    if not found:
        raise InputError(f"pattern {pattern!r} matches no parameter{nearest(pattern, paths)}")
    return found


def assign(patterns: Sequence[str], paths: Iterable[str]) -> dict[str, int]:
    """Returns for each path its first matching pattern's index; every path is covered and every pattern used.

    Raises InputError naming a path without pattern, or a pattern that is not used.
    """
    paths = list(paths)
    matching = [set(select(pattern, paths)) for pattern in patterns]
    found: dict[str, int] = {}
    for path in paths:
        index = next((i for i, matched in enumerate(matching) if path in matched), None)
        if index is None:
            hint = f"{nearest(path, patterns)} (rules: {', '.join(patterns)})"
            raise InputError(f"{path}: no rule covers this parameter{hint}")
        found[path] = index
    for i, (pattern, matched) in enumerate(zip(patterns, matching, strict=True)):
        if i not in found.values():
            first = patterns[found[min(matched)]]
            why = f"{first!r} comes first and covers {min(matched)}; put {first!r} after it"
            raise InputError(f"pattern {pattern!r} has no effect: {why}")
    return found
