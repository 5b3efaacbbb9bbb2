"""Decodes pictures to RGB, from files, encoded bytes, arrays or PIL images."""

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, UnidentifiedImageError

from heirloom.common.errors import InputError

Picture = str | Path | bytes | np.ndarray | Image.Image
"""A file, encoded bytes, a uint8 [height, width, 3] array, or a PIL image."""
Background = Literal["none", "white"]
BACKGROUNDS: tuple[Background, ...] = get_args(Background)


def is_one(images: Any) -> bool:
    """Returns whether this is one picture, and not several: a file, bytes, a PIL image, or an array of one picture."""
    one = isinstance(images, str | Path | bytes | bytearray | Image.Image)
    return one or (isinstance(images, np.ndarray) and images.ndim <= 3)


def several(images: Picture | Iterable[Picture]) -> list[Picture]:
    """Returns pictures, given as one or as several, as a list. Raises InputError for no picture and for other types."""
    if is_one(images):
        return [images]  # type: ignore[list-item]
    if not isinstance(images, Iterable):
        kind = type(images).__name__
        raise InputError(f"images is of type {kind}: give files, bytes, PIL images or uint8 arrays")
    if not (listed := list(images)):
        raise InputError("the list of pictures is empty: give one or more")
    return listed  # type: ignore[return-value]


def decode(image: Picture, background: Background = "none") -> Image.Image:
    """Decodes a picture to RGB like `PIL.Image.convert("RGB")`, which OpenAI's CLIP, open_clip and timm use.

    Alpha is dropped, 16-bit grey is clipped at 255, CMYK and palettes are converted. Of an animation the first frame is
    taken. The EXIF orientation is ignored. background: "white" composites transparent pixels on white instead of
    dropping alpha, like transformers. Raises InputError, with the name of the file if there is one, when the picture
    cannot be read.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InputError(f"a picture array must be uint8 [h, w, 3], not {image.dtype} {list(image.shape)}")
        image = Image.fromarray(image)
    name = "this picture"
    try:
        if isinstance(image, str | Path):
            name = str(image)
            image = Path(image).read_bytes()
        if isinstance(image, Image.Image):
            name = str(getattr(image, "filename", "")) or name
            picture = image
        elif isinstance(image, bytes | bytearray | memoryview):
            picture = Image.open(io.BytesIO(image))
        else:
            kind = type(image).__name__
            raise InputError(f"a picture must be a file name, bytes, a PIL image or a uint8 array, not {kind}")
        picture.load()
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{name} does not decode: its bytes are of no known picture format") from error
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file") from error
    except Exception as error:  # decoders raise many types for broken files, and PIL refuses huge ones
        raise InputError(f"{name} does not decode: {' '.join(str(error).split()) or type(error).__name__}") from error
    if not (picture.width and picture.height):
        raise InputError(f"{name} is empty: {picture.width} x {picture.height} pixels")
    if picture.mode == "F":
        raise InputError(f"{name} does not decode: the range of its float samples is unknown; store it with 8 bits")
    if background == "white" and picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def decode_record(record: Mapping[str, Any], background: Background = "none") -> Image.Image:
    """Decodes the picture of a record. Raises InputError naming the record."""
    try:
        return decode(record["image"], background)
    except InputError as error:
        raise InputError(f"{record['key']}: {error}; replace the file or take it out of the set") from error


@dataclass(frozen=True)
class Box:
    """A rectangle of a picture, in pixels."""

    left: int
    top: int
    width: int
    height: int

    def cut(self, picture: Image.Image) -> Image.Image:
        """Crops a picture to this rectangle."""
        return picture.crop((self.left, self.top, self.left + self.width, self.top + self.height))
