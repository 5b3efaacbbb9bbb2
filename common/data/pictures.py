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
"""A file, encoded bytes, a uint8 [height, width, 3] array, or a PIL image; also an open file and an array of jax or
torch.
"""
Background = Literal["none", "white", "last"]
BACKGROUNDS: tuple[Background, ...] = get_args(Background)


def is_one(images: Any) -> bool:
    """Returns whether this is one picture, and not several: a file, bytes, a PIL image, or an array of one picture.

    A dictionary counts as one, which `decode` refuses.
    """
    one = isinstance(images, str | Path | bytes | bytearray | Image.Image | Mapping) or hasattr(images, "read")
    return one or (hasattr(images, "__array__") and np.ndim(images) in (2, 3))


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
    """Decodes a picture to RGB like `PIL.Image.convert("RGB")`.

    Alpha is dropped, 16-bit grey is clipped at 255, CMYK and palettes are converted. Of an animation the first frame is
    taken. The EXIF orientation is ignored. background: "white" composites transparent pixels on white instead of
    dropping alpha, like transformers; "last" leaves the picture in its own mode, in which OpenAI's CLIP and open_clip
    resize it. Raises InputError, with the name of the file if there is one, when the picture cannot be read.
    """
    if hasattr(image, "__array__") and not isinstance(image, str | bytes | Image.Image):  # numpy's texts have it, too
        image = _from_array(image)
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
        elif hasattr(image, "read"):
            file: Any = image
            picture = Image.open(file)
        else:
            kind = type(image).__name__
            if isinstance(image, Mapping):
                kind = f"a dictionary ({', '.join(map(str, image))}): give one of its values"
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
    return picture if background == "last" else picture.convert("RGB")


def _from_array(given: Any) -> Image.Image:
    try:
        array = np.asarray(given)
    except Exception as error:  # torch raises several types for tensors with gradients or on a device
        why = " ".join(str(error).split())
        raise InputError(f"an array of type {type(given).__name__} cannot be read as numpy's ({why})") from error
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        what = f"a picture array must be uint8 [h, w, 3], not {array.dtype} {list(array.shape)}"
        steps = " and then ".join(_conversions(array))
        raise InputError(f"{what}{': with numpy, a = ' * bool(steps)}{steps}")
    return Image.fromarray(array)


def _conversions(array: np.ndarray) -> list[str]:
    """What to type to make a picture [h, w, 3] uint8 of an array `a` of pixels in another form; empty if unknown."""
    first, last = array.shape[0] if array.ndim else 0, array.shape[-1] if array.ndim == 3 else 0
    shapes = {
        "np.stack([a] * 3, -1)": array.ndim == 2,
        "np.repeat(a, 3, -1)": last == 1,
        "a[..., :3]": last == 4,
        "np.moveaxis(a, 0, -1)": last not in (0, 1, 3, 4) and first == 3,
    }
    steps = [step for step, fits in shapes.items() if fits]
    if not (steps or last == 3) or array.dtype.kind not in "iuf" or not array.size:
        return []
    if array.dtype == np.uint8:
        return steps
    if not (array.min() >= 0 and array.max() <= 255):  # normalised, say
        return []
    share = array.dtype.kind == "f" and array.max() <= 1
    return [*steps, "(255 * a).round().astype(np.uint8)" if share else "a.astype(np.uint8)"]


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
