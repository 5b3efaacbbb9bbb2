"""Exit codes, the exceptions that lead to them, and remarks."""

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from enum import IntEnum
from math import inf
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")

SEEDS = 2**32  # of jax.random.key
FLOAT32_MAX = float(2**128 - 2**104)  # what is computed in float32 cannot hold more
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]+")  # line breaks and the like


class Exit(IntEnum):
    """Exit codes of commands. `heirloom supervise` runs a command again after all but DONE and BAD_INPUT."""

    DONE = 0
    FAILED = 1  # a verification, or an exception that nothing catches
    BAD_INPUT = 2
    LOST = 70  # EX_SOFTWARE: stuck, or another process of the job has ended without a word
    STOPPED = 75  # EX_TEMPFAIL: on request; the same command continues a training, or begins again
    INTERRUPTED = 130


class OneLine:
    """Of an exception whose message says it all: a notebook shows this line without a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [f"{type(self).__name__}: {self}"]


class InputError(OneLine, Exception):
    """Bad input (exit 2), which the user can correct.

    The message is one line: what was given, what is needed, what to type.
    """

    def __init__(self, text: str):
        super().__init__(_CONTROL.sub(" ", text).strip())  # names and messages that it quotes may have line breaks


class VerificationError(OneLine, Exception):
    """A result was computed and differs from the reference (exit 1)."""


class Stopped(OneLine, BaseException):
    """A command stopped on request (exit 75): the same one continues a training, or begins again.

    No Exception, as KeyboardInterrupt is none: what catches errors of other libraries must let it pass.
    """


TO_STOP: list[Stopped] = []
"""What a signal handler of this process raised."""


def stop_if_asked() -> None:
    """Raises `Stopped` again where it was lost: Python only prints what a callback of gc or a __del__ raises."""
    if TO_STOP:
        raise TO_STOP[0]


class Remark(UserWarning):
    """Something the user should know (guessed, assumed, left out); the command line prints it as `note: ...`."""


def remark(text: str) -> None:
    """Warns the user of `text` through Python's warnings; an empty text is ignored."""
    if text:
        warnings.warn(text, Remark, stacklevel=3)


def with_settings(cfg: Settings, settings: Mapping[str, Any]) -> Settings:
    """Returns a config with these fields replaced. Raises InputError for a field that it does not have."""
    known = [field.name for field in fields(cfg)]
    if unknown := sorted(settings.keys() - set(known)):
        raise InputError(f"no setting {unknown[0]!r}{nearest(unknown[0], known)} (there are {', '.join(known)})")
    return replace(cfg, **settings)


def positive(cfg: object, *fields: str, most: int = 2**30) -> None:
    """Raises InputError for the first of these fields that is below 1 or above `most`; for `__post_init__`.

    Of a field with several numbers each number is checked.
    """
    for name in fields:
        given = getattr(cfg, name)
        for value in given if isinstance(given, tuple | list) else (given,):
            if not value >= 1:  # true for NaN too
                raise InputError(f"{name} is {value}: choose 1 or more")
            if value > most:
                raise InputError(f"{name} is {value}: choose {most} or less")


def between(cfg: object, *fields: str, least: float = 0.0, below: float = inf, most: float = inf) -> None:
    """Raises InputError for the first of these fields that is not in [least, below), or above `most`; None is neither.

    Of a field with several numbers each number is checked.
    """
    for name in fields:
        given = getattr(cfg, name)
        for value in given if isinstance(given, tuple | list) else (given,):
            if value is not None and not (least <= value < below and value <= most):  # true for NaN too
                wanted = f"a finite number, {least:g} or more"
                if min(below, most) < inf:
                    wanted = f"a number from {least:g} to {f'below {below:g}' if below <= most else f'{most:g}'}"
                raise InputError(f"{name} is {value}: choose {wanted}")


def check_seed(seed: object, name: str = "seed") -> None:
    """Raises InputError for what is no seed of jax.random.key."""
    if not isinstance(seed, Integral) or not 0 <= int(seed) < SEEDS:
        raise InputError(f"{name} {seed}: choose a whole number from 0 to {SEEDS - 1}")


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Returns `; did you mean X?` for the candidate closest to `name`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
