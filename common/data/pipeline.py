"""From a source to the batches of a run: shuffled, augmented, tokenised, placed on the mesh, and resumable to the bit.

What stands at position p of the stream, pixels included, depends on the seed and on p alone. Worker processes, threads, hosts
and restarts only decide who computes it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import grain
import jax
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset
from jax.sharding import Mesh
from PIL import Image

from heirloom.common.data.pictures import decode_record
from heirloom.common.data.preprocess import Preprocess, denormalise, eval_image, train_image
from heirloom.common.data.sources import Record, Source
from heirloom.common.data.text import Tokenizer
from heirloom.common.errors import InputError
from heirloom.common.train.mesh import batch_sharding

Batch = dict[str, Any]
AugmentName = Literal["random", "none"]
ON_DEVICE = 2  # batches whose copy to the devices runs ahead of the step
GRID = 64  # pictures `check_first_batch` draws at most


@dataclass(frozen=True)
class PipelineConfig:
    """How a source becomes training batches."""

    batch: int = 1024
    """examples per step, over all hosts"""
    seed: int = 0
    """of the order and of the augmentation"""
    workers: int = 0
    """processes that prepare batches on each host; 0: threads of the training process"""
    prefetch: int = 4
    """batches each host prepares ahead"""
    tags: float = 0.0
    """probability with which each of a record's `tags` is appended to its caption"""


@dataclass(frozen=True)
class Augment:
    """One record to one training example of a CLIP; without a tokenizer captions are left out.

    augment: "random" crops and a random one of several captions, or "none": the centre and the first, as in evaluation.
    """

    pre: Preprocess
    tokenizer: Tokenizer | None
    context: int
    tags: float = 0.0
    augment: AugmentName = "random"

    def check(self, record: Record) -> None:
        """Raises InputError when the record lacks captions or tags that are asked for, or tags are drawn without augmentation."""
        if self.tags and self.augment == "none":
            raise InputError('tags are drawn at random: set pipeline.tags to 0, or augment to "random"')
        _check_record(record, self.tokenizer, self.tags)

    def __call__(self, record: Record, rng: np.random.Generator) -> Batch:
        example = {k: v for k, v in record.items() if isinstance(v, np.ndarray | np.generic) and k not in ("image", "text")}
        if self.tokenizer is not None:
            text = record["text"]
            caption = text if isinstance(text, str) else text[rng.integers(len(text)) if self.augment == "random" else 0]
            if self.tags:
                caption = ", ".join([caption, *(tag for tag in record["tags"] if rng.random() < self.tags)])
            example["text"] = self.tokenizer(caption, self.context)[0]
        if "image" in record:
            picture = decode_record(record, self.pre.background)
            example["image"] = train_image(picture, self.pre, rng) if self.augment == "random" else eval_image(picture, self.pre)
        return example


