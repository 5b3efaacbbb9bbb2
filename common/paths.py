"""What an address is: gs://, s3:// and memory:// name objects in buckets, opened by fsspec; file:// is a local path.

`place` returns an `Address` for the first three and a `Path` otherwise. An `Address` has the part of pathlib's
interface that reading needs, and raises OSError where a `Path` does. Credentials are those of the libraries: gcsfs
(application default), s3fs (environment, instance role).
"""

import errno
import glob
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from functools import cache
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from heirloom.common.errors import InputError

BUCKETS: Mapping[str, str] = {"gs": "gcs", "s3": "s3", "memory": ""}
"""The schemes of addresses, and the extra of this package that brings the library of each."""
FIELDS = ("path", "donor", "teacher", "autoencoder", "text_encoder", "backend")
"""The fields of configs that may hold an address: data, and SOURCEs of weights."""
BLOCK = 4 * 2**20  # bytes that reading from start to end fetches at a time
WAITS = (0.5, 2.0, 8.0)
"""Seconds before the next tries of a request that only reads and failed, after those of the library itself."""
_ADDRESS = re.compile(r"(?:^|[=:@,])([A-Za-z][A-Za-z0-9+.-]+)://")
_COLLAPSED = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/")  # pathlib turns :// into :/
_ONE_SLASH = re.compile(rf"^({'|'.join(BUCKETS)}|file):/(?!/)")
_REASON = 200  # characters of a library's message that an error quotes


