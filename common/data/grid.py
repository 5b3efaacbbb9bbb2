"""Grids of pictures."""

from math import ceil, isqrt
from pathlib import Path

import numpy as np
from PIL import Image

from heirloom.common.checkpoint.staging import staged


def grid(pictures: np.ndarray, columns: int | None = None) -> Image.Image:
    """Arranges pictures uint8 [n, side, side, 3] as one picture, row by row; empty cells are white."""
    n, side = len(pictures), pictures.shape[1]
    columns = columns or isqrt(n - 1) + 1
    rows = ceil(n / columns)
    padded = np.concatenate([pictures, np.full((rows * columns - n, *pictures.shape[1:]), 255, np.uint8)])
    tiles = padded.reshape(rows, columns, side, side, 3).swapaxes(1, 2)
    return Image.fromarray(tiles.reshape(rows * side, columns * side, 3))


def save_grid(pictures: np.ndarray, path: Path, columns: int | None = None, least: int = 256) -> None:
    """Writes a grid as PNG. least: a smaller grid is enlarged by a whole factor, up to this longer side, in pixels."""
    image = grid(pictures, columns)
    zoom = max(1, least // max(image.size))
    with staged(path, force=True) as file:
        image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(file, format="PNG")
