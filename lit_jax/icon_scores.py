"""Scores of drawn icons without a network: is it the object of the prompt, and has it the colour of the prompt?"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from heirloom.common.data.pictures import decode_record
from heirloom.common.data.sources import Record, SourceConfig, open_source

INK = 0.5  # of the distance to white of a picture's darkest pixel: what is above is the icon


@dataclass(frozen=True)
class Icons:
    """Real icons: `prompts`, `objects` and `colours` of each, and `pictures` uint8 [n, 64, 64, 3]."""

    prompts: tuple[str, ...]
    objects: tuple[str, ...]
    colours: tuple[str, ...]
    pictures: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    def some(self, count: int, seed: int) -> "Icons":
        """Returns `count` of them at random, without repetition."""
        rows = np.random.default_rng(seed).permutation(len(self))[:count]
        prompts, objects, colours = (
            tuple(column[i] for i in rows) for column in (self.prompts, self.objects, self.colours)
        )
        return Icons(prompts, objects, colours, self.pictures[rows])


def read_icons(split: str) -> Icons:
    """Read the embedded icons of a split: "train", or "test" for the pairs of object and colour that are held out."""
    columns = ("object", "colour", "prompt")
    source = open_source(SourceConfig(path="icons", split=split, columns=columns))
    records: list[Record] = [source[i] for i in range(len(source))]
    prompts, objects, colours = (tuple(r[name] for r in records) for name in ("prompt", "object", "colour"))
    return Icons(prompts, objects, colours, np.stack([np.asarray(decode_record(record)) for record in records]))


@dataclass(frozen=True)
class Judge:
    """Tells objects and colours of icons apart, by the outlines and the colours of the training icons."""

    known: Icons

    @cached_property
    def _outlines(self) -> tuple[list[str], np.ndarray]:
        names = sorted(set(self.known.objects))
        ink, objects = ink_of(self.known.pictures), np.array(self.known.objects)
        return names, _normed(np.stack([ink[objects == name].mean(0) for name in names]))

    @cached_property
    def _colours(self) -> tuple[list[str], np.ndarray]:
        names, colours = sorted(set(self.known.colours)), np.array(self.known.colours)
        means = mean_colours(self.known.pictures)
        return names, np.stack([means[colours == name].mean(0) for name in names])

    def objects(self, pictures: np.ndarray) -> list[str]:
        """Returns for each picture the object whose outline is most similar (cosine of the ink)."""
        names, outlines = self._outlines
        return [names[i] for i in (_normed(ink_of(pictures)) @ outlines.T).argmax(1)]

    def colours(self, pictures: np.ndarray) -> list[str]:
        """Returns for each picture the name of the colour that is nearest to the mean of its inked pixels."""
        names, values = self._colours
        distance = np.square(mean_colours(pictures)[:, None] - values).sum(-1)
        return [names[i] for i in distance.argmin(1)]

    def scores(self, pictures: np.ndarray, objects: Sequence[str], colours: Sequence[str]) -> dict[str, float]:
        """Returns the shares of pictures with the right object, the right colour, and both."""
        right = np.array([found == name for found, name in zip(self.objects(pictures), objects, strict=True)])
        tinted = np.array([found == name for found, name in zip(self.colours(pictures), colours, strict=True)])
        return {"object": float(right.mean()), "colour": float(tinted.mean()), "both": float((right & tinted).mean())}


def ink_of(pictures: np.ndarray) -> np.ndarray:
    """Returns how far each pixel of uint8 pictures is from white, relative to the farthest: f64 [n, pixels]."""
    distance = np.sqrt(np.square(255.0 - pictures).sum(-1)).reshape(len(pictures), -1)
    return distance / np.maximum(distance.max(1, keepdims=True), 1.0)


def mean_colours(pictures: np.ndarray) -> np.ndarray:
    """Returns the mean colour of the inked pixels, [n, 3] from 0 to 255; white where there is no ink."""
    inked = (ink_of(pictures) > INK)[..., None]
    flat = pictures.reshape(len(pictures), -1, 3).astype(np.float64)
    count = inked.sum(1)
    return np.where(count > 0, (flat * inked).sum(1) / np.maximum(count, 1), 255.0)


def _normed(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
