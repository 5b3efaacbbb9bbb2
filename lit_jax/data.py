"""Labelled pictures as a diffusion model sees them: pixels in [-1, 1], or cached latents."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from heirloom.common.data.pictures import Box, decode_record
from heirloom.common.data.sources import Record, SourceConfig

THIN = 64  # aspect ratio


def adm_crop(picture: Image.Image, size: int) -> np.ndarray:
    """The central square of guided-diffusion, uint8 [size, size, 3]: halved by boxes while twice too large, then bicubic."""
    short, long = sorted(picture.size)
    if long > THIN * short:  # resized whole it could fill the memory: a strip around the centre gives the same square
        left, top = ((side - min(side, 9 * short)) // 2 for side in picture.size)
        picture = Box(left, top, min(picture.width, 9 * short), min(picture.height, 9 * short)).cut(picture)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    return np.asarray(Box((picture.width - size) // 2, (picture.height - size) // 2, size, size).cut(picture))


def cropped(record: Record, size: int) -> np.ndarray:
    """The picture of a record through `adm_crop`. Raises InputError, naming the record, for one that does not decode."""
    return adm_crop(decode_record(record), size)


@dataclass(frozen=True)
class Pixels:
    """One record to `image` float32 [size, size, 3] in [-1, 1] and `label` int32."""

    size: int
    flips: float
    """Probability of the mirror image: 0.5 where left and right mean nothing, 0 for digits."""

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, Any]:
        pixels = cropped(record, self.size)
        if rng.random() < self.flips:
            pixels = pixels[:, ::-1]
        return {"image": pixels.astype(np.float32) / 127.5 - 1, "label": np.int32(record["label"])}


def latents(record: Record, rng: np.random.Generator) -> dict[str, Any]:
    """One record of a latent cache: `moments` [2, row, col, 2 channels] of picture and mirror image, and `label` int32."""
    return {"moments": record["moments"], "label": np.int32(record["label"])}


def is_latent(cfg: SourceConfig) -> bool:
    """Whether the data is a latent cache."""
    return (Path(cfg.path) / "moments.npy").is_file()
