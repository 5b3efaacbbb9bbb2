"""Grids of pictures."""

from math import ceil, isqrt
from pathlib import Path

import numpy as np
from PIL import Image

from heirloom.common.files import staged


def grid(pictures: np.ndarray, columns: int | None = None) -> Image.Image:
    """Arranges pictures uint8 [n, height, width, 3] as one picture, row by row; empty cells are white."""
    n, height, width = pictures.shape[:3]
    columns = columns or isqrt(n - 1) + 1
    rows = ceil(n / columns)
    padded = np.concatenate([pictures, np.full((rows * columns - n, *pictures.shape[1:]), 255, np.uint8)])
    cells = padded.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    return Image.fromarray(cells.reshape(rows * height, columns * width, 3))


def is_picture(path: Path) -> bool:
    """Returns whether a name ends as that of a picture does."""
    return path.suffix.lower() in Image.registered_extensions()


def save_grid(pictures: np.ndarray, path: Path, columns: int | None = None, least: int = 256) -> None:
    """Writes a grid as PNG. least: a smaller grid is enlarged by a whole factor, up to this longer side, in pixels."""
    image = grid(pictures, columns)
    zoom = max(1, least // max(image.size))
    with staged(path, force=True) as file:
        image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(file, format="PNG")
