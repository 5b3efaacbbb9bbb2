"""Fixed position tables."""

import numpy as np


def sincos(rows: int, cols: int, width: int, scale: float | tuple[float, float] = 1.0) -> np.ndarray:
    """Returns the two-dimensional sine-cosine table of MAE and DiT: [rows, cols, width] float32, computed in float64.

    The first half of the channels encodes the column, the second half the row. Each half is the sines, then the
    cosines, of the index divided by `scale` (of rows and columns), at width / 4 frequencies from 1 down to 1/10000.
    Raises ValueError when width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"a sine-cosine table needs a width that is a multiple of 4, not {width}")
    frequency = 10000.0 ** -(np.arange(width // 4) / (width / 4))
    scales = scale if isinstance(scale, tuple) else (scale, scale)
    row, col = (np.outer(np.arange(n) / s, frequency) for n, s in zip((rows, cols), scales, strict=True))
    row, col = (np.concatenate([np.sin(angle), np.cos(angle)], axis=1) for angle in (row, col))
    halves = np.broadcast_to(col, (rows, cols, width // 2)), np.broadcast_to(row[:, None], (rows, cols, width // 2))
    return np.concatenate(halves, axis=2).astype(np.float32)
