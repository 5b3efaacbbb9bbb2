"""Files and folders that get their names when they are complete, and JSON files.

A bucket has no rename. There a folder is written with its index last, the files by which readers recognise it.
"""

import ctypes
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from heirloom.common.errors import InputError, remark, stop_if_asked
from heirloom.common.paths import Address, AnyPath, local

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h
_HOST = socket.gethostname()  # only processes of this host can be checked for being alive


@contextmanager
def staged(destination: AnyPath, *, force: bool = False, inputs: Sequence[AnyPath] = ()) -> Iterator[Path]:
    """Yields a temporary name next to `destination`; renames it to `destination` when the block succeeds and removes it
    when it fails.

    A destination that is replaced is never lost, even if the process is killed. What killed processes left for the same
    destination is removed first, and remarked. For an address in a bucket, the name is in the folder for temporary
    files ($TMPDIR), and is uploaded. inputs: files and folders that the command reads. Raises InputError when the
    destination exists (unless forced) or holds one of the inputs, and for errors of the disk and the bucket.
    """
    check_outside(destination, *inputs)
    if isinstance(destination, Address):
        with _uploaded(destination, force) as temporary:
            yield temporary
        return
    local(destination)
    if destination.name in ("", ".."):
        raise InputError(
            f"{destination} cannot be the name of a new file or folder; give one, such as {destination / 'out'}"
        )
    temporary, old = (
        destination.with_name(f".{destination.name}.{kind}-{_HOST}-{os.getpid()}") for kind in ("partial", "old")
    )
    try:
        _sweep(destination)
        if destination.exists() and not force:
            raise InputError(f"{destination} exists; give another name, or --force to replace it")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        stop_if_asked()
        _put(temporary, destination, old)
    except OSError as error:
        why = error.strerror or error
        raise InputError(
            f"{destination}: could not be written ({why}); free some space or choose another place"
        ) from error
    finally:
        remove(temporary)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yields a temporary name next to `file`, whose folder is made; renames it to `file` when the block succeeds and
    removes it when it fails. For small files that several processes and threads may write: readers see a whole one.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def check_outside(destination: AnyPath, *inputs: AnyPath) -> None:
    """Raises InputError where an input is inside the destination: replacing the destination would delete it."""
    for path in inputs:
        if isinstance(path, Path) and isinstance(destination, Path) and destination.resolve() in path.resolve().parents:
            raise InputError(f"{destination} holds {path}, which is read here; give another name")


@contextmanager
def _uploaded(destination: Address, force: bool) -> Iterator[Path]:
    there = destination.exists()
    if there and not force:
        raise InputError(f"{destination} exists; give another name, or --force to replace it")
    try:
        with tempfile.TemporaryDirectory(prefix="heirloom-") as folder:
            temporary = Path(folder) / destination.name
            yield temporary
            stop_if_asked()
            if there and destination.is_file() != temporary.is_file():
                kind = "folder" if temporary.is_file() else "file"
                raise InputError(f"{destination} is a {kind}, which this would hide; give another name")
            if temporary.is_file():
                destination.upload(temporary)
            else:
                _upload(temporary, destination)
    except OSError as error:
        why = error.strerror or error
        failed = f"could not be written ({why})"
        raise InputError(f"{destination}: {failed}; check the bucket, or choose another place") from error


def _upload(folder: Path, destination: Address) -> None:
    """Uploads a folder, its index last. What was there loses its index first, so that old and new are never mixed."""
    new = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    order = sorted(new, key=lambda name: (_is_index(name), -name.count("/"), name))
    old = destination.files() if destination.is_dir() else {}
    for name in sorted((name for name in old if _is_index(name)), key=lambda name: name.count("/")):
        destination.child(name).unlink()
    done: list[str] = []
    try:
        for name in order:
            done.append(name)
            destination.child(name).upload(new[name])
    except BaseException:
        for name in reversed(done):
            with suppress(OSError):  # what cannot be removed has no index
                destination.child(name).unlink()
        raise
    for name in (name for name in old if name not in new and not _is_index(name)):
        destination.child(name).unlink()


def _is_index(name: str) -> bool:
    """Returns whether readers recognise a folder by this file."""
    return name.rpartition("/")[2] in ("config.json", "model_index.json") or name.endswith(".index.json")


def _put(new: Path, destination: Path, old: Path) -> None:
    """Renames `new` to `destination`, then removes what had that name; it is first renamed to `old` where names cannot
    be swapped.
    """
    if not destination.is_dir():
        new.replace(destination)
    elif new.is_file():
        raise InputError(f"{destination} is a folder; give the name of a file")
    elif _exchange(new, destination):
        remove(new)
    else:
        destination.rename(old)
        try:
            new.rename(destination)
        except BaseException:
            old.rename(destination)
            raise
        remove(old)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two names in one step (renameat2 of Linux). Returns False and changes nothing where the system does not
    support it.
    """
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


def _sweep(destination: Path) -> None:
    """Removes what killed processes left; restores a destination that one of them had renamed."""
    names = re.compile(rf"\.{re.escape(destination.name)}\.(partial|old)-{re.escape(_HOST)}-(\d+)")
    siblings = destination.parent.iterdir() if destination.parent.is_dir() else ()
    for left in sorted(
        path for path in siblings if (found := names.fullmatch(path.name)) and not alive(int(found[2]))
    ):
        if ".old-" in left.name and not destination.exists():
            left.rename(destination)
            remark(f"{destination}: restored after an interrupted command")
        else:
            remove(left)
            remark(f"{left}: removed; an interrupted command left it")


def alive(process: int) -> bool:
    """Returns whether this host has a process with this id."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # a process of another user
        return True
    return True


def remove(path: Path) -> None:
    """Deletes a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def read_json(path: AnyPath) -> dict[str, Any]:
    """Reads a JSON object. Raises InputError when the file is not one."""
    try:
        value = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


def write_json(path: Path, value: object) -> None:
    """Writes a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
