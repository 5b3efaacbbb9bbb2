"""Random access to tar shards (webdataset, img2dataset): an index of each sample's members, from the headers.

The index of a shard is a small .npy table next to it, `NAME.tar.index-SIZE-MTIME.npy`, or under
$XDG_CACHE_HOME/heirloom (~/.cache by default) where the shard's folder is read-only. The name has size and time of
change, so a changed shard gets a new index. The table is memory-mapped for each look-up: thousands of shards use no
memory. A shard in a bucket has its index in that cache, and a copy for other hosts next to the shard where this job may
write there.
"""

import glob
import hashlib
import os
import tarfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

import numpy as np

from heirloom.common.data.reading import Stamp, retried
from heirloom.common.errors import InputError, remark
from heirloom.common.paths import Address, AnyPath, cache_root

SPAN = np.dtype([("offset", "<i8"), ("size", "<i8")])  # size -1: the sample has no such member
STEM = "/stem"  # this field is not an extension: no extension has a slash
BLOCK = 512
EXTENSIONS = 256


def index_shard(shard: AnyPath) -> Path:
    """Returns a shard's index, a .npy with a row per sample in tar order; builds a missing or damaged one.

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
    mark = f"{stat.st_size}-{stat.st_mtime_ns}"
    name, places = f"{shard.name}.index-{mark}.npy", (shard.parent, _cache_folder(shard))
    for file in (folder / name for folder in places):
        if file.exists() and _belongs(file, shard, mark):
            return file
    table = _table(shard, mark)
    failed = []
    for folder in places if os.access(shard.parent, os.W_OK) else places[1:]:
        try:
            return _write(folder / name, table, shard)
        except OSError as error:
            failed.append(f"{folder} ({error.strerror})")
    where = " or ".join(failed)
    needed = "set XDG_CACHE_HOME to a folder with free space"
    raise InputError(f"{shard}: its index cannot be written to {where}; {needed}")


def _index_remote(shard: Address) -> Path:
    """Returns the index of a shard in a bucket, from the local cache, from its place next to the shard, or built."""
    try:
        size, version = shard.version()
    except OSError as error:
        raise InputError(f"{shard} is not readable: {error}") from error
    mark = f"{size}-{version}"
    name = f"{shard.name}.index-{mark}.npy"
    file, copy = _cache_folder(shard) / name, shard.parent.child(name)
    if file.exists() and _belongs(file, shard, mark):
        return file
    try:
        if copy.exists():
            _replace(file, lambda out: out.write(copy.read_bytes()), shard.name)
            if _belongs(file, shard, mark):
                return file
        remark(f"{shard.parent}: its shards are indexed, which reads each of them once")
        _write(file, _table(shard, mark), shard)
    except OSError as error:
        failed = f"its index cannot be written to {file.parent} ({error.strerror or error})"
        raise InputError(f"{shard}: {failed}; set XDG_CACHE_HOME to a folder with free space") from error
    with suppress(OSError):  # a bucket that this job can only read
        copy.write_bytes(file.read_bytes())
    return file


def _belongs(file: Path, shard: AnyPath, mark: str) -> bool:
    """Returns whether a file is a complete index of this shard, by its mark and the first and last sample's headers."""
    try:
        table = np.lib.format.open_memmap(file, mode="r")
    except Exception:  # numpy raises many types for a damaged file, which a new index replaces
        return False
    first, *names = table.dtype.names or [""]
    fields: Any = table.dtype.fields or {}
    if (
        table.ndim != 1
        or first != STEM
        or fields[STEM][2:] != (mark,)
        or any(fields[name][0] != SPAN for name in names)
    ):
        return False
    spans = [row[name] for row in table[[0, -1]] for name in names if row[name]["size"] >= 0] if len(table) else []
    try:
        with shard.open("rb", ahead=False) if isinstance(shard, Address) else shard.open("rb") as data:
            return all(_header_size(data, int(span["offset"])) == span["size"] for span in spans)
    except (tarfile.TarError, OSError, ValueError):
        return False


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


def _cache_folder(shard: AnyPath) -> Path:
    folder = str(shard.parent) if isinstance(shard, Address) else shard.parent.resolve()
    return cache_root() / "tar_index" / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]


def _write(file: Path, table: np.ndarray, shard: AnyPath) -> Path:
    """Writes an index."""

    def save(out: BinaryIO) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # extensions beyond Latin-1 need numpy's newer format
            np.save(out, table)

    return _replace(file, save, shard.name)


def _replace(file: Path, write: Callable[[BinaryIO], object], shard: str) -> Path:
    """Writes under a temporary name and renames, since several processes may build it; deletes the shard's old ones."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as out:
            write(out)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    for old in file.parent.glob(f"{glob.escape(shard)}.index-*.npy"):
        if old != file:
            old.unlink(missing_ok=True)
    return file


def _table(shard: AnyPath, mark: str) -> np.ndarray:
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    files: dict[str, tuple[int, int]] = {}
    extensions: set[str] = set()
    for member in _members(shard):
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if member.isdir() or not stem or not extension:
            continue  # hidden files, and files without an extension
        name = f"{folder}/{stem}" if folder else stem
        files[member.name] = span = _span(shard, member, files)
        spans, extension = samples.setdefault(name, {}), extension.lower().encode("utf-8", "backslashreplace").decode()
        if extension in spans:
            raise InputError(f"{shard} has the member {member.name!r} twice; the second would hide the first")
        spans[extension] = span
        extensions.add(extension)
        if len(extensions) > EXTENSIONS:
            what = f"over {EXTENSIONS} extensions, such as {extension!r}"
            raise InputError(f"{shard} has {what}: a name ends at its first dot (000012.jpg)")
    stems = [stem.encode("utf-8", "surrogateescape") for stem in samples]
    stem_field = ((mark, STEM), f"S{max(map(len, stems), default=1)}")  # its title is the mark of the shard
    table = np.zeros(len(samples), [stem_field, *((e, SPAN) for e in sorted(extensions))])
    table[STEM] = stems
    for extension in extensions:
        table[extension] = np.array([spans.get(extension, (0, -1)) for spans in samples.values()], SPAN)
    return table


def _span(shard: AnyPath, member: tarfile.TarInfo, files: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Returns offset and size of the bytes of a member; of a hard link, those of its target."""
    if member.islnk() and member.linkname in files:
        return files[member.linkname]
    if not member.isreg() or member.issparse():
        kind = "a link, a device, a pipe or a sparse file"
        if member.islnk():
            kind = "a hard link to a file that is not in the shard"
        raise InputError(f"{shard}: its member {member.name!r} is {kind}; pack files themselves (tar --dereference)")
    return member.offset_data, member.size


def _members(shard: AnyPath) -> list[tarfile.TarInfo]:
    """Reads all headers. Raises InputError unless the tar ends with a block of zeros (else it is cut or damaged)."""
    try:
        with shard.open("rb") as data, tarfile.open(fileobj=data, mode="r:") as tar:
            members = tar.getmembers()
            data.seek(tar.offset)
            end = data.read(BLOCK)
    except (
        tarfile.TarError,
        OSError,
        ValueError,
        OverflowError,
    ) as error:  # the last two: a header with impossible numbers
        raise InputError(f"{shard} is not readable as an uncompressed tar: {error}; fetch it again") from error
    if end != bytes(BLOCK):
        raise InputError(f"{shard} is truncated or damaged at byte {tar.offset}; fetch it again")
    return members
