"""Maps: how the rows of a student's axis are computed from the rows of the donor's.

Each rule of the four papers is one map per named axis: picked rows (also repeated or scaled), or a matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import jax
import numpy as np

from heirloom.common.surgery.axes import Side

Array = np.ndarray | jax.Array


@dataclass(frozen=True, eq=False)
class Pick:
    """Target row i is source row `rows[i]` times `scale[i]`. Row -1 has no source: the target row is fresh."""

    rows: np.ndarray
    scale: Array | None = None

    @property
    def fraction(self) -> float:
        """Share of target rows that come from the donor."""
        inherited = self.rows >= 0
        if isinstance(self.scale, np.ndarray):
            inherited = inherited & (self.scale != 0)
        return float(np.mean(inherited)) if len(self.rows) else 1.0

    def __str__(self) -> str:
        rows = self.rows.tolist()
        kept = [r for r in rows if r >= 0]
        text = f"first {len(kept)}" if kept == list(range(len(kept))) else f"rows {_abbreviate(kept)}"
        fresh = len(rows) - len(kept)
        return text + (f", {fresh} fresh" if fresh else "") + (", scaled" if self.scale is not None else "")


@dataclass(frozen=True, eq=False)
class Matrix:
    """Target rows are linear combinations of source rows: `values` is [target, source], f32, and may be a tracer."""

    values: Array
    fraction: float = 1.0

    def __str__(self) -> str:
        return "matrix {}x{}".format(*self.values.shape)


@dataclass(frozen=True, eq=False)
class Sided:
    """A map for each side of an axis: carried, read or written."""

    carry: "AxisMap"
    read: "AxisMap"
    write: "AxisMap"

    def on(self, side: Side) -> "AxisMap":
        """Returns the map of a side."""
        return {"read": self.read, "write": self.write}.get(side, self.carry)


@dataclass(frozen=True, eq=False)
class PerLayer:
    """A map for each layer of the target. All have the same length, padded with rows of scale 0."""

    maps: tuple["Pick | Matrix", ...]

    @property
    def fraction(self) -> float:
        return float(np.mean([m.fraction for m in self.maps]))

    def __str__(self) -> str:
        return f"per layer ({'; '.join(map(str, self.maps[:2]))}{'; ...' if len(self.maps) > 2 else ''})"


class Fresh:
    """The rule for a leaf that inherits nothing."""

    def __repr__(self) -> str:
        return "FRESH"


AxisMap = Pick | Matrix | Sided | PerLayer
FRESH: Final = Fresh()


def pick(rows: Sequence[int] | np.ndarray, scale: Array | None = None) -> Pick:
    """Picks rows by index, in any order and repeated. -1 is a fresh row; scale 0 a row of zeros."""
    return Pick(np.asarray(rows, np.int64), scale)


def first(n: int) -> Pick:
    """Picks the first n rows (TinyCLIP's width rule)."""
    return pick(range(n))


def every(source: int, target: int) -> Pick:
    """Picks `target` rows from the front in steps of `source // target` (TinyCLIP: 12 -> 9 is the first nine)."""
    if not 0 < target <= source:
        raise ValueError(f"every: {target} of {source} rows cannot be picked")
    return pick(range(0, source // target * target, source // target))


def even(source: int, target: int) -> Pick:
    """Picks `target` rows spread evenly from the first to the last of `source`."""
    if not 0 < target <= source:
        raise ValueError(f"even: {target} of {source} rows cannot be picked")
    return pick(np.round(np.linspace(0, source - 1, target)).astype(int))


def pad(n: int, to: int) -> Pick:
    """Picks the first n rows, then fresh rows up to `to` rows."""
    return pick([*range(n), *[-1] * (to - n)])


def matrix(values: Array) -> Matrix:
    """Makes a linear map from values [target, source]; gradients flow into it under `apply`."""
    return Matrix(values)


def sided(carry: AxisMap, read: AxisMap | None = None, write: AxisMap | None = None) -> Sided:
    """Makes a map for each side; `read` and `write` are `carry` unless given."""
    return Sided(carry, read or carry, write or carry)


def resize(source: int, target: int) -> Matrix:
    """Resamples a grid axis bicubically like torch (a = -0.75, half-pixel centres, clamped, no antialiasing)."""
    a = -0.75
    values = np.zeros((target, source), np.float32)
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        base = int(np.floor(centre))
        for j in range(base - 1, base + 3):
            x = abs(centre - j)
            weight = ((a + 2) * x - (a + 3)) * x * x + 1 if x <= 1 else ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
            values[i, min(max(j, 0), source - 1)] += weight
    return Matrix(values)


def _abbreviate(rows: list[int]) -> str:
    return " ".join(map(str, rows)) if len(rows) <= 12 else f"{' '.join(map(str, rows[:6]))} ... {rows[-1]}"
