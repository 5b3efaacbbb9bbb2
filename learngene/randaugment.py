"""RandAugment in timm's notation, `rand-m9-mstd0.5-inc1`: seeded, on PIL pictures.

No maintained library has timm's increasing operations without torch; the operations are Pillow's.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from heirloom.common.errors import InputError

LARGEST = 10.0  # largest magnitude
APPLIED = 0.5  # probability of each chosen operation
ROTATE, SHEAR, TRANSLATE, ENHANCE = 30.0, 0.3, 0.45, 0.9  # degrees, and shares, at the largest magnitude

Operation = Callable[[Image.Image, float, np.random.Generator, tuple[int, ...]], Image.Image]


@dataclass(frozen=True)
class RandAugment:
    """Draw `operations` of fifteen with replacement; apply each with probability 0.5 at about `magnitude`."""

    magnitude: float
    spread: float
    """Standard deviation of the magnitude; inf, as timm reads an mstd above 100: uniform from 0 up to it."""
    operations: int = 2
    fill: tuple[int, ...] = (124, 116, 104)
    """Fill colour for rotations and shifts: the mean of the data."""

    @classmethod
    def parse(cls, text: str, fill: tuple[int, ...] = fill) -> "RandAugment":
        """Parse timm's notation: m magnitude, mstd spread, n operations, inc1. Raises InputError for anything else."""
        found = re.fullmatch(r"rand-m(\d+)(?:-n(\d+))?-mstd(\d+\.?\d*|\.\d+)-inc1", text)
        if not found:
            raise InputError(f"randaugment {text!r} is not understood: write rand-m9-mstd0.5-inc1, or leave it empty")
        spread = float(found[3]) if float(found[3]) <= 100 else math.inf
        return cls(magnitude=float(found[1]), spread=spread, operations=int(found[2] or 2), fill=fill)

    def __call__(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        for name in rng.choice(list(OPERATIONS), self.operations):
            if rng.random() < APPLIED:
                picture = OPERATIONS[name](picture, self._drawn(rng), rng, self.fill)
        return picture

    def _drawn(self, rng: np.random.Generator) -> float:
        """A magnitude as a share of the largest."""
        uniform = self.spread == math.inf
        drawn = rng.uniform(0, self.magnitude) if uniform else rng.normal(self.magnitude, self.spread)
        return float(np.clip(drawn, 0, LARGEST)) / LARGEST


def _signed(value: float, rng: np.random.Generator) -> float:
    return value if rng.random() < 0.5 else -value


def _affine(
    matrix: Callable[[float, Image.Image], tuple[float, ...]],
    largest: float,
    picture: Image.Image,
    m: float,
    rng: np.random.Generator,
    fill: tuple[int, ...],
) -> Image.Image:
    """Apply an affine map: output pixel (x, y) is input pixel (a x + b y + c, d x + e y + f)."""
    data = matrix(_signed(m * largest, rng), picture)
    return picture.transform(picture.size, Image.Transform.AFFINE, data, resample=_filter(rng), fillcolor=fill)


def _filter(rng: np.random.Generator) -> Image.Resampling:
    return (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)[rng.integers(2)]


def _rotate(picture: Image.Image, m: float, rng: np.random.Generator, fill: tuple[int, ...]) -> Image.Image:
    return picture.rotate(_signed(m * ROTATE, rng), resample=_filter(rng), fillcolor=fill)


def _enhance(
    enhancer: type, picture: Image.Image, m: float, rng: np.random.Generator, fill: tuple[int, ...]
) -> Image.Image:
    return enhancer(picture).enhance(max(0.1, 1 + _signed(m * ENHANCE, rng)))


def _solarize_add(picture: Image.Image, m: float, rng: np.random.Generator, fill: tuple[int, ...]) -> Image.Image:
    add = min(128, int(m * 110))
    return picture.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda picture, m, rng, fill: ImageOps.autocontrast(picture),
    "equalize": lambda picture, m, rng, fill: ImageOps.equalize(picture),
    "invert": lambda picture, m, rng, fill: ImageOps.invert(picture),
    "rotate": _rotate,
    "posterize": lambda picture, m, rng, fill: ImageOps.posterize(picture, max(4 - int(m * 4), 1)),
    "solarize": lambda picture, m, rng, fill: ImageOps.solarize(picture, 256 - min(256, int(m * 256))),
    "solarize_add": _solarize_add,
    "color": partial(_enhance, ImageEnhance.Color),
    "contrast": partial(_enhance, ImageEnhance.Contrast),
    "brightness": partial(_enhance, ImageEnhance.Brightness),
    "sharpness": partial(_enhance, ImageEnhance.Sharpness),
    "shear_x": partial(_affine, lambda s, picture: (1, s, 0, 0, 1, 0), SHEAR),
    "shear_y": partial(_affine, lambda s, picture: (1, 0, 0, s, 1, 0), SHEAR),
    "translate_x": partial(_affine, lambda s, picture: (1, 0, s * picture.width, 0, 1, 0), TRANSLATE),
    "translate_y": partial(_affine, lambda s, picture: (1, 0, 0, 0, 1, s * picture.height), TRANSLATE),
}
