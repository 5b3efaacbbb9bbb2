"""Reads of files that fail for a moment, disappear, or change while a run uses them."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from heirloom.common.errors import InputError

WAITS = (0.1, 0.4)
"""Seconds before the second and the third try of a read that failed."""
Result = TypeVar("Result")


def retried(read: Callable[[], Result], file: Path | str) -> Result:
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
    """Size in bytes and time of change in ns of a file whose positions were noted."""

    size: int
    changed: int

    @classmethod
    def of(cls, file: Path) -> "Stamp":
        """Reads the stamp of a file. Raises InputError when there is no such file."""
        try:
            stat = file.stat()
        except OSError as error:
            raise InputError(f"{file} is not readable: {error}") from error
        return cls(stat.st_size, stat.st_mtime_ns)

    def check(self, file: Path | int) -> None:
        """Raises OSError when a file, or an open file by its number, has another stamp now."""
        stat = os.stat(file)
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.changed):
            raise OSError("it has changed since it was indexed; put it back, or run the command again to index it")
