"""Labelled pictures for a classifier: streamed in batches, or kept on the devices if they fit."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from heirloom.common.data.bad import BAD, BadMode, Examples, WrongData
from heirloom.common.data.batches import Batches
from heirloom.common.data.class_names import Names
from heirloom.common.data.labelled import open_labelled
from heirloom.common.data.pictures import decode_record
from heirloom.common.data.pipeline import PipelineConfig, host_rows
from heirloom.common.data.preprocess import Preprocess, centre, random_box, resized
from heirloom.common.data.sources import Record, Source, SourceConfig
from heirloom.common.errors import InputError
from heirloom.common.mesh import batch_sharding, replicated
from learngene.augment import AugmentConfig
from learngene.randaugment import RandAugment

LOGITS = "teacher_logits"  # the column of a teacher's cached logits


@dataclass(frozen=True)
class Example:
    """Turns a record into `image` uint8 [(views,) size, size, 3], `label` int32, and teacher's logits if any.

    classes: number of the logits. Raises WrongData for another number of them.
    """

    cfg: AugmentConfig
    pre: Preprocess
    classes: int

    @cached_property
    def randaugment(self) -> RandAugment | None:
        fill = tuple(round(255 * mean) for mean in self.pre.mean)
        return RandAugment.parse(self.cfg.randaugment, fill) if self.cfg.randaugment else None

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, Any]:
        picture = decode_record(record, self.pre.background)
        views = [self.view(picture, rng) for _ in range(self.cfg.views)]
        example = {"image": views[0] if len(views) == 1 else np.stack(views), "label": np.int32(record["label"])}
        return example | ({LOGITS: self.logits(record)} if LOGITS in record else {})

    def logits(self, record: Record) -> np.ndarray:
        """The teacher's logits of a record, f32 [classes]."""
        try:
            found = np.asarray(record[LOGITS], np.float32)
        except (TypeError, ValueError):  # text, or rows of several lengths
            found = None
        if found is None or found.shape != (self.classes,):
            given = repr(record[LOGITS])[:40] if found is None else f"numbers of shape {list(found.shape)}"
            needed = f"the student has {self.classes} classes: store a list of {self.classes} numbers for each picture"
            raise WrongData(f"{record['key']}: its {LOGITS} are {given}, and {needed}")
        return found

    def view(self, picture: Image.Image, rng: np.random.Generator) -> np.ndarray:
        if self.cfg.crop == "resized":
            box = random_box(*picture.size, self.cfg.scale, rng)
            picture = resized(box.cut(picture), self.pre)
        else:
            picture = centre(picture, self.pre.cropped(1.0))
        return np.asarray(self.randaugment(picture, rng) if self.randaugment else picture)


def resident(arrays: dict[str, np.ndarray], cfg: PipelineConfig, mesh: Mesh) -> Batches:
    """Batches from arrays that every device holds completely, so that training decodes and copies nothing.

    The seed gives the order. Every epoch has each example once, and a batch may span two epochs. arrays: of `decoded`.
    Raises InputError for fewer examples than a batch, a batch that the devices do not divide, and several processes.
    """
    rows, examples = host_rows(cfg.batch, mesh), len(arrays["label"])
    if examples < cfg.batch:
        fewer = f"{examples} examples, fewer than a batch of {cfg.batch}"
        raise InputError(f"the data has {fewer}: set pipeline.batch to at most {examples}")
    if jax.process_count() > 1:
        this = f"this job has {jax.process_count()}"
        raise InputError(f"storage 'device' needs one process, {this}: set storage to 'stream'")
    bad = arrays.get(BAD, np.full(examples, "[]"))
    kept = jax.device_put({name: value for name, value in arrays.items() if name != BAD}, replicated(mesh))
    take = jax.jit(
        lambda arrays, rows: {name: jnp.take(value, rows, axis=0) for name, value in arrays.items()},
        out_shardings=batch_sharding(mesh),
    )

    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((cfg.seed, epoch)).permutation(examples)

    def start(first: int) -> Iterator[dict[str, Any]]:
        for n in itertools.count(first):
            positions = n * cfg.batch + rows
            epochs = positions // examples
            parts = (order(int(epoch))[positions[epochs == epoch] % examples] for epoch in np.unique(epochs))
            chosen = np.concatenate(list(parts))
            yield take(kept, chosen) | {BAD: bad[chosen]}

    settings = {"examples": examples, "batch": cfg.batch, "seed": cfg.seed}
    return Batches(start, settings, rows=rows, bad_limit=cfg.bad_limit)


@lru_cache(maxsize=2)  # several models learn from the same pictures
def decoded(
    data: SourceConfig,
    label: str,
    classes: int,
    example: Example,
    bad: BadMode = "replace",
    names: Names | None = None,
) -> dict[str, np.ndarray]:
    """Decode all examples in threads, to arrays [n, ...]. names: of the classes, if the model has some.

    Raises the errors of `open_labelled` and `Examples`.

    The column BAD says which examples replace bad records.
    """
    import grain

    source = open_labelled(data, label, classes, names)
    mapped = grain.MapDataset.range(len(source)).seed(0).random_map(Examples(source, example, bad))
    stream = mapped.to_iter_dataset(grain.ReadOptions(8, 64))
    examples = list(stream)
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]}


@lru_cache(maxsize=2)
def evaluation(
    data: SourceConfig,
    label: str,
    pre: Preprocess,
    batch: int,
    classes: int,
    names: Names | None = None,
) -> "Evaluation":
    """Open held-out pictures. names: class names of the model. Raises the errors of `open_labelled`."""
    return Evaluation(name=data.path, source=open_labelled(data, label, classes, names), pre=pre, batch=batch)


@dataclass(frozen=True)
class Evaluation:
    """Held-out pictures in batches of one size; the last is padded with pictures of label -1."""

    name: str
    source: Source
    pre: Preprocess
    batch: int

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        if len(self) <= 20_000 and self.pre.size <= 64:
            yield from self._kept
        else:
            yield from self._read()

    @cached_property
    def _kept(self) -> list[dict[str, np.ndarray]]:
        return list(self._read())

    def _read(self) -> Iterator[dict[str, np.ndarray]]:
        import grain

        mapped = grain.MapDataset.source(self.source).map(self._example)
        stream = mapped.to_iter_dataset(grain.ReadOptions(8, 2 * self.batch))
        for part in stream.batch(self.batch):
            missing = self.batch - len(part["label"])
            image = np.concatenate([part["image"], np.zeros((missing, *part["image"].shape[1:]), np.uint8)])
            yield {"image": image, "label": np.concatenate([part["label"], np.full(missing, -1, np.int32)])}

    def _example(self, record: Record) -> dict[str, Any]:
        picture = centre(decode_record(record, self.pre.background), self.pre)
        return {"image": np.asarray(picture), "label": np.int32(record["label"])}


def forget() -> None:
    """Drop the pictures that `decoded` and `evaluation` keep: on disk there may be others by now."""
    decoded.cache_clear()
    evaluation.cache_clear()


def columns(data: SourceConfig, logits: bool) -> SourceConfig:
    """Add the column of a teacher's cached logits, if `logits`."""
    return replace(data, columns=(*data.columns, LOGITS)) if logits else data
