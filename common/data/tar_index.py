"""Random access into tar shards (webdataset, img2dataset): where the members of every sample lie, read from the headers alone.

The index of a shard is a small .npy table beside it, `NAME.tar.index-SIZE-MTIME.npy`, or under $XDG_CACHE_HOME/heirloom
(~/.cache by default) where the shard's folder is read-only. Size and time of change are in the name, so a changed shard
finds no index and gets a new one. The table is memory-mapped for each look-up: thousands of shards cost no memory.
"""

import glob
import hashlib
import os
import tarfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

import numpy as np

from heirloom.common.errors import InputError

SPAN = np.dtype([("offset", "<i8"), ("size", "<i8")])  # size -1: this sample has no such member
STEM = "/stem"  # the field that is no extension, and can be none
BLOCK = 512
EXTENSIONS = 256


def index_shard(shard: Path) -> Path:
    """The .npy file with one row per sample of `shard`, in the order of the file; built when there is none yet, or a damaged one.

    Its fields are STEM (bytes, the name up to the first dot behind the folder) and one SPAN per extension, such as `jpg` and
    `txt`. Raises InputError naming a shard that is missing, empty, truncated, compressed, has a member twice, or one that is no file.
    """
    try:
        stat = shard.stat()
    except OSError as error:
        raise InputError(f"{shard} is not readable: {error}") from error
    if not S_ISREG(stat.st_mode):
        raise InputError(f"{shard} is no file: a shard is an uncompressed tar")
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
    raise InputError(f"{shard}: its index cannot be written to {' or '.join(failed)}; set XDG_CACHE_HOME to a folder with room")


def _belongs(file: Path, shard: Path, mark: str) -> bool:
    """Whether this is a whole index, and of this shard: it says so, and the first and the last sample have headers where it says."""
    try:
        table = np.lib.format.open_memmap(file, mode="r")
    except Exception:  # numpy's parser of headers raises many kinds; whatever it is, a new index replaces the damaged one
        return False
    first, *names = table.dtype.names or [""]
    fields: Any = table.dtype.fields or {}
    if table.ndim != 1 or first != STEM or fields[STEM][2:] != (mark,) or any(fields[name][0] != SPAN for name in names):
        return False
    spans = [row[name] for row in table[[0, -1]] for name in names if row[name]["size"] >= 0] if len(table) else []
    try:
        with open(shard, "rb") as data:
            return all(_header_size(data, int(span["offset"])) == span["size"] for span in spans)
    except (tarfile.TarError, OSError, ValueError):
        return False


def _header_size(data: BinaryIO, offset: int) -> int:
    """The size of the member whose bytes begin at `offset`, by the header in front of them."""
    data.seek(offset - BLOCK)
    return tarfile.TarInfo.frombuf(data.read(BLOCK), tarfile.ENCODING, "surrogateescape").size


def read_span(shard: Path, span: np.void) -> bytes:
    """The bytes of one member. Opens the file anew: safe from any thread or process, and cheap beside decoding a picture."""
    try:
        with open(shard, "rb") as file:
            file.seek(int(span["offset"]))
            data = file.read(int(span["size"]))
    except OSError as error:
        raise InputError(f"{shard} is not readable: {error}") from error
    if len(data) != span["size"]:
        raise InputError(f"{shard} has become shorter since it was indexed: it is truncated or being written; fetch it again")
    return data


def _cache_folder(shard: Path) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "heirloom" / "tar_index" / hashlib.sha256(os.fsencode(shard.parent.resolve())).hexdigest()[:16]


def _write(file: Path, table: np.ndarray, shard: Path) -> Path:
    """Write under another name and rename; several processes may build the same index at once. Stale ones are deleted."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as out, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # names of extensions beyond Latin-1 need numpy's newer format
            np.save(out, table)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    for old in file.parent.glob(f"{glob.escape(shard.name)}.index-*.npy"):
        if old != file:
            old.unlink(missing_ok=True)
    return file


def _table(shard: Path, mark: str) -> np.ndarray:
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
            raise InputError(f"{shard} has over {EXTENSIONS} extensions, such as {extension!r}: a name ends at its first dot (000012.jpg)")
    stems = [stem.encode("utf-8", "surrogateescape") for stem in samples]
    stem_field = ((mark, STEM), f"S{max(map(len, stems), default=1)}")  # its title says of which file this is the index
    table = np.zeros(len(samples), [stem_field, *((e, SPAN) for e in sorted(extensions))])
    table[STEM] = stems
    for extension in extensions:
        table[extension] = np.array([spans.get(extension, (0, -1)) for spans in samples.values()], SPAN)
    return table


def _span(shard: Path, member: tarfile.TarInfo, files: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Offset and size of the bytes of a member; of a hard link those of the file it names."""
    if member.islnk() and member.linkname in files:
        return files[member.linkname]
    if not member.isreg() or member.issparse():
        kind = "a hard link to a file that is not in the shard" if member.islnk() else "a link, a device, a pipe or a sparse file"
        raise InputError(f"{shard}: its member {member.name!r} is {kind}; pack it again with the files themselves (tar --dereference)")
    return member.offset_data, member.size


def _members(shard: Path) -> list[tarfile.TarInfo]:
    """All headers. A tar ends with a block of zeros: where it does not, the file was cut or a header is damaged."""
    try:
        with tarfile.open(shard, "r:") as tar:
            members = tar.getmembers()
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            end = tar.fileobj.read(BLOCK)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:  # the last two: a header with impossible numbers
        raise InputError(f"{shard} is not readable as an uncompressed tar: {error}; fetch it again") from error
    if end != bytes(BLOCK):
        raise InputError(f"{shard} is truncated or damaged at byte {tar.offset}; fetch it again")
    return members
