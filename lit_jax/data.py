"""Turns labelled pictures into a diffusion model's inputs: pixels in [-1, 1], or cached latents."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from heirloom.common.data.pictures import Box, decode_record
from heirloom.common.data.sources import Record, SourceConfig
from heirloom.common.errors import InputError
from heirloom.common.paths import place

MAX_ASPECT = 64  # pictures with a larger aspect ratio are cropped before they are resized


def adm_crop(picture: Image.Image, size: int) -> np.ndarray:
    """Crop the central square as guided-diffusion does, uint8 [size, size, 3]: box filter while it is twice too large,
    then bicubic.
    """
    short, long = sorted(picture.size)
    if (
        long > MAX_ASPECT * short
    ):  # resizing it whole could exhaust the memory; a strip around the centre gives the same square
        left, top = ((side - min(side, 9 * short)) // 2 for side in picture.size)
        picture = Box(
            left=left, top=top, width=min(picture.width, 9 * short), height=min(picture.height, 9 * short)
        ).cut(picture)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    centre = Box(left=(picture.width - size) // 2, top=(picture.height - size) // 2, width=size, height=size)
    return np.asarray(centre.cut(picture))


def cover_crop(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """Resize a picture until it covers the size (bicubic), and cut out the centre, as PixArt does: uint8 [height,
    width, 3].
    """
    scale = max(height / picture.height, width / picture.width)
    resized = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    # Only the part of the picture that is needed: resizing all of a long strip could exhaust the memory.
    cut = Box(left=(resized[0] - width) // 2, top=(resized[1] - height) // 2, width=width, height=height)
    x, y = picture.width / resized[0], picture.height / resized[1]
    box = (cut.left * x, cut.top * y, (cut.left + width) * x, (cut.top + height) * y)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=box))


def cropped(record: Record, size: int) -> np.ndarray:
    """Decode the picture of a record and crop it with `adm_crop`. Raises InputError, which names the record, if it does
    not decode.
    """
    return adm_crop(decode_record(record), size)


@dataclass(frozen=True)
class Pixels:
    """Turns a record into `image` float32 [size, size, 3] in [-1, 1] and `label` int32."""

    size: int
    flips: float
    """Probability of the mirror image: 0.5 where left and right mean nothing, 0 for digits."""

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, Any]:
        pixels = cropped(record, self.size)
        if rng.random() < self.flips:
            pixels = pixels[:, ::-1]
        return {"image": pixels.astype(np.float32) / 127.5 - 1, "label": np.int32(record["label"])}


def latents(record: Record, rng: np.random.Generator) -> dict[str, Any]:
    """Read a record of a latent cache: `moments` [2, row, col, 2 channels] of picture and mirror image, and `label`
    int32.
    """
    return {"moments": record["moments"], "label": np.int32(record["label"])}


def is_latent(cfg: SourceConfig) -> bool:
    """Tell whether the data is a latent cache."""
    return (place(cfg.path) / "moments.npy").is_file()


def check_latent(cfg: SourceConfig) -> None:
    """Raise InputError for pictures where a recipe reads latents."""
    exists = ":" in cfg.path or place(cfg.path).exists()
    if "moments" in cfg.columns and exists and not is_latent(cfg):
        ways = "cache the latents of its pictures first (heirloom cache RECIPE DIR --data.path PICTURES), and name DIR"
        raise InputError(f"{cfg.path} is no cache of latents, which this recipe reads: {ways}")
