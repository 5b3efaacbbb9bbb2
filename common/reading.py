"""Reads of files that fail for a moment, disappear, or change while a run uses them."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from heirloom.common.errors import InputError
from heirloom.common.paths import Address, AnyPath

WAITS = (0.1, 0.4)
"""Seconds before the second and the third try of a read that failed."""
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm")
"""Extensions of files that are pictures."""
RECHECK = 10.0
"""Seconds for which the version of an object in a bucket is trusted: asking for it costs as much as a read."""
PARSING = threading.Lock()
"""Held while the header of a .npy is read: numpy parses it as Python, and Python 3.11 now and then raises SystemError
when two threads parse at once (github.com/python/cpython/issues/106905).
"""
Result = TypeVar("Result")


@contextmanager
def parsing() -> Iterator[None]:
    """Holds PARSING. Raises OSError, and ValueError for whatever else numpy raises for a damaged header, such as
    tokenize.TokenError.
    """
    with PARSING:
        try:
            yield
        except (OSError, ValueError):
            raise
        except Exception as error:
            raise ValueError(f"its header is damaged: {error}") from error


def mapped(file: Path, mode: Literal["r", "r+"] = "r", **options: Any) -> np.memmap:
    """Maps a .npy file, to read unless `mode` differs. Raises OSError, and ValueError when it is no such file."""
    with parsing():
        return np.lib.format.open_memmap(file, mode=mode, **options)


def retried(read: Callable[[], Result], file: AnyPath | str) -> Result:
    """Returns `read()`, tried again after each of WAITS when it raises OSError.

    Raises InputError naming `file` when the last try fails too.
    """
    for wait in (*WAITS, None):
        try:
            return read()
        except OSError as error:
            if wait is None:
                raise InputError(f"{file} is not readable: {error.strerror or error}") from error
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


@dataclass(frozen=True)
class Stamp:
    """Size in bytes and time of change in ns of a file whose positions were noted; of an object, its `version`."""

    size: int
    changed: int

    @property
    def mark(self) -> str:
        """The stamp as part of a file's name."""
        return f"{self.size}-{self.changed}"

    @classmethod
    def of(cls, file: AnyPath) -> "Stamp":
        """Reads the stamp of a file. Raises InputError when there is no such file."""
        try:
            return cls(*_version(file))
        except OSError as error:
            raise InputError(f"{file} is not readable: {error}") from error

    def check(self, file: AnyPath | int) -> None:
        """Raises OSError when a file, or an open file by its number, has another stamp now.

        An object is looked up again after RECHECK seconds, so that reads before may be of a version that replaced it.
        """
        if isinstance(file, Address):
            if time.monotonic() < _trusted.get((file, self), 0.0):
                return
            found = file.version()
        else:
            found = _version(file)
        if found != (self.size, self.changed):
            raise OSError("it has changed since it was indexed; put it back, or run the command again to index it")
        if isinstance(file, Address):
            _trusted[file, self] = time.monotonic() + RECHECK


_trusted: dict[tuple[Address, Stamp], float] = {}  # until when


def _version(file: AnyPath | int) -> tuple[int, int]:
    if isinstance(file, Address):
        return file.version()
    stat = os.stat(file)
    return stat.st_size, stat.st_mtime_ns
