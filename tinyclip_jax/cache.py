"""A teacher's embeddings stored once per data set and streamed with it: `heirloom cache RECIPE DIR`, then `--teacher cache:DIR`.

The student then sees every picture as the teacher did: centre crop, first caption, no tags (`augment` is "none").
"""

from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.convert import Donor, hashes
from heirloom.common.checkpoint.staging import staged
from heirloom.common.data.pipeline import evaluation_batches
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.sources import Record, Source, SourceConfig
from heirloom.common.data.text import Tokenizer
from heirloom.common.errors import InputError
from heirloom.common.train.parameters import load_params
from tinyclip_jax.evaluate import BATCH, Setup

PREFIX = "cache:"
TARGETS = ("teacher_image", "teacher_text")
ABOUT = "cache.json"
SOME, CONTEXT = 64, 77  # captions, and how much of each, by which data and tokenizer are known again


def write(folder: Path, source: Source, data: SourceConfig, teacher: Donor, pre: Preprocess, tokenizer: Tokenizer, mesh: Mesh) -> Any:
    """Store the teacher's unit-norm features of every record: two arrays [records, joint] f32, and what they are of.

    Returns what `cache.json` holds. Raises InputError when `folder` exists, and in a job of several processes.
    """
    if jax.process_count() > 1:
        raise InputError("a cache is written by one process: run this command on one host")
    setup = Setup(teacher.model, pre, tokenizer, teacher.cfg, mesh)
    image, text, params = setup.embed("image"), setup.embed("text"), load_params(teacher, mesh)
    about = _about(source, data, pre, tokenizer) | {"teacher": str(teacher.path), "hashes": hashes(teacher.file)}
    with staged(folder) as staging:
        staging.mkdir()
        shape = (len(source), teacher.cfg.joint)
        columns = [np.lib.format.open_memmap(staging / f"{name}.npy", "w+", np.float32, shape) for name in TARGETS]
        seen = 0
        for batch in evaluation_batches(source, BATCH, pre, tokenizer, teacher.cfg.text.context):
            rows = slice(seen, seen + len(batch["image"]))
            first = np.unique(batch["owner"], return_index=True)[1]  # of several captions the first
            columns[0][rows] = image(params, batch["image"])
            columns[1][rows] = text(params, batch["text"][first])
            seen = rows.stop
        for column in columns:
            column.flush()
        pre.save(staging)
        tokenizer.save(staging)
        weights.write_json(staging / ABOUT, about)
    return about


def _about(source: Source, data: SourceConfig, pre: Preprocess, tokenizer: Tokenizer) -> dict[str, Any]:
    """What has to be the same for the embeddings to be those of these records."""
    some = [source[int(i)] for i in np.linspace(0, len(source) - 1, min(SOME, len(source)))]
    captions = [r["text"] if isinstance(r["text"], str) else r["text"][0] for r in some]
    same = {name: getattr(data, name) for name in ("path", "split", "image", "text")}
    same |= {"records": len(source), "first": some[0]["key"], "last": some[-1]["key"]}
    seen = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(pre).items() if name != "scale"}
    return same | seen | {"tokens": sha256(tokenizer(captions, CONTEXT).tobytes()).hexdigest()[:16]}


class Cached:
    """A source whose records carry the teacher's embeddings. Raises InputError when the cache is of other data or other inputs."""

    def __init__(self, source: Source, folder: Path, data: SourceConfig, pre: Preprocess, tokenizer: Tokenizer):
        if not (folder / ABOUT).is_file():
            raise InputError(f"{folder} is no cache of embeddings: heirloom cache RECIPE {folder} makes one")
        stored = asdict(Preprocess()) | weights.read_json(folder / ABOUT)  # old caches know fewer fields
        for name, value in _about(source, data, pre, tokenizer).items():
            if stored.get(name) != value:
                raise InputError(f"{folder} was made with {name} {stored.get(name)!r}, here it is {value!r}: make another cache")
        self._source, self._folder = source, folder
        self._columns: dict[str, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_columns": None}  # mapped again by each worker

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        if self._columns is None:
            self._columns = {name: np.load(self._folder / f"{name}.npy", mmap_mode="r") for name in TARGETS}
        return self._source[index] | {name: np.array(column[index]) for name, column in self._columns.items()}
