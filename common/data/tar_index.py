"""Random access to tar shards (webdataset, img2dataset): an index of each sample's members, from the headers.

The index of a shard is a small .npy table next to it, `NAME.tar.index-SIZE-MTIME.npy`, or under
$XDG_CACHE_HOME/heirloom (~/.cache by default) where the shard's folder is read-only. The name has size and time of
change, so a changed shard gets a new index. After the table the file has its SHA-256. The table is memory-mapped for
each look-up: thousands of shards use no memory. A shard in a bucket has its index in that cache, and a copy for other
hosts next to the shard where this job may write there. `catalogue.py` keeps what is needed of all shards at the start.
"""

import errno
import hashlib
import io
import os
import tarfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

import numpy as np

from heirloom.common.data.tar_members import BLOCK, Member, members, split
from heirloom.common.errors import InputError
from heirloom.common.files import replacing
from heirloom.common.paths import Address, AnyPath, cache_root
from heirloom.common.reading import Stamp, mapped, retried

SPAN = np.dtype([("offset", "<i8"), ("size", "<i8")])  # size -1: the sample has no such member
STEM = "/stem"  # this field is not an extension: no extension has a slash
EXTENSIONS = 256
DIGEST = 32  # bytes of the SHA-256 at the end of an index
HEADER = 2**20  # characters that numpy may evaluate of a header, which this package wrote


@dataclass(frozen=True)
class Index:
    """The index of a shard, of which nothing but the place of the table is in memory. start: its first byte."""

    file: Path
    dtype: np.dtype
    count: int
    start: int

    @classmethod
    def open(cls, file: Path, mark: str) -> "Index | None":
        """Opens an index of the shard with this mark; None when it is damaged, or of another shard.

        Raises FileNotFoundError.
        """
        data = memoryview(file.read_bytes())
        if hashlib.sha256(data[:-DIGEST]).digest() != data[-DIGEST:]:
            return None
        table = mapped(file, max_header_size=HEADER)
        fields: Any = table.dtype.fields or {}
        if STEM not in fields or fields[STEM][2:] != (mark,):
            return None
        dtype = _shared(tuple((name, fields[name][0]) for name in table.dtype.names or ()))
        return cls(file, dtype, len(table), table.offset)

    def table(self) -> np.ndarray:
        """Maps the table into memory. Raises OSError."""
        return np.memmap(self.file, self.dtype, "r", self.start, (self.count,))


@cache
def _shared(fields: tuple[tuple[str, np.dtype], ...]) -> np.dtype:
    """Returns one dtype for the indexes of all shards with these fields, without their titles."""
    return np.dtype(list(fields))


def index_shard(shard: AnyPath) -> Index:
    """Returns a shard's index, a row per sample in tar order; builds a missing or damaged one.

    Its fields are STEM (bytes, the name up to the first dot after the folder) and one SPAN per extension, such as `jpg`
    and `txt`. Raises InputError naming a shard that is missing, empty, truncated, compressed, has a member twice, or is
    not a file.
    """
    if isinstance(shard, Address):
        return _index_remote(shard)
    try:
        stat = shard.stat()
    except OSError as error:
        raise InputError(f"{shard} is not readable: {error}") from error
    if not S_ISREG(stat.st_mode):
        raise InputError(f"{shard} is not a file: a shard must be an uncompressed tar")
    stamp = Stamp(stat.st_size, stat.st_mtime_ns)
    name, places = index_name(shard, stamp), (shard.parent, cache_folder(shard))
    for file in (folder / name for folder in places):
        if file.exists() and (index := _belonging(file, shard, stamp)):
            return index
    table = _table(shard, stamp.mark)
    failed = []
    for folder in places if os.access(shard.parent, os.W_OK) else places[1:]:
        try:
            return _written(folder / name, table, stamp)
        except OSError as error:
            failed.append(f"{folder} ({error.strerror})")
    where = " or ".join(failed)
    needed = "set XDG_CACHE_HOME to a folder with free space"
    raise InputError(f"{shard}: its index cannot be written to {where}; {needed}")


def _index_remote(shard: Address) -> Index:
    """Returns the index of a shard in a bucket, from the local cache, from its place next to the shard, or built."""
    stamp = Stamp.of(shard)
    name = index_name(shard, stamp)
    file, copy = cache_folder(shard) / name, shard.parent.child(name)
    if file.exists() and (index := _belonging(file, shard, stamp)):
        return index
    try:
        if copy.exists():
            with replacing(file) as part:
                part.write_bytes(copy.read_bytes())
            if index := _belonging(file, shard, stamp):
                return index
        index = _written(file, _table(shard, stamp.mark), stamp)
    except OSError as error:
        failed = f"its index cannot be written to {file.parent} ({error.strerror or error})"
        raise InputError(f"{shard}: {failed}; set XDG_CACHE_HOME to a folder with free space") from error
    with suppress(OSError):  # a bucket that this job can only read
        copy.write_bytes(file.read_bytes())
    return index


def known_index(shard: AnyPath, stamp: Stamp) -> Index | None:
    """Returns the whole index that this machine has of a shard of this stamp, without reading the shard."""
    name = index_name(shard, stamp)
    places = [cache_folder(shard)] if isinstance(shard, Address) else [shard.parent, cache_folder(shard)]
    for folder in places:
        with suppress(FileNotFoundError):
            if index := Index.open(folder / name, stamp.mark):
                return index
    return None


