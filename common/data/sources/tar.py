"""Tar shards in webdataset's form."""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

from heirloom.common.data.catalogue import catalogued
from heirloom.common.data.indexing import CAPTIONS, have
from heirloom.common.data.lines import read_lines
from heirloom.common.data.sources.record import (
    USUAL,
    Record,
    SourceConfig,
    caption_lines,
    captions,
    require,
    require_columns,
    starts,
    value,
)
from heirloom.common.data.sources.splits import is_split, of_split
from heirloom.common.data.tar_index import STEM, Index, index_shard, known_index, read_span
from heirloom.common.errors import InputError, remark
from heirloom.common.paths import AnyPath
from heirloom.common.reading import PICTURES, Stamp, retried


class TarSource:
    """Tar shards in webdataset's form: members of a sample share the name up to the first dot (12.jpg, 12.txt).

    A .txt member has a caption a line, or the caption of the .json with its line breaks. A .cls member becomes `label`:
    a whole number, or the name of a class. A split is a part of the names of the shards. Class names and zero-shot
    templates are read where CLIP_benchmark writes them: in the shards' folder, or in its parent if the folder is named
    test or train.
    """

    def __init__(self, shards: Sequence[AnyPath], cfg: SourceConfig):
        shards = of_split(shards, cfg.split)
        self._shards, self._cfg, self._catalogue = shards, cfg, catalogued(shards)
        known = self._catalogue
        if len(empty := np.flatnonzero(known.samples == 0)):
            raise InputError(f"{shards[empty[0]]} is empty: it has no member with a name like 000012.jpg")
        if cfg.image and len(lacking := np.flatnonzero(~known.pictures)):
            _refuse(self._shard(int(lacking[0])), "picture", PICTURES)
        if cfg.text and len(lacking := np.flatnonzero(~known.captions)):
            _refuse(self._shard(int(lacking[0])), "caption", CAPTIONS)
        self._starts, self._length = starts(known.samples.tolist()), int(known.samples.sum())
        names = _sidecar(shards[0], "classnames.txt")
        self.class_names = {"label": read_lines(names)} if names else {}
        self.templates = _sidecar(shards[0], "zeroshot_classification_templates.txt")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        shard, number = self._place(index)
        row = shard.row(number)
        members = {e: row[e] for e in (row.dtype.names or ())[1:] if row[e]["size"] >= 0}
        cfg, key = self._cfg, shard.key(row)
        record, fields = Record(key=key), dict[str, Any]()
        if cfg.image:
            record["image"] = shard.read(members[self._picture(members, key)])
        try:
            if "txt" in members and cfg.text == SourceConfig.text:
                sidecar = partial(shard.read, members["json"]) if "json" in members else bytes
                fields[cfg.text] = caption_lines(shard.read(members["txt"]), sidecar, shard.file.parent)
            if "cls" in members:
                fields["label"] = _label(shard.read(members["cls"]).decode("utf-8-sig").strip())
            if "json" in members and not {cfg.text, *cfg.columns} - {""} <= fields.keys():
                fields = _object(shard.read(members["json"]), key) | fields
        except (ValueError, RecursionError) as error:
            raise InputError(f"{key}: its .json, .txt or .cls is not readable: {error}") from error
        require_columns(replace(cfg, image=""), list(fields), key)
        record |= {c: value(fields[c], key, c) for c in cfg.columns}
        return record | ({"text": captions(fields[cfg.text], key)} if cfg.text else {})

    def _picture(self, members: Collection[str], key: str) -> str:
        """Returns the ending of the picture of a sample."""
        found = [ending for ending in PICTURES if ending in members]
        if self._cfg.image != SourceConfig.image:
            require([self._cfg.image], found, key, "picture")
            return self._cfg.image
        if len(found) > 1:
            both = " and ".join(found)
            remark(f"{self._shards[0].parent}: samples have {both}; {found[0]} is read, unless image names another")
        return found[0]

    def key(self, index: int) -> str:
        """Returns the shard and the name of the sample, or its number, counted from 0, when the index is gone."""
        shard, number = self._place(index)
        try:
            return shard.key(shard.row(number))
        except InputError:
            return f"{shard.file} sample {number}"

    def _place(self, index: int) -> tuple["Shard", int]:
        """Returns the shard of a sample, and its number there."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._shard(number), index - int(self._starts[number])

    def _shard(self, number: int) -> "Shard":
        return Shard(self._shards[number], self._catalogue.stamp(number))


def _sidecar(shard: AnyPath, name: str) -> Any:
    """Finds a file that comes with the shards."""
    folders = (shard.parent, shard.parent.parent) if is_split(shard.parent.name) else (shard.parent,)
    files = (folder / name for folder in folders)
    return next((file for file in files if file.is_file()), None)


def _label(text: str) -> Any:
    """Converts a whole number to int32, or to int where it does not fit; other text is a name."""
    if not re.fullmatch(r"[+-]?\d+", text, re.ASCII):  # Python reads 1_0 as 10
        return text
    number = int(text)
    return np.int32(number) if abs(number) < 2**31 else number


def _object(data: bytes, key: str) -> dict[str, Any]:
    fields = json.loads(data)
    if not isinstance(fields, dict):
        raise InputError(f"{key}: its .json is a {type(fields).__name__}, and must be an object")
    return fields


@dataclass(frozen=True)
class Shard:
    """A tar that is indexed. stamp: of the version that was."""

    file: AnyPath
    stamp: Stamp

    def index(self) -> Index:
        """Opens the index, which is read and checked once in a process; a lost or damaged one is made again.

        Raises InputError when the shard is not readable or has changed.
        """
        return _checked(self.file, self.stamp)

    def row(self, number: int) -> np.void:
        """Reads the spans of a sample. Raises the errors of `index`."""
        try:
            return self.index().table()[number]
        except OSError:  # it was removed after it was opened
            _checked.cache_clear()
            return retried(self.index().table, self.file)[number]

    def key(self, row: np.void) -> str:
        """Returns the name of a sample for messages."""
        return f"{self.file}:{row[STEM].decode(errors='backslashreplace')}"

    def read(self, span: np.void) -> bytes:
        """Reads the bytes of one member."""
        return read_span(self.file, span, self.stamp)


@cache
def _checked(file: AnyPath, stamp: Stamp) -> Index:
    if index := known_index(file, stamp):
        return index
    retried(lambda: stamp.check(file), file)
    return index_shard(file)


def _refuse(shard: Shard, what: str, extensions: Sequence[str]) -> None:
    """Raises InputError: not every sample has a member with one of `extensions`."""
    table = shard.index().table()
    found = have(table, extensions)
    row = table[found.argmin()]
    first = row[STEM].decode(errors="backslashreplace")
    members = [name for name in (table.dtype.names or ())[1:] if row[name]["size"] >= 0]
    way = "pack the shard without them" if found.any() else ""
    if dotted := next((name for name in members if name.rpartition(".")[2] in extensions), ""):
        *parts, ending = f"{first}.{dotted}".split(".")
        stem = "_".join(parts) if all("." in name for name in members) else first  # that of the sample's other members
        way = f"a name ends at its first dot: rename {first}.{dotted} to {stem}.{ending}"
    elif other := next((name for name in USUAL["text"] if what == "caption" and name in members), ""):
        way = f"rename the members .{other} to .{extensions[0]}"
    if found.any():
        lacking = f"{(~found).sum()} of {len(found)} samples have no {what}, the first is {first}"
        raise InputError(f"{shard.file}: {lacking}; {way}")
    names = ", ".join((table.dtype.names or ())[1:])[:80]
    raise InputError(f"{shard.file} has no {what}s ({', '.join(extensions)}), only {names}{way and f'; {way}'}")
