"""What is known of all shards of a folder in one file, so that thousands are opened without opening their indexes.

`heirloom.index` lies next to the shards where that may be written, else in the cache folder of `tar_index.py`: its
SHA-256, then a .npy with a row per shard. A row counts only for a shard that has its size and version. A damaged file
is made again from the indexes.
"""

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from heirloom.common.data.indexing import Facts, index_all
from heirloom.common.data.tar_index import DIGEST, cache_folder, remove_old
from heirloom.common.errors import InputError, nearest, remark
from heirloom.common.files import replacing
from heirloom.common.paths import Address, AnyPath
from heirloom.common.reading import Stamp, retried

FILE = "heirloom.index"
MANY = 64  # shards of a folder in a bucket from which on one listing is quicker than a request for each
SAID = 2**30  # bytes of shards whose indexing is remarked
REQUESTS, PART = 32, 16  # look-ups at once, and one after another
Rows = dict[str, Facts]
Files = dict[str, tuple[int, int]]


class Catalogue:
    """The facts of shards, in their order. samples, pictures, captions: [shard], see `Facts`."""

    def __init__(self, found: Sequence[Facts]) -> None:
        columns = np.array([tuple(facts) for facts in found], np.int64).reshape(len(found), len(Facts._fields))
        self._stamps, self.samples = columns[:, :2], columns[:, 2]
        self.pictures, self.captions = columns[:, 3].astype(bool), columns[:, 4].astype(bool)

    def stamp(self, shard: int) -> Stamp:
        """Returns size and version of the shard that was indexed."""
        return Stamp(*self._stamps[shard].tolist())


def catalogued(shards: Sequence[AnyPath], done: Callable[[], object] = lambda: None) -> Catalogue:
    """Returns the facts of shards. Those that are new or have changed are indexed; done: called after each of them.

    Raises InputError for a missing shard, and the errors of `index_shard`.
    """
    now, known = stamps(shards), _known(shards)
    new = [i for i, (stamp, facts) in enumerate(zip(now, known, strict=True)) if not facts or facts.stamp != stamp]
    if new and (isinstance(shards[new[0]], Address) or sum(now[i].size for i in new) > SAID):
        remark(f"{shards[new[0]].parent}: {len(new):,} shards are indexed, which reads each of them once")
    for i, facts in zip(new, index_all([shards[i] for i in new], [now[i].size for i in new], done), strict=True):
        known[i] = facts
    found = [facts for facts in known if facts]
    if new:
        remove_old({shards[i]: found[i].stamp.mark for i in new})
        keep({shards[i]: found[i] for i in new})
    return Catalogue(found)


def missing(shards: Sequence[AnyPath]) -> list[int]:
    """Returns the positions of the shards that `catalogued` would index."""
    found = zip(stamps(shards), _known(shards), strict=True)
    return [i for i, (stamp, facts) in enumerate(found) if not facts or facts.stamp != stamp]


def keep(new: dict[AnyPath, Facts]) -> None:
    """Adds the facts of shards to the catalogues of their folders."""
    folders: dict[AnyPath, Rows] = {}
    for shard, facts in new.items():
        folders.setdefault(shard.parent, {})[shard.name] = facts
    for folder, rows in folders.items():
        data = _packed(_rows(folder) | rows)
        here = cache_folder(folder / "_") / FILE
        if isinstance(folder, Address):
            _write(here, data)
            with suppress(OSError):  # a bucket that this job can only read
                folder.child(FILE).write_bytes(data)
        elif not (os.access(folder, os.W_OK) and _write(folder / FILE, data)):
            _write(here, data)


def stamps(shards: Sequence[AnyPath]) -> list[Stamp]:
    """Returns size and version of each shard now. Raises InputError naming the first that is missing."""
    counts = Counter(shard.parent for shard in shards if isinstance(shard, Address))
    listed: dict[AnyPath, Files] = {folder: _listing(folder) for folder, count in counts.items() if count >= MANY}

    def stamp(shard: AnyPath) -> Stamp:
        if (files := listed.get(shard.parent)) is not None:
            if shard.name in files:
                return Stamp(*files[shard.name])
        elif isinstance(shard, Address):
            if shard.exists():
                return Stamp.of(shard)
        else:
            try:
                return Stamp.of(shard)
            except InputError:
                if shard.exists():
                    raise
        near = nearest(shard.name, (path.name for path in shard.parent.glob("*")))
        raise InputError(f"{shard} does not exist{near}")

    parts = [shards[i : i + PART] for i in range(0, len(shards), PART)]
    with ThreadPoolExecutor(REQUESTS) as pool:
        found = pool.map(lambda part: list(map(stamp, part)), parts)
        return [one for part in found for one in part]


def _listing(folder: Address) -> Files:
    try:
        return folder.files(deep=False)
    except OSError as error:
        raise InputError(f"{folder} is not readable: {error.strerror or error}") from error


def _known(shards: Sequence[AnyPath]) -> list[Facts | None]:
    """Returns what the catalogues say of shards, be it out of date."""
    rows = {folder: _rows(folder) for folder in {shard.parent for shard in shards}}
    return [rows[shard.parent].get(shard.name) for shard in shards]


def _rows(folder: AnyPath) -> Rows:
    """Reads the catalogue of a folder: its own, and what the cache has beyond that."""
    return _unpacked(cache_folder(folder / "_") / FILE) | _unpacked(folder / FILE)


def _packed(rows: Rows) -> bytes:
    names = np.array([os.fsencode(name) for name in rows], bytes)
    columns = np.array([tuple(facts) for facts in rows.values()], np.int64).T
    kinds: list[Any] = [("name", names.dtype), *((name, np.int64) for name in Facts._fields)]
    table = np.zeros(len(rows), kinds)
    table["name"] = names
    for name, column in zip(Facts._fields, columns, strict=True):
        table[name] = column
    out = io.BytesIO()
    np.save(out, table)
    return hashlib.sha256(out.getvalue()).digest() + out.getvalue()


def _unpacked(file: AnyPath) -> Rows:
    """Reads a catalogue; empty when there is none, or a damaged one. Raises InputError when the bucket fails."""
    data = retried(file.read_bytes, file) if file.exists() else b""
    if hashlib.sha256(data[DIGEST:]).digest() != data[:DIGEST]:
        return {}
    table = np.load(io.BytesIO(data[DIGEST:]))
    if table.dtype.names != ("name", *Facts._fields):  # of another version
        return {}
    names, columns = table["name"].tolist(), [table[name].tolist() for name in Facts._fields]
    return {
        os.fsdecode(name): Facts(size, changed, samples, bool(pictures), bool(captions))
        for name, size, changed, samples, pictures, captions in zip(names, *columns, strict=True)
    }


def _write(file: Path, data: bytes) -> bool:
    """Writes a catalogue whole or not at all; returns whether it was written. Without one, the next start is slower."""
    try:
        with replacing(file) as part:
            part.write_bytes(data)
    except OSError:
        return False
    return True
