"""Batches of a source: shuffled, augmented, tokenised, placed on the mesh, and resumable bit for bit.

The example at position p of the stream, including its pixels, depends only on the seed and p: not on worker processes,
threads, hosts and restarts. So does the record that replaces a bad one (`bad.py`).
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from heirloom.common.data.bad import BAD, BadMode, Example, Examples
from heirloom.common.data.batches import Batch, Batches
from heirloom.common.data.grid import save_grid
from heirloom.common.data.grouped import SameGroup
from heirloom.common.data.pictures import decode_record
from heirloom.common.data.preprocess import Preprocess, denormalise, eval_image, train_image
from heirloom.common.data.sources import Record, Source
from heirloom.common.data.sources.record import tags_of
from heirloom.common.data.tokenizer_files import CaptionTokenizer
from heirloom.common.errors import InputError, between, check_seed, positive
from heirloom.common.mesh import batch_sharding, row_shards

AugmentName = Literal["random", "none"]
ON_DEVICE = 2  # batches whose copy to the devices runs ahead of the step
GRID = 64  # pictures `check_first_batch` draws at most


@dataclass(frozen=True)
class PipelineConfig:
    """How a source becomes training batches."""

    batch: int = 1024
    """examples per step, over all hosts"""
    seed: int = 0
    """seed of order and augmentation"""
    workers: int = 0
    """processes that prepare batches on each host; 0: threads of the training process"""
    prefetch: int = 4
    """batches each host prepares ahead"""
    tags: float = 0.0
    """probability that each of a record's `tags` is appended to its caption"""
    bad: BadMode = "replace"
    """a record that is unreadable, does not decode, or has no caption or class: another takes its place, or the run
    stops
    """
    bad_limit: float = 1e-3
    """share of replaced examples above which the run stops, judged once it has seen 10,000 examples"""

    def __post_init__(self) -> None:
        positive(self, "batch")
        check_seed(self.seed)
        between(self, "workers", "prefetch", "bad_limit")
        between(self, "tags", most=1.0)


@dataclass(frozen=True)
class Augment:
    """Converts a record to a training example of a CLIP; without a tokenizer, captions are left out.

    augment: "random": a random crop, and a random caption of several; "none": the centre and the first caption, as in
    evaluation.
    """

    pre: Preprocess
    tokenizer: CaptionTokenizer | None
    context: int
    tags: float = 0.0
    augment: AugmentName = "random"

    def check(self, record: Record) -> None:
        """Raises InputError when the record lacks required captions or tags, or tags are drawn without augmentation."""
        if self.tags and self.augment == "none":
            raise InputError('tags are drawn at random: set pipeline.tags to 0, or augment to "random"')
        check_record(record, self.tokenizer is not None, self.tags)

    def __call__(self, record: Record, rng: np.random.Generator) -> Batch:
        columns = ((k, v) for k, v in record.items() if k not in ("image", "text"))
        example = {k: v for k, v in columns if isinstance(v, np.ndarray | np.generic)}
        check_record(record, self.tokenizer is not None, self.tags)
        if self.tokenizer is not None:
            text = record["text"]
            caption = (
                text if isinstance(text, str) else text[rng.integers(len(text)) if self.augment == "random" else 0]
            )
            if self.tags:
                caption = ", ".join([caption, *(tag for tag in tags_of(record) if rng.random() < self.tags)])
            example["text"] = self.tokenizer(caption, self.context)[0]
        if "image" in record:
            picture = decode_record(record, self.pre.background)
            example["image"] = (
                train_image(picture, self.pre, rng) if self.augment == "random" else eval_image(picture, self.pre)
            )
        return example


def training_batches(
    source: Source,
    cfg: PipelineConfig,
    example: Example,
    *,
    mesh: Mesh | None = None,
    groups: np.ndarray | None = None,
) -> Batches:
    """Makes the endless stream of training batches: each epoch has every example once, in another order.

    example(record, rng): converts a record to arrays; rng: generator of its position in the stream. groups: int, of
    every example, from 0: then the examples of a batch are of one group, whose arrays may have other shapes, and a bad
    record is replaced by one of its group. Without a mesh, a host gets its rows as numpy arrays. With a mesh, batches
    are global `jax.Array`s, rows split over `data` and `fsdp`, copied ahead of the step. Raises InputError when the
    source is smaller than a batch or the batch cannot be divided, and, while iterating, what `Examples` raises.
    """
    from heirloom.common.data import stream as streams

    if len(source) < cfg.batch:
        raise InputError(f"the data has {len(source)} examples, fewer than a batch of {cfg.batch}; lower the batch")
    rows = host_rows(cfg.batch, mesh)
    # grain shuffles by (seed, epoch) and seeds `random_map` by (seed, position): only the position matters.
    if groups is None:
        order, candidates = streams.shuffled(len(source), cfg.seed), None
    else:
        order, candidates = streams.GroupedIndices(groups, cfg.batch, cfg.seed).seed(cfg.seed), SameGroup(groups)
    stream = order.random_map(Examples(source, example, cfg.bad, candidates))

    def start(first: int) -> Iterator[Batch]:
        mine = streams.HostRows(stream, rows, cfg.batch, first)
        if cfg.workers:
            ahead = streams.in_processes(mine, len(rows), cfg.workers, cfg.prefetch)
        else:
            ahead = streams.in_threads(mine, len(rows), cfg.prefetch)
        if mesh is not None:
            ahead = streams.ahead(ahead.map(Place(mesh, cfg.batch)), ON_DEVICE)
        return iter(ahead)

    settings = {"examples": len(source), "batch": cfg.batch, "seed": cfg.seed}
    return Batches(start, settings, rows=rows, bad_limit=cfg.bad_limit)


