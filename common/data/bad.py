"""Bad records of training data: another record takes the place of each, and the batch says so.

A record is bad when reading it or making an example of it raises InputError: its picture does not decode, it has no
caption, it has no label, its file is gone. `WrongData` is not the fault of one record, which is then never replaced.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from heirloom.common.data.sources import Record, Source
from heirloom.common.data.sources.record import key_of
from heirloom.common.errors import InputError

Example = Callable[[Record, np.random.Generator], dict[str, Any]]
"""Converts a record to arrays by column; the generator is that of the position in the stream."""
Candidates = Callable[[int], Sequence[int]]
"""Returns the records that may replace a record: numbers in the source, in a fixed order; it may be among them."""
BadMode = Literal["replace", "stop"]
BAD = "/bad"  # a column of examples and batches: JSON, the bad records of each row; no source has a slash in a name
REPLACEMENTS = 8  # records that are tried in the place of a bad one
Result = TypeVar("Result")


class WrongData(InputError):
    """One record shows that the data as a whole is not what the model was made for."""


@dataclass(frozen=True)
class BadRecord:
    """A record that was replaced. reason: one line, with the key. position: of the example in the stream."""

    key: str
    reason: str
    position: int = -1


@dataclass(frozen=True)
class Delivered:
    """What an iterator says of its last batch: its examples on all hosts, and the bad records of this host.

    failure: the data of this host has failed, and the batch is the one before.
    """

    examples: int = 0
    bad: tuple[BadRecord, ...] = ()
    failure: str = ""


@dataclass(frozen=True)
class Examples:
    """Makes the example of a record, or of the record that replaces it: a function of the record and of the generator.

    The generator is that of the position in the stream, and gives the replacements: they depend on seed and position
    alone. candidates: None: the whole source.
    """

    source: Source
    example: Example
    bad: BadMode = "replace"
    candidates: Candidates | None = None

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Returns the columns of `example` and BAD.

        Raises InputError naming the record when it is bad and `bad` is "stop", when REPLACEMENTS are bad too, and for
        WrongData.
        """
        start = rng.bit_generator.state
        found = self._made(index, rng)
        if isinstance(found, dict):
            return found | {BAD: np.str_("[]")}
        if self.bad == "stop":
            raise InputError(found.reason)
        rng.bit_generator.state = start  # a bad record may have drawn from it
        tried = [found]
        for other in self._replacements(index, rng):
            made = self._made(other, rng)
            if isinstance(made, dict):
                return made | {BAD: np.str_(json.dumps([[record.key, record.reason] for record in tried]))}
            tried.append(made)
        also = f"so are the {len(tried) - 1} records tried in its place, the last: {tried[-1].reason}"
        alone = "no other record can take its place"
        raise InputError(f"{found.reason}; {also if len(tried) > 1 else alone}")

    def _replacements(self, index: int, rng: np.random.Generator) -> list[int]:
        group = range(len(self.source)) if self.candidates is None else self.candidates(index)
        chosen = rng.choice(len(group), min(REPLACEMENTS + 1, len(group)), replace=False)
        return [other for n in chosen if (other := int(group[int(n)])) != index][:REPLACEMENTS]

    def _made(self, index: int, rng: np.random.Generator) -> dict[str, Any] | BadRecord:
        record: Record = {}
        try:
            record = self.source[index]
            return self.example(record, rng)
        except WrongData:
            raise
        except InputError as error:
            key, text = str(record.get("key") or key_of(self.source, index)), str(error)
            return BadRecord(key, text if key in text else f"{key}: {text}")


def bad_records(column: Iterable[str], positions: Iterable[int]) -> tuple[BadRecord, ...]:
    """Reads the column BAD of a batch. positions: of its rows in the stream."""
    rows = zip(column, positions, strict=True)
    return tuple(BadRecord(key, reason, int(at)) for text, at in rows for key, reason in json.loads(str(text)))


def first_good(source: Source, convert: Callable[[Record], Result]) -> Result:
    """Returns `convert(record)` of the first record that is not bad: for a look at the data before a run.

    Raises the first InputError when REPLACEMENTS more records are bad too.
    """
    first: InputError | None = None
    for index in range(min(len(source), REPLACEMENTS + 1)):
        try:
            return convert(source[index])
        except WrongData:
            raise
        except InputError as error:
            first = first or error
    raise first or InputError("the data has no record")
