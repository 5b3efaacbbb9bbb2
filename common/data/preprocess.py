"""Preprocessing of pictures: resize, crop, normalise, with torchvision's formulas on PIL and numpy."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from heirloom.common.data.pictures import BACKGROUNDS, Background, Box, Picture, decode, is_one, several
from heirloom.common.errors import InputError, nearest
from heirloom.common.files import read_json, write_json

RATIO = (3 / 4, 4 / 3)  # torchvision's default, which every CLIP recipe keeps
TRIES = 10
AFFORDABLE = 2**24  # pixels of a resized picture; above, only the crop is computed
FILE = "preprocess.json"
_REACH = {"nearest": 0.5, "box": 0.5, "bilinear": 1.0, "hamming": 1.0, "bicubic": 2.0, "lanczos": 3.0}  # source pixels
FILTERS = {name: Image.Resampling[name.upper()] for name in _REACH}

Mode = Literal["shortest", "squash", "longest"]
Corner = Literal["round", "down"]
Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing of the pictures of a model; saved next to its weights as `preprocess.json`.

    Evaluation: resize, crop the centre, (x / 255 - mean) / std. Training: a random crop (`scale`), resized to `size`,
    normalised.
    """

    size: int = 224
    """side of the model's square input, in pixels"""
    mean: Channels = (0.48145466, 0.4578275, 0.40821073)
    """per channel, of values in 0..1 (CLIP's)"""
    std: Channels = (0.26862954, 0.26130258, 0.27577711)
    """per channel, of values in 0..1 (CLIP's)"""
    interpolation: str = "bicubic"
    """one of PIL's resampling filters: nearest, box, bilinear, hamming, bicubic, lanczos"""
    scale: tuple[float, float] = (0.9, 1.0)
    """share of the area that a training crop keeps, least and most"""
    resize: int | None = None
    """side that an evaluation picture is resized to before the centre crop; none: not recorded, which is `size` for a
    CLIP
    """
    mode: Mode = "shortest"
    """which side becomes `resize`: the shorter one; both, which changes the aspect ratio (squash); or the longer one,
    padded to a square
    """
    corner: Corner = "round"
    """rounding of half pixels of the crop's corner: to even like torchvision, or down like transformers"""
    fill: int = 0
    """grey value of the padding, 0..255, for the mode longest"""
    background: Background = "none"
    """none drops alpha, like timm; white composites transparent pixels on white, like transformers; last drops alpha
    after resize and crop, like OpenAI's CLIP and open_clip: PIL makes transparent pixels black then, and resizes
    palettes by nearest
    """

    def __post_init__(self) -> None:
        names = {"mode": get_args(Mode), "corner": get_args(Corner)}
        names |= {"background": BACKGROUNDS, "interpolation": tuple(FILTERS)}
        for name, choices in names.items():
            if (value := getattr(self, name)) not in choices:
                hint = nearest(value, choices) if isinstance(value, str) else ""
                raise InputError(f"no {name} {value!r}{hint} (there are {', '.join(choices)})")
        for name in ("size", "resize"):
            value = getattr(self, name)
            if not (_is_integer(value) and value >= 1) and not (name == "resize" and value is None):
                raise InputError(f"{name} is {value!r}: give pixels, a whole number of 1 or more")
        if self.resize is not None and (
            self.resize < self.size or (self.mode == "longest" and self.resize != self.size)
        ):
            raise InputError(f"resize is {self.resize} and size {self.size}: resize must be at least the crop's size")
        for name, count in (("mean", 3), ("std", 3), ("scale", 2)):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != count or not all(_is_number(v) for v in value):
                raise InputError(f"{name} is {value!r}: give {count} finite numbers")
        if min(self.std) <= 0:
            raise InputError(f"std is {self.std!r}: pixels are divided by it, so give numbers above 0")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            share = "the least and the most share of the area, above 0 and at most 1"
            raise InputError(f"scale is {self.scale!r}: give {share}")
        if not (_is_integer(self.fill) and 0 <= self.fill <= 255):
            raise InputError(f"fill is {self.fill!r}: give a grey value, a whole number from 0 to 255")

    @property
    def filter(self) -> Image.Resampling:
        """PIL's filter of `interpolation`."""
        return FILTERS[self.interpolation]

    def at(self, size: int) -> "Preprocess":
        """Returns the preprocessing for a model of another input size; `resize` scales with it."""
        resize = self.resize and self.resize * size // self.size
        return replace(self, size=size, resize=resize)

    def cropped(self, share: float) -> "Preprocess":
        """Returns the preprocessing with a centre crop of this share of the side (timm's `crop_pct`: 0.875)."""
        if not (_is_number(share) and 0 < share <= 1):
            kept = "the share of the side that the centre crop keeps, above 0 and at most 1"
            raise InputError(f"crop is {share!r}: give {kept}")
        return replace(self, resize=self.size if self.mode == "longest" else math.floor(self.size / share))

    def save(self, path: str | Path) -> None:
        """Writes `preprocess.json` to the folder `path`, or the file `path` when it ends in .json."""
        write_json(_file(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Preprocess":
        """Reads what `save` wrote. Raises InputError for a missing file, an unknown field and an invalid value."""
        file = _file(path)
        values: dict[str, Any] = read_json(file)
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise InputError(f"{file}: unknown field {name!r}{nearest(name, known)}")
        settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        try:
            return cls(**settings)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".json" else path / FILE


def random_box(width: int, height: int, scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """Draws a training crop like torchvision: area uniform in `scale`, ratio log-uniform in 3/4..4/3.

    After ten tries it takes the largest central crop with an allowed ratio (`RandomResizedCrop.get_params`).
    """
    for _ in range(TRIES):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(height - h + 1))
            return Box(left=int(rng.integers(width - w + 1)), top=top, width=w, height=h)
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return Box(left=(width - w) // 2, top=(height - h) // 2, width=w, height=h)


def train_image(image: Image.Image, pre: Preprocess, rng: np.random.Generator) -> np.ndarray:
    """Crops randomly, resizes, normalises: float32 [size, size, 3]. No flip or colour change (CLIP, TinyCLIP §6)."""
    return normalise(resized(random_box(*image.size, pre.scale, rng).cut(image), pre), pre)


def resized(crop: Image.Image, pre: Preprocess) -> Image.Image:
    """Resizes a training crop: RGB [size, size]."""
    return _rgb(crop.resize((pre.size, pre.size), pre.filter))


def eval_image(image: Image.Image, pre: Preprocess) -> np.ndarray:
    """Resizes, crops the centre and normalises: float32 [size, size, 3]."""
    return normalise(centre(image, pre), pre)


def eval_images(images: Picture | Iterable[Picture], pre: Preprocess) -> np.ndarray:
    """Prepares pictures for evaluation: one or several, as files, bytes, PIL images or uint8 arrays.

    Returns [n, size, size, 3] f32. Raises InputError with the file, or the index in the list, for a picture that cannot
    be read.
    """
    return np.concatenate(list(eval_batches(images, pre, 1)))


def eval_batches(images: Picture | Iterable[Picture], pre: Preprocess, most: int) -> Iterator[np.ndarray]:
    """Yields the pictures of `eval_images`, up to `most` at a time, each decoded when its batch is asked for."""
    pixels: list[np.ndarray] = []
    for number, image in enumerate(several(images)):
        try:
            pixels.append(eval_image(decode(image, pre.background), pre))
        except InputError as error:
            where = "" if is_one(images) else f"picture number {number}, counted from 0: "
            raise InputError(f"{where}{error}") from error
        if len(pixels) == most:
            yield np.stack(pixels)
            pixels.clear()
    if pixels:
        yield np.stack(pixels)


def centre(image: Image.Image, pre: Preprocess) -> Image.Image:
    """Resizes a picture and crops its centre: RGB [size, size], like torchvision; for transformers see `corner`."""
    width, height = image.size
    side = pre.resize or pre.size
    if pre.mode == "longest":
        return _padded(image, pre)
    if pre.mode == "squash":
        target = (side, side)
    else:
        short = min(width, height)
        target = (int(side * width / short), int(side * height / short))  # torchvision truncates the longer side
    left, top = (_corner(length - pre.size, pre.corner) for length in target)
    box = Box(left=left, top=top, width=pre.size, height=pre.size)
    if target[0] * target[1] > AFFORDABLE:
        return _rgb(_resized_part(image, target, box, pre))
    return _rgb(box.cut(image.resize(target, pre.filter)))


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _corner(margin: int, rule: Corner) -> int:
    return margin // 2 if rule == "down" else round(margin / 2)


def _resized_part(image: Image.Image, target: tuple[int, int], box: Box, pre: Preprocess) -> Image.Image:
    """Computes `box.cut(image.resize(target))` without the whole resized picture, up to PIL's rounding."""
    low, high, first, last = [], [], [], []
    corner, part = (box.left, box.top), (box.width, box.height)
    for length, total, start, count in zip(image.size, target, corner, part, strict=True):
        step = length / total
        reach = _REACH[pre.interpolation] * max(step, 1.0) + 1
        low.append(max(0, math.floor(start * step - reach)))
        high.append(min(length, math.ceil((start + count) * step + reach)))
        first.append(start * step - low[-1])
        last.append(min((start + count) * step - low[-1], high[-1] - low[-1]))
    window = image.crop((low[0], low[1], high[0], high[1]))
    return window.resize((box.width, box.height), pre.filter, box=(first[0], first[1], last[0], last[1]))


def _padded(image: Image.Image, pre: Preprocess) -> Image.Image:
    """Resizes the longer side to `size` and pads to a square (open_clip `ResizeKeepRatio`, `CenterCropOrPad`).

    Deviation: `fill` is a grey of every picture; open_clip pads palettes and alpha in their own mode, before RGB.
    """
    ratio = max(image.size) / pre.size
    width, height = (round(length / ratio) for length in image.size)
    if not (width and height):
        picture = f"a picture of {image.width} x {image.height} pixels"
        raise InputError(f"{picture} is too thin: its shorter side vanishes at {pre.size} pixels")
    out = Image.new("RGB", (pre.size, pre.size), (pre.fill,) * 3)
    out.paste(image.resize((width, height), pre.filter), ((pre.size - width) // 2, (pre.size - height) // 2))
    return out


def normalise(picture: Image.Image, pre: Preprocess) -> np.ndarray:
    """Computes (x / 255 - mean) / std: float32 [h, w, 3]."""
    pixels = np.array(picture, np.float32)
    # In place and row by row: numpy takes twelve times as long to repeat three numbers along the last axis.
    rows = pixels.reshape(len(pixels), -1)
    rows /= np.float32(255)
    rows -= np.tile(np.asarray(pre.mean, np.float32), picture.width)
    rows /= np.tile(np.asarray(pre.std, np.float32), picture.width)
    return pixels


def denormalise(pixels: np.ndarray, pre: Preprocess) -> np.ndarray:
    """Inverts `normalise`, for display: uint8, same shape."""
    return np.clip(np.rint((pixels * np.asarray(pre.std) + np.asarray(pre.mean)) * 255), 0, 255).astype(np.uint8)
