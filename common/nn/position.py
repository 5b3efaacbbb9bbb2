"""Fixed position tables."""

from typing import NamedTuple

import numpy as np


class Sides(NamedTuple):
    """The two parts of a sine-cosine table: rows [rows, width / 2] and columns [cols, width / 2], float32."""

    row: np.ndarray
    col: np.ndarray


def sincos_sides(rows: int, cols: int, width: int, span: float | None = None) -> Sides:
    """Returns the parts of `sincos`, which are much smaller than the table."""
    if width % 4:
        raise ValueError(f"a sine-cosine table needs a width that is a multiple of 4, not {width}")
    frequency = 10000.0 ** -(np.arange(width // 4) / (width / 4))

    def side(count: int) -> np.ndarray:
        angle = np.outer(np.arange(count) if span is None else np.arange(count) * span / count, frequency)
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)

    return Sides(side(rows), side(cols))


def sincos(rows: int, cols: int, width: int, span: float | None = None) -> np.ndarray:
    """Returns the two-dimensional sine-cosine table of MAE and DiT: [rows, cols, width] float32, computed in float64.

    The first half of the channels encodes the column, the second half the row. Each half is the sines, then the
    cosines, of a coordinate at width / 4 frequencies from 1 down to 1/10000. The coordinate is the index, or, with a
    span, runs from 0 to just below `span` on both sides, however many rows and columns there are. Raises ValueError
    when width is not a multiple of 4.
    """
    row, col = sincos_sides(rows, cols, width, span)
    shape = (rows, cols, width // 2)
    return np.concatenate([np.broadcast_to(col, shape), np.broadcast_to(row[:, None], shape)], axis=2)