@dataclass(frozen=True, order=True)
class Address:
    """An object, or all objects whose key begins with `key/` (a folder). key: bucket, and names, joined by slashes."""

    scheme: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> "Address":
        """The folder of an object; of a bucket, the bucket itself."""
        return Address(self.scheme, self.key.rpartition("/")[0] or self.key)

    def __truediv__(self, name: str) -> "AnyPath":
        """Returns a path from here; an absolute path, or another address, stays what it is, as in pathlib."""
        if name.startswith("/") or _ADDRESS.match(name):
            return place(name)
        parts = self.key.split("/")
        for part in name.split("/"):
            if part == ".." and len(parts) > 1:
                parts.pop()
            elif part not in ("", "."):
                parts.append(part)
        return Address(self.scheme, "/".join(parts))

    def child(self, name: str) -> "Address":
        """Returns an object of this folder. name: its path from here, as in `files`."""
        return Address(self.scheme, f"{self.key}/{name}")

    def with_suffix(self, suffix: str) -> "Address":
        name = PurePosixPath(self.name).with_suffix(suffix)
        return Address(self.scheme, f"{self.key.removesuffix(self.name)}{name}")

    def relative_to(self, folder: "Address") -> PurePosixPath:
        return PurePosixPath(self.key).relative_to(folder.key)

    def version(self) -> tuple[int, int]:
        """Returns the size of an object in bytes, and a number of its version (from generation, ETag or time)."""
        return _version(self._info())

    def exists(self) -> bool:
        return self._kind() != ""

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def scandir(self) -> list["Entry"]:
        """Returns what a folder has, sorted by name."""
        found = self._asked(lambda: self._fs.ls(self._path, detail=True))
        return sorted(self._entries(found))

    def files(self, deep: bool = True) -> dict[str, tuple[int, int]]:
        """Returns the `version` of the objects of a folder by path from there; deep: also of those in sub-folders."""
        found = self._asked(lambda: self._fs.find(self._path, detail=True, maxdepth=None if deep else 1)).values()
        return {e.path.relative_to(self).as_posix(): _version(e.info) for e in self._entries(found) if e.is_file()}

    def glob(self, pattern: str) -> list["Address"]:
        """Returns what a pattern from here matches, in order; hidden names only where the pattern names them."""
        found = self._asked(lambda: self._fs.glob(f"{glob.escape(self._path)}/{pattern}"))
        below = (self._named(name) for name in sorted(found))
        hidden = "/." in f"/{pattern}"
        return [one for one in below if hidden or not any(p.startswith(".") for p in one.relative_to(self).parts)]

    def matches(self) -> list["Address"]:
        """Returns what this address matches as a pattern, in order."""
        names = self.key.split("/")
        first = next((i for i, name in enumerate(names) if glob.has_magic(name)), 0)
        return Address(self.scheme, "/".join(names[:first])).glob("/".join(names[first:])) if first else []

    def open(self, mode: str = "rb", *, ahead: bool = True) -> BinaryIO:
        """Opens an object for reading. ahead: fetch whole blocks, for reading from start to end."""
        with self._failures():
            how: dict[str, Any] = {"cache_type": "readahead", "block_size": BLOCK} if ahead else {"cache_type": "none"}
            return self._fs.open(self._path, mode, **how)

    def read_bytes(self) -> bytes:
        return self._asked(lambda: self._fs.cat_file(self._path))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def read_range(self, start: int, size: int) -> bytes:
        """Reads `size` bytes with one ranged request. Raises OSError when fewer come."""
        if not size:
            return b""

        def read() -> bytes:
            data = self._fs.cat_file(self._path, start=start, end=start + size)
            if len(data) != size:
                raise OSError(errno.EIO, f"{len(data)} of {size} bytes came; it is cut, or being written")
            return data

        return self._asked(read)

    def write_bytes(self, data: bytes) -> None:
        """Writes an object; it appears whole or not at all."""
        with self._failures():
            self._fs.pipe_file(self._path, data)

    def upload(self, file: Path) -> None:
        """Writes a local file as this object. Raises OSError when another number of bytes arrived."""
        with self._failures():
            self._fs.put_file(str(file), self._path)
        if (arrived := self.version()[0]) != (size := file.stat().st_size):
            raise OSError(errno.EIO, f"{arrived} of {size} bytes arrived")

    def unlink(self) -> None:
        with self._failures():
            self._fs.rm_file(self._path)

    @property
    def _fs(self) -> Any:
        return _filesystem(self.scheme, os.getpid())

    @property
    def _path(self) -> str:
        return f"/{self.key}" if self.scheme == "memory" else self.key

    def _named(self, name: str) -> "Address":
        return Address(self.scheme, name.strip("/"))

    def _entries(self, found: Iterable[Mapping[str, Any]]) -> "Iterator[Entry]":
        """Yields listed objects and folders without the empty object that some tools make for a folder."""
        for info in found:
            if not info["name"].endswith("/") or info["type"] == "directory":
                entry = Entry(self._named(info["name"]), info)
                if entry.path != self:
                    yield entry

    def _info(self) -> Mapping[str, Any]:
        return self._asked(lambda: self._fs.info(self._path))

    def _kind(self) -> str:
        """Returns "file", "directory", or "" where there is neither."""
        try:
            return str(self._info()["type"])
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise InputError(f"{self} is not readable: {error.strerror or error}") from error

    def _asked(self, request: Callable[[], Any]) -> Any:
        """Returns the answer to a request that only reads, tried again after each of WAITS. Raises OSError."""
        for wait in (*WAITS, None):
            try:
                with self._failures():
                    return request()
            except (FileNotFoundError, PermissionError):
                raise
            except OSError:
                if wait is None:
                    raise
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turns the errors of the libraries into OSError, with a message of one line."""
        try:
            yield
        except InputError:
            raise
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self)) from error
        except Exception as error:  # gcsfs, botocore and aiohttp raise their own types
            number = getattr(error, "errno", None) or errno.EIO
            why = getattr(error, "strerror", None) or " ".join(str(error).split())[:_REASON] or type(error).__name__
            raise OSError(number, why) from error


@dataclass(frozen=True, order=True)
class Entry:
    """An entry of a listing, with the interface of `os.DirEntry`."""

    path: Address
    info: Any

    @property
    def name(self) -> str:
        return self.path.name

    def is_dir(self) -> bool:
        return self.info["type"] == "directory"

    def is_file(self) -> bool:
        return self.info["type"] == "file"

    def is_symlink(self) -> bool:
        return False


AnyPath = Path | Address


def place(text: str | AnyPath) -> AnyPath:
    """Returns the address or the local path that a text names.

    Raises InputError for an address of another scheme, or whose library is not installed.
    """
    if not isinstance(text, str):
        return text
    scheme, separator, key = text.partition("://")
    if separator and scheme in BUCKETS:
        names = key.rstrip("/").split("/")
        if {"", ".", ".."} & set(names):
            raise InputError(f"{text}: give a bucket and names, such as {scheme}://bucket/folder/name")
        _library(scheme)
        return Address(scheme, "/".join(names))
    text = without_file(text)
    if found := _ONE_SLASH.match(text):
        scheme = found[1]
        right = f"{scheme}://{text[found.end() :]}, with two slashes"
        raise InputError(f"{text}: write {'the path alone, without file:' if scheme == 'file' else right}")
    local(text)
    return Path(text).expanduser()


def join(folder: AnyPath, name: str) -> AnyPath:
    """Returns the file that a table in `folder` names: relative to it, absolute, or by address."""
    return place(name) if is_address(name) else folder / name


def cache_root() -> Path:
    """Returns the folder of what can be made or downloaded again: $XDG_CACHE_HOME/heirloom, ~/.cache by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heirloom"


