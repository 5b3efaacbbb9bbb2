"""Files and folders that appear under their name whole, or not at all."""

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
_HOST = socket.gethostname()  # a process of another host on the same disk may well be alive


@contextmanager
def staged(destination: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary name in the folder of `destination`, renamed to it when the block ends well and removed when it does not.

    A destination that is replaced is lost at no moment, whenever the process dies. What processes that died left here for the same
    destination is cleared away first, and remarked.
    Raises InputError when the destination exists (unless forced) or is no local path, and for the errors of the disk.
    """
    local(destination)
    if destination.name in ("", ".."):
        raise InputError(f"{destination} is no name for something new; give one, such as {destination / 'out'}")
    temporary, old = (destination.with_name(f".{destination.name}.{kind}-{_HOST}-{os.getpid()}") for kind in ("partial", "old"))
    try:
        _sweep(destination)
        if destination.exists() and not force:
            raise InputError(f"{destination} exists; give another name, or --force to replace it")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _put(temporary, destination, old)
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"{destination}: could not be written ({why}); free some space or choose another place") from error
    finally:
        remove(temporary)


def _put(new: Path, destination: Path, old: Path) -> None:
    """Rename `new` to `destination`; what has that name is removed afterwards, by way of the name `old` where names cannot be swapped."""
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
    """Swap two names in one step. False, and nothing is done, where the system or its file system cannot (renameat2 of Linux)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


def _sweep(destination: Path) -> None:
    """Clear away what dead processes left; a destination that one of them had moved aside gets its name back."""
    names = re.compile(rf"\.{re.escape(destination.name)}\.(partial|old)-{re.escape(_HOST)}-(\d+)")
    siblings = destination.parent.iterdir() if destination.parent.is_dir() else ()
    for left in sorted(path for path in siblings if (found := names.fullmatch(path.name)) and not _alive(int(found[2]))):
        if ".old-" in left.name and not destination.exists():
            left.rename(destination)
            remark(f"{destination}: put back what an interrupted command had replaced")
        else:
            remove(left)
            remark(f"{left}: removed, an interrupted command left it")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