class HostRows(grain.MapDataset):
    """Of every global batch the rows that this host builds, beginning with batch `first`."""

    def __init__(self, stream: grain.MapDataset, rows: np.ndarray, batch: int, first: int):
        super().__init__(stream)
        self._rows, self._batch, self._first = rows, batch, first

    def __len__(self) -> int:
        return (len(self._parent) // self._batch - self._first) * len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(index, len(self._rows))
        return self._parent[(self._first + step) * self._batch + int(self._rows[row])]


class Batches:
    """An endless iterator over training batches that knows where it stands.

    A batch is a dict of arrays whose first axis is the batch: `image` float32 [b, size, size, 3], `text` int32 [b, context],
    and the numeric columns of the records. Nothing is read before the first `next`.
    """

    def __init__(self, start: Callable[[int], Iterator[Batch]], stream: dict[str, int]):
        """`start(n)` iterates from batch n on; `stream` is what the order depends on."""
        self._start, self._stream = start, stream
        self._done = 0
        self._iterator: Any = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start(self._done)
        batch = next(self._iterator)
        self._done += 1
        return batch

    def state(self) -> dict[str, int]:
        """Where the stream stands: plain numbers for JSON, the same on every host and for any number of workers."""
        return {"batches": self._done, **self._stream}

    def restore(self, state: dict[str, int]) -> None:
        """Continue behind the batch after which `state` was taken. Raises InputError when it belongs to another stream."""
        for name, value in self._stream.items():
            if state.get(name) != value:
                raise InputError(
                    f"the data cannot be resumed: {name} was {state.get(name)} and is {value} now; set it back, or start a new run"
                )
        self.close()
        self._done = state["batches"]

    def close(self) -> None:
        """End the threads and worker processes; a further `next` starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def training_batches(
    source: Source, cfg: PipelineConfig, example: Callable[[Record, np.random.Generator], Batch], *, mesh: Mesh | None = None
) -> Batches:
    """The endless stream of training batches: every epoch each example once, in an order of its own.

    example: one record, and the generator of its position in the stream, to arrays. Without a mesh a host gets its rows as numpy
    arrays; with one, global `jax.Array`s, rows split over `data` and `fsdp`, are copied ahead of the step. Raises InputError when
    the source is smaller than a batch or cannot be divided, and, while iterating,
    what `example` raises.
    """
    if len(source) < cfg.batch:
        raise InputError(f"the data has {len(source)} examples, fewer than a batch of {cfg.batch}; make the batch smaller")
    rows = host_rows(cfg.batch, mesh)
    # Both seeds are the position's: grain shuffles by (seed, epoch) and hands `random_map` a generator keyed by (seed, position).
    stream = grain.MapDataset.source(source).seed(cfg.seed).shuffle().repeat().random_map(example)

    def start(first: int) -> Iterator[Batch]:
        mine = HostRows(stream, rows, cfg.batch, first)
        ahead = _in_processes(mine, len(rows), cfg) if cfg.workers else _in_threads(mine, len(rows), cfg.prefetch)
        if mesh is not None:
            ahead = ThreadPrefetchIterDataset(ahead.map(Place(mesh, cfg.batch)), prefetch_buffer_size=ON_DEVICE)
        return iter(ahead)

    return Batches(start, {"examples": len(source), "batch": cfg.batch, "seed": cfg.seed})


def _check_record(record: Record, tokenizer: Tokenizer | None, tags: float) -> None:
    if tokenizer is not None and "text" not in record:
        raise InputError(f"{record['key']} has no caption; name its column with text, or add captions")
    if tags and "tags" not in record:
        raise InputError(f"{record['key']} has no tags to append; add tags to the columns, or set the probability to 0")


def host_rows(batch: int, mesh: Mesh | None) -> np.ndarray:
    """Which rows of a global batch this process builds: int [rows], ascending. Raises InputError when they do not divide."""
    if mesh is None:
        hosts = jax.process_count()
        if batch % hosts:
            raise InputError(f"a batch of {batch} cannot be divided among {hosts} hosts")
        return np.arange(batch).reshape(hosts, -1)[jax.process_index()]
    sharding = batch_sharding(mesh)
    if batch % (parts := mesh.shape["data"] * mesh.shape["fsdp"]):
        raise InputError(f"a batch of {batch} cannot be divided into {parts} parts (mesh data x fsdp)")
    # Asked of the sharding rather than of the process number: a host may hold any rows, and share them with its neighbour.
    return np.unique(np.concatenate([np.arange(batch)[where] for where in sharding.addressable_devices_indices_map((batch,)).values()]))


def _in_threads(rows: grain.MapDataset, count: int, prefetch: int) -> grain.IterDataset:
    """Examples one by one, so that a batch is shared among all threads (decoding and tokenising release Python's lock)."""
    threads = min(16, os.cpu_count() or 1)
    return rows.to_iter_dataset(grain.ReadOptions(threads, max(threads, prefetch * count))).batch(count)


def _in_processes(rows: grain.MapDataset, count: int, cfg: PipelineConfig) -> grain.IterDataset:
    """Whole batches, dealt to the workers in turn, so that their number changes nothing."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, and only absl programs parse them
    whole = rows.batch(count).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return whole.mp_prefetch(grain.MultiprocessingOptions(cfg.workers, per_worker_buffer_size=-(-cfg.prefetch // cfg.workers)))


@dataclass(frozen=True)
class Place:
    """This host's rows to global arrays. The copy is asynchronous: the call returns before it is done."""

    mesh: Mesh
    batch: int

    def __call__(self, batch: Batch) -> Batch:
        place = jax.make_array_from_process_local_data
        return {k: place(batch_sharding(self.mesh), v, (self.batch, *v.shape[1:])) for k, v in batch.items()}


@dataclass(frozen=True)
class Prepare:
    """One record to one evaluation example, the same every time; captions stay a list."""

    pre: Preprocess

    def __call__(self, index: int, record: Record) -> Record:
        example = {k: v for k, v in record.items() if k not in ("key", "image")} | {"index": index}
        return example | ({"image": eval_image(decode_record(record, self.pre.background), self.pre)} if "image" in record else {})


def evaluation_batches(
    source: Source, batch: int, pre: Preprocess, tokenizer: Tokenizer | None = None, context: int = 77
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order, as numpy arrays; the last batch is as short as it comes.

    `image` float32 [b, size, size, 3]; with a tokenizer `text` int32 [captions, context] and `owner` int64 [captions], the index
    in the source of the picture that each caption describes (captions = b unless pictures have several); every other
    column as an array of b (numbers, strings, or objects for lists). Raises InputError for a picture that does not decode.
    """
    _check_record(source[0], tokenizer, tags=0)
    stream = grain.MapDataset.source(source).map_with_index(Prepare(pre))
    threads = min(16, os.cpu_count() or 1)
    examples = stream.to_iter_dataset(grain.ReadOptions(threads, max(threads, batch)))
    return iter(examples.batch(batch, batch_fn=Collate(tokenizer, context)))


@dataclass(frozen=True)
class Collate:
    """Evaluation examples to one batch."""

    tokenizer: Tokenizer | None
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


def check_first_batch(batch: Batch, tokenizer: Tokenizer, path: str | Path | None = None, pre: Preprocess | None = None) -> str:
    """What to look at before a long run: the first caption decoded back, and the pictures as a square grid in the PNG `path`.

    `batch` is one of either iterator; of a global array this host's first shard is taken. `pre` undoes the
    normalisation (CLIP's unless given).
    """
    host = {k: np.asarray(v.addressable_data(0)) if isinstance(v, jax.Array) else v for k, v in batch.items()}
    if path is not None:
        pictures = denormalise(host["image"][:GRID], pre or Preprocess())
        side = int(np.ceil(len(pictures) ** 0.5))
        blank = np.full((side**2 - len(pictures), *pictures.shape[1:]), 255, np.uint8)
        grid = np.concatenate([pictures, blank]).reshape(side, side, *pictures.shape[1:])
        Image.fromarray(np.concatenate(np.concatenate(grid, axis=1), axis=1)).save(path)
    return tokenizer.decode(host["text"][0])
