"""How a command can end badly: bad input (exit 2), a failed verification (exit 1), a stop on request (exit 75). And remarks."""

import difflib
import re
import warnings
from collections.abc import Iterable
from math import inf
from typing import Any

_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]+")  # line breaks and the like


class InputError(Exception):
    """Something the user can mend: one line that says what is wrong and what to do, whatever names and messages it quotes."""

    def __init__(self, text: str):
        super().__init__(_CONTROL.sub(" ", text).strip())


class VerificationError(Exception):
    """A result was computed and is not what the reference says."""


class Stopped(Exception):
    """A training was asked to stop and saved its state; the same command continues it (exit 75, EX_TEMPFAIL)."""


class Remark(UserWarning):
    """Something the user should know: what was guessed, assumed or left out. The command line prints it as one line."""


def remark(text: str) -> None:
    """Say `text`, if there is any, through Python's warnings."""
    if text:
        warnings.warn(text, Remark, stacklevel=3)


def positive(cfg: Any, *fields: str, most: int = 2**30) -> None:
    """Raises InputError for the first of these fields of a config that is below 1 or above `most`: what its `__post_init__` calls.

    A field may be a tuple of numbers: each is checked.
    """
    for name in fields:
        given = getattr(cfg, name)
        for value in given if isinstance(given, tuple) else (given,):
            if not value >= 1:  # nor is NaN
                raise InputError(f"{name} is {value}: choose 1 or more")
            if value > most:
                raise InputError(f"{name} is {value}: choose {most} or less")


def between(cfg: Any, *fields: str, least: float = 0.0, below: float = inf) -> None:
    """Raises InputError for the first of these fields of a config that is not a number in [least, below). None is no number to check."""
    for name in fields:
        value = getattr(cfg, name)
        if value is not None and not least <= value < below:  # nor is NaN
            wanted = f"a finite number, {least:g} or more" if below == inf else f"a number from {least:g} to below {below:g}"
            raise InputError(f"{name} is {value}: choose {wanted}")


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`; did you mean X?` for the candidate closest to `name`, or nothing when none is close."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
