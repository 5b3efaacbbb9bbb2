"""Store a teacher's embeddings of data: `heirloom cache RECIPE DIR`, then train with `--teacher cache:DIR`.

The student then gets the same pictures and captions as the teacher did: centre crop, first caption, no tags (`augment`
is "none"). Its preprocessing and tokenizer may be others than the teacher's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from heirloom.common.checkpoint.convert import hashes
from heirloom.common.checkpoint.family import Donor
from heirloom.common.data.caches import new_cache, write_columns
from heirloom.common.data.content import content, samples
from heirloom.common.data.pipeline import check_record, evaluation_batches
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.sources import ArraySource, Record, Source, SourceConfig
from heirloom.common.data.sources.record import key_of
from heirloom.common.data.tokenizer_files import CaptionTokenizer
from heirloom.common.errors import InputError, remark
from heirloom.common.fetch import origin
from heirloom.common.files import read_json, write_json
from heirloom.common.train.parameters import load_params
from tinyclip_jax.evaluate import BATCH, Setup

TARGETS = ("teacher_image", "teacher_text")
ABOUT = "cache.json"
CONTEXT = 77  # tokens of the captions whose hash identifies the tokenizer


def write(
    folder: Path,
    source: Source,
    data: SourceConfig,
    teacher: Donor,
    pre: Preprocess,
    tokenizer: CaptionTokenizer,
    mesh: Mesh,
) -> dict[str, Any]:
    """Store the teacher's unit-norm features of all records, two arrays [records, joint] f32, and `cache.json`.

    Returns the content of `cache.json`. Raises InputError when `folder` exists, and in a job of several processes.
    """
    if "image" not in source[0]:
        raise InputError(f"{data.path} has no pictures: name their column with data.image")
    setup = Setup(model=teacher.model, pre=pre, tokenizer=tokenizer, cfg=teacher.cfg, mesh=mesh)
    image, text, params = setup.embed("image"), setup.embed("text"), load_params(teacher, mesh)
    made_by = {"teacher": origin(teacher.path), "hashes": hashes(teacher.file)}
    about = _of_data(source, data) | _of_model(source, pre, tokenizer) | made_by

    def parts() -> Iterator[dict[str, np.ndarray]]:
        for batch in evaluation_batches(source, BATCH, pre, tokenizer, teacher.cfg.text.context):
            first = np.unique(batch["owner"], return_index=True)[1]  # the first of several captions
            features = image(params, batch["image"]), text(params, batch["text"][first])
            yield dict(zip(TARGETS, features, strict=True))

    with new_cache(folder) as staging:
        write_columns(staging, len(source), parts())
        pre.save(staging)
        tokenizer.save(staging)
        write_json(staging / ABOUT, about)
    return about


def _of_data(source: Source, data: SourceConfig) -> dict[str, Any]:
    """The facts by which stored embeddings are matched to data."""
    records = samples(source)
    same = {name: getattr(data, name) for name in ("path", "split", "image", "text")}
    same |= {"first": records[0]["key"], "last": records[-1]["key"]}
    return same | content(source, records, _captions(records))


def _of_model(source: Source, pre: Preprocess, tokenizer: CaptionTokenizer) -> dict[str, Any]:
    """The preprocessing, and a hash of the tokens of some captions."""
    fields = ((name, value) for name, value in asdict(pre).items() if name != "scale")
    seen = {name: list(value) if isinstance(value, tuple) else value for name, value in fields}
    tokens = tokenizer(_captions(samples(source)), CONTEXT)
    return seen | {"tokens": sha256(tokens.tobytes()).hexdigest()[:16]}


def _captions(records: Sequence[Record]) -> list[str]:
    for record in records:
        check_record(record)
    return [r["text"] if isinstance(r["text"], str) else r["text"][0] for r in records]


class Cached:
    """A source whose records have the teacher's embeddings as columns.

    Raises InputError when the cache was made from other data. The teacher may have had another preprocessing or
    tokenizer than the student; a remark says so.
    """

    def __init__(self, source: Source, folder: Path, data: SourceConfig, pre: Preprocess, tokenizer: CaptionTokenizer):
        if not (folder / ABOUT).is_file():
            make = f"make one with heirloom cache RECIPE {folder}"
            raise InputError(f"{folder} is not a cache of embeddings, it has no {ABOUT}: {make}")
        stored = asdict(Preprocess()) | read_json(folder / ABOUT)  # old caches have fewer fields
        needed, own = _of_data(source, data), _of_model(source, pre, tokenizer)
        if "captions" not in stored:  # a cache of an older version, which knows its captions only as tokens
            needed = {name: value for name, value in (needed | own).items() if name != "captions"}
        # Pictures and captions are the data, wherever it lies; older caches know its place alone.
        place = ("path", "first", "last") if stored.get("pictures") == needed["pictures"] else ("pictures",)
        for name, value in needed.items():
            if name not in place and stored.get(name) != value:
                made = f"was made with {name} {stored.get(name)!r}, here it is {value!r}"
                raise InputError(f"{folder} {made}: make another cache with heirloom cache")
        if others := [name for name, value in own.items() if stored.get(name) != value]:
            what = ", ".join("tokenizer" if name == "tokens" else name for name in others)
            remark(f"{folder}: the teacher had another preprocessing or tokenizer than the student ({what})")
        self._source = source
        self._targets = ArraySource(folder, SourceConfig(image="", text="", columns=TARGETS))

    def __len__(self) -> int:
        return len(self._source)

    def key(self, index: int) -> str:
        """Name of a record without reading it."""
        return key_of(self._source, index)

    def __getitem__(self, index: int) -> Record:
        stored = self._targets[index]
        return self._source[index] | {name: stored[name] for name in TARGETS}