def check_record(record: Record, captions: bool = True, tags: float = 0.0) -> None:
    """Raises InputError when a record lacks captions or, where they are drawn with a probability, tags."""
    if captions and "text" not in record:
        raise InputError(f"{record['key']} has no caption; name its column with text, or add captions")
    if tags:
        tags_of(record)


def host_rows(batch: int, mesh: Mesh | None) -> np.ndarray:
    """Returns the rows of a global batch that this process builds: int [rows], ascending.

    Raises InputError when processes do not divide the batch.
    """
    if mesh is None:
        hosts = jax.process_count()
        if batch % hosts:
            raise InputError(f"a batch of {batch} cannot be divided among {hosts} hosts")
        return np.arange(batch).reshape(hosts, -1)[jax.process_index()]
    sharding = batch_sharding(mesh)
    if batch % (shards := row_shards(mesh)):
        raise InputError(f"a batch of {batch} cannot be divided into {shards} parts (mesh data x fsdp)")
    # From the sharding, not the process number: a host may have any rows, and share them with another.
    parts = sharding.addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[where] for where in parts]))


@dataclass(frozen=True)
class Place:
    """Converts this host's rows to global arrays. The copy is asynchronous: the call returns before it is done."""

    mesh: Mesh
    batch: int

    def __call__(self, batch: Batch) -> Batch:
        place, bad = jax.make_array_from_process_local_data, {BAD: batch.pop(BAD)}
        return {k: place(batch_sharding(self.mesh), v, (self.batch, *v.shape[1:])) for k, v in batch.items()} | bad


@dataclass(frozen=True)
class Prepare:
    """Converts a record to an evaluation example, without randomness; captions stay a list."""

    pre: Preprocess

    def __call__(self, index: int, record: Record) -> Record:
        example = {k: v for k, v in record.items() if k not in ("key", "image")} | {"index": index}
        if "image" not in record:
            return example
        return example | {"image": eval_image(decode_record(record, self.pre.background), self.pre)}


def evaluation_batches(
    source: Source, batch: int, pre: Preprocess, tokenizer: CaptionTokenizer | None = None, context: int = 77
) -> Iterator[dict[str, np.ndarray]]:
    """Iterates over every example once, in order, as numpy arrays; the last batch may be short.

    `image` float32 [b, size, size, 3]; with a tokenizer `text` int32 [captions, context] and `owner` int64 [captions],
    the index in the source of the picture that each caption describes (captions = b unless pictures have several);
    every other column as an array of b (numbers, strings, or objects for lists). Raises InputError for a picture that
    does not decode.
    """
    check_record(source[0], tokenizer is not None)
    import grain

    stream = grain.MapDataset.source(source).map_with_index(Prepare(pre))
    threads = min(16, os.cpu_count() or 1)
    examples = stream.to_iter_dataset(grain.ReadOptions(threads, max(threads, batch)))
    return iter(examples.batch(batch, batch_fn=Collate(tokenizer, context)))


@dataclass(frozen=True)
class Collate:
    """Joins evaluation examples to a batch."""

    tokenizer: CaptionTokenizer | None
    context: int

    def __call__(self, examples: Sequence[Record]) -> dict[str, np.ndarray]:
        out = {k: _column([e[k] for e in examples]) for k in examples[0] if k not in ("index", "text")}
        if self.tokenizer is not None:
            captions = [[e["text"]] if isinstance(e["text"], str) else e["text"] for e in examples]
            out["text"] = self.tokenizer([c for several in captions for c in several], self.context)
            out["owner"] = np.repeat([e["index"] for e in examples], [len(several) for several in captions])
        return out


def _column(values: list[Any]) -> np.ndarray:
    return np.fromiter(values, object, len(values)) if isinstance(values[0], list) else np.stack(values)


def check_first_batch(
    batch: Batch, tokenizer: CaptionTokenizer, path: str | Path | None = None, pre: Preprocess | None = None
) -> str:
    """Draws the first pictures as a grid to the PNG `path` and returns the first caption: a check before a long run.

    batch: of either iterator; of a global array, this host's first shard is used. pre: whose normalisation to invert
    (default: CLIP's).
    """
    host = {k: np.asarray(v.addressable_data(0)) if isinstance(v, jax.Array) else v for k, v in batch.items()}
    if path is not None:
        save_grid(denormalise(host["image"][:GRID], pre or Preprocess()), Path(path), least=0)
    return tokenizer.decode(host["text"][0])
