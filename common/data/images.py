"""Pictures in, arrays out: decoding and CLIP's two transforms, the formulas of torchvision on PIL and numpy."""

import io
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.errors import InputError, nearest

RATIO = (3 / 4, 4 / 3)  # torchvision's default, which every CLIP recipe keeps
TRIES = 10


@dataclass(frozen=True)
class Preprocess:
    """What a picture becomes before the model sees it; saved beside weights as `preprocess.json`."""

    size: int = 224
    """side of the square the model sees, in pixels"""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """per channel, of values in 0..1 (CLIP's)"""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """per channel, of values in 0..1 (CLIP's)"""
    interpolation: str = "bicubic"
    """one of PIL's resampling filters: nearest, box, bilinear, hamming, bicubic, lanczos"""
    scale: tuple[float, float] = (0.9, 1.0)
    """share of the area a training crop keeps, least and most"""

    def __post_init__(self) -> None:
        filters = [f.name.lower() for f in Image.Resampling]
        if self.interpolation not in filters:
            raise InputError(f"no interpolation {self.interpolation!r}{nearest(self.interpolation, filters)} ({', '.join(filters)})")

    @property
    def filter(self) -> Image.Resampling:
        return Image.Resampling[self.interpolation.upper()]

    def save(self, path: str | Path) -> None:
        """Write `preprocess.json` into the folder `path`, or the file `path` itself when it ends in .json."""
        _file(path).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Preprocess":
        """Read what `save` wrote. Raises InputError for a missing file or a field of unknown name."""
        file = _file(path)
        try:
            values: dict[str, Any] = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{file} is not readable as the preprocessing of a model: {error}") from error
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise InputError(f"{file}: unknown field {name!r}{nearest(name, known)}")
        settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**settings)


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / "preprocess.json"


def decode(image: bytes | np.ndarray) -> Image.Image:
    """An RGB picture from encoded bytes or a uint8 [h, w, 3] array.

    Transparency is composited on white, 16-bit grey is scaled to 8, CMYK and palettes are converted, of an animation the
    first frame is taken; the EXIF orientation is not applied, as in CLIP's own training. Raises InputError when it does not decode.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError(f"a picture given as an array must be uint8 [h, w, 3], not {image.dtype} {list(image.shape)}")
        return Image.fromarray(image)
    try:
        picture: Image.Image = Image.open(io.BytesIO(image))
        picture.load()
    except Exception as error:  # a broken file raises whatever its decoder happened to trip over
        raise InputError(f"this picture does not decode: {error}") from error
    if picture.mode.startswith("I") or picture.mode == "F":
        return _deep(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _deep(picture: Image.Image) -> Image.Image:
    """16-bit grey to RGB. PIL's own conversion clips at 255, which turns such pictures white."""
    values = np.asarray(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise InputError(f"this picture does not decode: the range of its {picture.mode!r} samples is unknown; store it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")


@dataclass(frozen=True)
class Box:
    """A rectangle of a picture, in pixels."""

    left: int
    top: int
    width: int
    height: int

    def cut(self, picture: Image.Image) -> Image.Image:
        return picture.crop((self.left, self.top, self.left + self.width, self.top + self.height))


def random_box(width: int, height: int, scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """Where a training crop lies (torchvision `RandomResizedCrop.get_params`): area uniform in `scale`, ratio log-uniform in 3/4..4/3.

    Ten tries, then the largest central crop whose ratio is allowed.
    """
    for _ in range(TRIES):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(height - h + 1))
            return Box(int(rng.integers(width - w + 1)), top, w, h)
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return Box((width - w) // 2, (height - h) // 2, w, h)


def train_image(image: Image.Image, pre: Preprocess, rng: np.random.Generator) -> np.ndarray:
    """A random crop, resized and normalised: float32 [size, size, 3]. No flip and no colour change, as in CLIP and TinyCLIP §6."""
    crop = random_box(*image.size, pre.scale, rng).cut(image)
    return normalise(crop.resize((pre.size, pre.size), pre.filter), pre)


def eval_image(image: Image.Image, pre: Preprocess) -> np.ndarray:
    """Shorter side to `size` (antialiased), centre square, normalised: float32 [size, size, 3] (torchvision Resize, CenterCrop)."""
    width, height = image.size
    short = min(width, height)
    # torchvision truncates the longer side and rounds the crop's corner half to even.
    resized = image.resize((int(pre.size * width / short), int(pre.size * height / short)), pre.filter)
    left, top = round((resized.width - pre.size) / 2), round((resized.height - pre.size) / 2)
    return normalise(Box(left, top, pre.size, pre.size).cut(resized), pre)


def normalise(picture: Image.Image, pre: Preprocess) -> np.ndarray:
    """(x / 255 - mean) / std: float32 [h, w, 3]."""
    pixels = np.asarray(picture, np.float32) / np.float32(255)
    return (pixels - np.asarray(pre.mean, np.float32)) / np.asarray(pre.std, np.float32)


def denormalise(pixels: np.ndarray, pre: Preprocess) -> np.ndarray:
    """The way back, for the eye: uint8, same shape."""
    return np.clip(np.rint((pixels * np.asarray(pre.std) + np.asarray(pre.mean)) * 255), 0, 255).astype(np.uint8)
