"""The heights and widths that PixArt-Σ and LiT were trained on: forty ratios at each of four areas."""

from collections.abc import Sequence
from typing import Literal

from heirloom.common.errors import InputError

# Height x width at 512 px; half of it at 256 px, twice at 1024, four times at 2048 (PixArt-Σ's multi-scale buckets).
_AT_512 = (
    "256x1024 256x992 256x960 256x928 288x896 288x864 288x832 320x800 320x768 352x736 352x704 352x672 384x672 384x640 "
    "416x608 416x576 448x576 448x544 480x544 480x512 512x512 512x480 544x480 544x448 576x448 576x416 608x416 640x384 "
    "672x384 704x352 736x352 768x320 800x320 832x288 864x288 896x288 928x256 960x256 992x256 1024x256"
)
PIXELS = {32: 256, 64: 512, 128: 1024, 256: 2048}
"""Side of the square pictures, by the side of their latents."""

Ratios = Literal["square", "ten", "forty"]
_TEN = "320x800 384x672 416x608 448x576 480x544 512x512 544x480 576x448 608x416 672x384"


def bucket_sizes(ratios: Ratios, side: int, step: int) -> list[tuple[int, int]]:
    """Returns the (height, width) of the pictures that a model for squares of `side` pixels is trained on.

    ratios: the square alone, the forty of PixArt-Σ, or ten of them, for fewer compilations. step: heights and widths
    are multiples of so many pixels.
    """
    pairs = {"square": "512x512", "ten": _TEN, "forty": _AT_512}[ratios].split()
    at_512 = [tuple(map(int, pair.split("x"))) for pair in pairs]
    scaled = [(_scaled(height, side, step), _scaled(width, side, step)) for height, width in at_512]
    return list(dict.fromkeys(scaled))


def _scaled(length: int, side: int, step: int) -> int:
    return max(step, round(length * side / 512 / step) * step)


def nearest_ratio(sizes: Sequence[tuple[int, int]], height: int, width: int) -> int:
    """Returns the number of the size whose ratio is nearest to that of a picture, as PixArt does."""
    return min(range(len(sizes)), key=lambda i: abs(sizes[i][0] / sizes[i][1] - height / width))


def trained_sizes(size: int) -> list[tuple[int, int]]:
    """Returns the (height, width) that a model for square latents of `size` was trained on; [] for an unknown size."""
    if size not in PIXELS:
        return []
    pairs = (pair.split("x") for pair in _AT_512.split())
    return [(int(height) * PIXELS[size] // 512, int(width) * PIXELS[size] // 512) for height, width in pairs]


def nearest_size(size: int, height: int, width: int) -> tuple[int, int]:
    """Returns the trained (height, width) whose ratio is nearest to a request; the request itself for an unknown
    size.
    """
    sizes = trained_sizes(size)
    return sizes[nearest_ratio(sizes, height, width)] if sizes else (height, width)


def parse_size(text: str) -> tuple[int, int]:
    """Reads "512" or "HEIGHTxWIDTH", in pixels. Raises InputError for anything else."""
    parts = text.lower().split("x")
    if len(parts) in (1, 2) and all(part.isdecimal() and 0 < int(part) <= 2**16 for part in parts):
        return int(parts[0]), int(parts[-1])
    raise InputError(f"--size {text}: give pixels as HEIGHTxWIDTH, such as 1024x1024 or 512x768")