def adopt(shard: AnyPath, stamp: Stamp, data: bytes) -> None:
    """Keeps an index that another host made of this version of a shard in the cache.

    Raises InputError when the cache cannot be written.
    """
    file = cache_folder(shard) / index_name(shard, stamp)
    try:
        with replacing(file) as part:
            part.write_bytes(data)
    except OSError as error:
        needed = "set XDG_CACHE_HOME to a folder with free space"
        raise InputError(f"{file}: the index cannot be written ({error.strerror}); {needed}") from error


def index_name(shard: AnyPath, stamp: Stamp) -> str:
    return f"{shard.name}.index-{stamp.mark}.npy"


def _belonging(file: Path, shard: AnyPath, stamp: Stamp) -> Index | None:
    """Opens a whole index of this shard, by its mark and the first and last sample's headers."""
    try:
        if not (index := Index.open(file, stamp.mark)):
            return None
        table = index.table()
        spans = [row[name] for row in table[[0, -1]] for name in (table.dtype.names or ())[1:]] if len(table) else []
        with shard.open("rb", ahead=False) if isinstance(shard, Address) else shard.open("rb") as data:
            whole = all(_header_size(data, int(span["offset"])) == span["size"] for span in spans if span["size"] >= 0)
        return index if whole else None
    except (tarfile.TarError, OSError, ValueError):
        return None


def _header_size(data: BinaryIO, offset: int) -> int:
    """Returns the size of the member whose bytes begin at `offset`, from the header before them."""
    data.seek(offset - BLOCK)
    return tarfile.TarInfo.frombuf(data.read(BLOCK), tarfile.ENCODING, "surrogateescape").size


def read_span(shard: AnyPath, span: np.void, stamp: Stamp | None = None) -> bytes:
    """Reads the bytes of one member. Opens the file each time: thread-safe, and cheap compared with decoding.

    stamp: of the shard that was indexed. Raises InputError when the shard is not readable or has another stamp.
    """

    def read() -> bytes:
        if isinstance(shard, Address):
            if stamp:
                stamp.check(shard)
            return shard.read_range(int(span["offset"]), int(span["size"]))
        with open(shard, "rb") as file:
            if stamp:
                stamp.check(file.fileno())
            file.seek(int(span["offset"]))
            data = file.read(int(span["size"]))
        if len(data) != span["size"]:
            raise OSError("it is shorter than when indexed: truncated, or being written; fetch it again")
        return data

    return retried(read, shard)


def cache_folder(shard: AnyPath) -> Path:
    folder = str(shard.parent) if isinstance(shard, Address) else shard.parent.resolve()
    return cache_root() / "tar_index" / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]


def _written(file: Path, table: np.ndarray, stamp: Stamp) -> Index:
    """Writes an index and opens it."""
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # extensions beyond Latin-1 need numpy's newer format
        np.save(data, table)

    def save(out: BinaryIO) -> None:
        out.write(data.getbuffer())
        out.write(hashlib.sha256(data.getbuffer()).digest())

    with replacing(file) as part, open(part, "wb") as out:
        save(out)
    if not (index := Index.open(file, stamp.mark)):
        raise OSError(errno.EIO, "what was written is not what is read", str(file))
    return index


def remove_old(shards: Mapping[AnyPath, str]) -> None:
    """Removes the indexes of earlier versions of shards, here and in the cache. shards: with the mark of each."""
    marks: dict[AnyPath, dict[str, str]] = {}
    for shard, mark in shards.items():
        folders: list[AnyPath] = [cache_folder(shard), shard.parent]
        for folder in folders:
            marks.setdefault(folder, {})[shard.name] = mark
    for folder, known in marks.items():
        with suppress(OSError):  # of a folder that this job can only read
            names = folder.files(deep=False) if isinstance(folder, Address) else os.listdir(folder)
            for name in names:
                shard_name, found, mark = name.removesuffix(".npy").rpartition(".index-")
                if found and name.endswith(".npy") and known.get(shard_name, mark) != mark:
                    (folder / name).unlink()  # type: ignore[union-attr]


def _table(shard: AnyPath, mark: str) -> np.ndarray:
    samples: dict[str, dict[str, Member]] = {}
    extensions: set[str] = set()
    for member in members(shard):
        name, extension = split(member.name) or ("", "")
        extension = extension.encode("utf-8", "backslashreplace").decode()
        found = samples.setdefault(name, {})
        if extension in found:
            raise InputError(f"{shard} has the member {member.name!r} twice; the second would hide the first")
        found[extension] = member
        extensions.add(extension)
        if len(extensions) > EXTENSIONS:
            what = f"over {EXTENSIONS} extensions, such as {extension!r}"
            raise InputError(f"{shard} has {what}: a name ends at its first dot (000012.jpg)")
    stems = [stem.encode("utf-8", "surrogateescape") for stem in samples]
    stem_field = ((mark, STEM), f"S{max(map(len, stems), default=1)}")  # its title is the mark of the shard
    table = np.zeros(len(samples), [stem_field, *((e, SPAN) for e in sorted(extensions))])
    table[STEM] = stems
    for extension in extensions:
        spans = [(one.offset, one.size) if (one := s.get(extension)) else (0, -1) for s in samples.values()]
        table[extension] = np.array(spans, SPAN)
    return table
