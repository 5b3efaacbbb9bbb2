"""Atomic writes: a file or folder gets its name when it is complete."""

import ctypes
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from heirloom.common.errors import InputError, remark
from heirloom.common.paths import local

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h
_HOST = socket.gethostname()  # only processes of this host can be checked for being alive


@contextmanager
def staged(destination: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a temporary name next to `destination`; renames it to `destination` when the block succeeds and removes it
    when it fails.

    A destination that is replaced is never lost, even if the process is killed. What killed processes left for the same
    destination is removed first, and remarked. Raises InputError when the destination exists (unless forced) or is not
    a local path, and for errors of the disk.
    """
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
        _put(temporary, destination, old)
    except OSError as error:
        why = error.strerror or error
        raise InputError(
            f"{destination}: could not be written ({why}); free some space or choose another place"
        ) from error
    finally:
        remove(temporary)


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