METRICS = "metrics.jsonl"  # a folder with this file is a run


def stages_of(run: Path) -> list[Path]:
    """Returns the stages of a training, which are runs in folders of their own, in their order."""
    found = (file.parent for file in run.glob(f"stage_*/{METRICS}"))
    numbers = {int(n): folder for folder in found if (n := folder.name.removeprefix("stage_")).isdecimal()}
    return [numbers[n] for n in sorted(numbers)]


def copy_of_run(address: Address) -> Path:
    """Returns the local folder of a run in a bucket, which need not be there."""
    return cache_root() / "runs" / address.scheme / address.key


def without_file(text: str) -> str:
    """Returns a text with file:///folder as /folder."""
    return re.sub(r"(^|[=:@,])file:///", r"\1/", text)


def is_address(text: str) -> bool:
    """Returns whether a text names an object or a folder in a bucket."""
    return text.partition("://")[0] in BUCKETS and "://" in text


def local(path: object, what: str = "this command") -> None:
    """Raises InputError when `path` is an address (gs://, s3://, https://, file://), not a path on this machine.

    what: the part of the command that takes no address, for the message.
    """
    found = (_COLLAPSED if isinstance(path, Path) else _ADDRESS).search(str(path))
    if not found:
        return
    scheme = found[1]
    text = _COLLAPSED.sub(r"\1://", str(path)) if isinstance(path, Path) else str(path)
    if scheme in ("http", "https"):
        needed = "write hf:org/name for a Hugging Face model, and download other files first"
        raise InputError(f"{text}: web addresses are not read; {needed}")
    if scheme == "file":
        raise InputError(f"{text}: write the path alone, without file:")
    if scheme not in BUCKETS:
        raise InputError(f"{text}: there is no way to read {scheme}: addresses; known are {', '.join(BUCKETS)}, file")
    copy = "give a local path, and copy to or from it"
    raise InputError(f"{text}: {what} takes no address in a bucket ({scheme}:); {copy}")


def all_local(cfg: object, what: str = "this recipe", field: str = "") -> None:
    """Raises InputError for the first string in a config, at any depth, that is an address and not in one of FIELDS."""
    if isinstance(cfg, str) and field.rpartition(".")[2] in FIELDS and is_address(without_file(cfg)):
        place(cfg)
    elif isinstance(cfg, str | Path | Address):
        local(cfg, f"{what} --{field.replace('_', '-')}" if field else what)
    elif is_dataclass(cfg):
        for one in fields(cfg):
            all_local(getattr(cfg, one.name), what, f"{field}.{one.name}".strip("."))
    elif isinstance(cfg, tuple | list):
        for value in cfg:
            all_local(value, what, field)


def _version(info: Mapping[str, Any]) -> tuple[int, int]:
    names = ("generation", "etag", "ETag", "mtime", "LastModified", "created")
    mark = next((info[name] for name in names if info.get(name)), "")
    mark = mark.timestamp() if isinstance(mark, datetime) else mark  # fsspec's memory gives both
    return int(info.get("size") or 0), int(sha256(str(mark).encode()).hexdigest()[:15], 16)


@cache
def _filesystem(scheme: str, process: int) -> Any:
    """Opens the library of a scheme, once in a process: fsspec itself opens one for each thread.

    Listings are not cached: what another job wrote is seen.
    """
    import fsspec

    _library(scheme)
    if scheme == "gs" and "STORAGE_EMULATOR_HOST" in os.environ:
        logging.getLogger("gcsfs").setLevel(logging.ERROR)  # an emulator has no kinds of buckets, warned at each call
    return fsspec.filesystem(scheme, use_listings_cache=False)


@cache
def _library(scheme: str) -> None:
    """Imports the library of a scheme. Raises InputError when it is not installed."""
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = BUCKETS[scheme]
        raise InputError(f"{scheme}:// addresses need another library: pip install 'heirloom-jax[{extra}]'") from error
