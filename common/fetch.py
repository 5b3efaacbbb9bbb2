"""Local copies of objects in buckets, under $XDG_CACHE_HOME/heirloom/fetched (~/.cache by default).

The copies have the names of the addresses, so messages name both: fetched/gs/bucket/folder/name. A copy is used again
while size and version of the object are the same. A download that was interrupted is continued.
"""

import fcntl
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from heirloom.common.errors import InputError, remark
from heirloom.common.paths import Address, cache_root
from heirloom.common.reading import retried

CHUNK = 16 * 2**20  # bytes of a request
PARALLEL = 4  # files downloaded at a time
_OF_THE_HUB = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})(/.+)?$")  # of huggingface_hub's cache
Versions = Mapping[str, tuple[int, int]]
"""Size and version of each object of a folder, by its path from there."""


def fetch(address: Address) -> Path:
    """Returns the local copy of an object. Raises InputError when it is missing, or cannot be downloaded or stored."""
    with _failures(address):
        return _object(address, address.version())


def fetch_folder(folder: Address, versions: Versions, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """Returns a folder with local copies of the `wanted` objects of a folder in a bucket.

    versions: of everything there is (`Address.files`); copies of objects that are gone are removed. Raises InputError
    when an object cannot be downloaded or stored.
    """
    with _failures(folder):
        names = [name for name in versions if wanted(name)]
        for name in names:
            if {"", ".", ".."} & set(name.split("/")):
                raise InputError(f"{folder}: the object {name!r} cannot be a file here; rename it")
        local = copy_of(folder)
        for file in [file for file in local.rglob("*") if file.is_file()] if local.is_dir() else []:
            if file.relative_to(local).as_posix() not in versions:
                file.unlink()
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(lambda name: _object(folder.child(name), versions[name]), names))
        return local


def copy_of(address: Address) -> Path:
    """Returns the place of the local copy, which need not be there."""
    return cache_root() / "fetched" / address.scheme / address.key


def origin(path: Path) -> str:
    """Returns the address of a local copy, of a bucket or of the hub (hf:org/name@revision); of another path, the
    path.
    """
    if found := _OF_THE_HUB.search(path.as_posix()):
        return f"hf:{found[1]}/{found[2]}{found[4] or ''}@{found[3]}"
    root = cache_root() / "fetched"
    if not path.is_relative_to(root):
        return str(path)
    scheme, *names = path.relative_to(root).parts
    return f"{scheme}://{posixpath.join(*names)}"


def _object(address: Address, version: tuple[int, int]) -> Path:
    """Downloads an object unless its copy is of this version; one process at a time."""
    file, (size, number) = copy_of(address), version
    state = cache_root() / "fetching" / sha256(str(address).encode()).hexdigest()[:32]
    state.parent.mkdir(parents=True, exist_ok=True)
    with open(state, "a+") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        mark.seek(0)
        if file.is_file() and file.stat().st_size == size and mark.read() == f"{size}-{number}":
            return file
        part = state.with_name(f"{state.name}.{size}-{number}.part")
        for old in state.parent.glob(f"{state.name}.*.part"):
            if old != part:
                old.unlink()
        download(address, size, part)
        if address.version() != version:
            part.unlink()
            raise OSError("it was replaced while it was downloaded; run the command again")
        mark.truncate(0)
        file.parent.mkdir(parents=True, exist_ok=True)
        part.replace(file)
        mark.write(f"{size}-{number}")
    return file


def download(address: Address, size: int, part: Path) -> None:
    """Downloads an object to a file, or what is missing there. Raises InputError after several failures in a row."""
    with open(part, "ab") as out:
        done = out.tell()
        if size - done > CHUNK:
            continued = f", the first {done / 1e6:,.0f} MB are here" if done else ""
            remark(f"{address}: downloading {size / 1e6:,.0f} MB into {cache_root()}{continued}")
        while done < size:
            count = min(CHUNK, size - done)
            out.write(retried(lambda at=done, count=count: address.read_range(at, count), address))  # type: ignore[misc]
            out.flush()
            done += count
        os.fsync(out.fileno())


@contextmanager
def _failures(address: Address) -> Iterator[None]:
    """Turns errors of the bucket and of the local disk into InputError."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{address}: no such file or folder") from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise InputError(f"{address}: cannot be downloaded ({where}{error.strerror or error})") from error
