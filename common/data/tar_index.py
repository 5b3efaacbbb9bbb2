"""Random access into tar shards (webdataset, img2dataset): where the members of every sample lie, read from the headers alone.

The index of a shard is a small .npy table beside it, `NAME.tar.index-SIZE-MTIME.npy`, or under $XDG_CACHE_HOME/heirloom
(~/.cache by default) where the shard's folder is read-only. Size and time of change are in the name, so a changed shard
finds no index and gets a new one. The table is memory-mapped for each look-up: thousands of shards cost no memory.
"""

import glob
import hashlib
import os
import tarfile
from pathlib import Path

import numpy as np

from common.errors import InputError

SPAN = np.dtype([("offset", "<i8"), ("size", "<i8")])  # size -1: this sample has no such member
STEM = "/stem"  # the field that is no extension, and can be none
BLOCK = 512


def index_shard(shard: Path) -> Path:
    """The .npy file with one row per sample of `shard`, in the order of the file; built when there is none yet.

    Its fields are STEM (bytes, the name up to the first dot behind the folder) and one SPAN per extension, such as `jpg` and
    `txt`. Raises InputError naming a shard that is missing, empty, truncated, compressed or has a member twice.
    """
    try:
        stat = shard.stat()
    except OSError as error:
        raise InputError(f"{shard} is not readable: {error}") from error
    name = f"{shard.name}.index-{stat.st_size}-{stat.st_mtime_ns}.npy"
    beside = shard.parent / name
    if beside.exists():
        return beside
    file = beside if os.access(shard.parent, os.W_OK) else _cache_folder(shard) / name
    if not file.exists():
        _write(file, _table(shard))
        for old in file.parent.glob(f"{glob.escape(shard.name)}.index-*.npy"):
            if old != file:
                old.unlink(missing_ok=True)
    return file


def read_span(shard: Path, span: np.void) -> bytes:
    """The bytes of one member. Opens the file anew: safe from any thread or process, and cheap beside decoding a picture."""
    with open(shard, "rb") as file:
        file.seek(int(span["offset"]))
        data = file.read(int(span["size"]))
    if len(data) != span["size"]:
        raise InputError(f"{shard} has become shorter since it was indexed: it is truncated or being written; fetch it again")
    return data


def _cache_folder(shard: Path) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "heirloom" / "tar_index" / hashlib.sha256(os.fsencode(shard.parent.resolve())).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(file: Path, table: np.ndarray) -> None:
    part = file.with_name(f"{file.name}.{os.getpid()}.part")  # several processes may build the same index at once
    with open(part, "wb") as out:
        np.save(out, table)
    os.replace(part, file)


def _table(shard: Path) -> np.ndarray:
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for member in _members(shard):
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not member.isreg() or not stem or not extension:
            continue  # folders, links, hidden files
        spans = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
        if extension.lower() in spans:
            raise InputError(f"{shard} has the member {member.name!r} twice; the second would hide the first")
        spans[extension.lower()] = (member.offset_data, member.size)
    extensions = sorted({extension for spans in samples.values() for extension in spans})
    stems = [stem.encode() for stem in samples]
    table = np.zeros(len(samples), [(STEM, f"S{max(map(len, stems), default=1)}"), *((e, SPAN) for e in extensions)])
    table[STEM] = stems
    for extension in extensions:
        table[extension] = np.array([spans.get(extension, (0, -1)) for spans in samples.values()], SPAN)
    return table


def _members(shard: Path) -> list[tarfile.TarInfo]:
    """All headers. A tar ends with a block of zeros: where it does not, the file was cut or a header is damaged."""
    try:
        with tarfile.open(shard, "r:") as tar:
            members = tar.getmembers()
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            end = tar.fileobj.read(BLOCK)
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{shard} is not readable as an uncompressed tar: {error}; fetch it again") from error
    if end != bytes(BLOCK):
        raise InputError(f"{shard} is truncated or damaged at byte {tar.offset}; fetch it again")
    return members
