"""Counts the bad records of a run over all processes, logs them in `RUN/bad_samples.jsonl`, and judges their share."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from heirloom.common.data.bad import BadRecord, Delivered
from heirloom.common.errors import InputError
from heirloom.common.processes import exchange

BAD_SAMPLES = "bad_samples.jsonl"
JUDGED_FROM = 10_000  # examples of the run
FAILURE = -1  # in the place of a position: not a bad record, but the end of a process's data


class Feed:
    """Takes the batches of a run from its data.

    Where the data of one process of several fails, the others wait for it in the next step for minutes. So it repeats
    its last batch until `BadSamples.collect`, where all processes end with its error; no state is saved in between.
    """

    def __init__(self, data: Any) -> None:
        """data: `heirloom.common.train.loop.Data`."""
        self._data, self._last = data, None
        self.delivered = Delivered()
        """What the data says of the batch taken last."""

    def take(self) -> Any:
        """Returns the next batch, or None when the data has ended."""
        if self.delivered.failure:
            return self._last
        try:
            self._last = next(self._data, None)
            self.delivered = getattr(self._data, "delivered", Delivered())
        except InputError as error:
            if jax.process_count() == 1 or self._last is None:
                raise
            self.delivered = Delivered(failure=str(error))
        return self._last


class BadSamples:
    """The bad records of a run. Every process has one and calls `collect` at the same steps; the first writes the file.

    The file has a line for each key, {"key", "reason"}, and is only appended to.
    """

    def __init__(self, file: Path | None, limit: float, state: Mapping[str, Any]) -> None:
        """file: None in all processes but the first. limit: share of the examples. state: of a resumed run."""
        self._file, self._limit = file, limit
        self._examples, self._replaced = int(state.get("examples", 0)), int(state.get("replaced", 0))
        self._window, self._last = int(state.get("window", 0)), str(state.get("last", ""))
        self._found: list[BadRecord] = []

    def add(self, delivered: Delivered) -> None:
        """Counts a batch. What it says of bad records is this process's."""
        self._examples += delivered.examples
        self._found += delivered.bad
        if delivered.failure:
            self._found.append(BadRecord(key="", reason=delivered.failure, position=FAILURE))

    def collect(self) -> None:
        """Exchanges what was found since the last call between the processes, and logs it.

        Raises InputError in all of them when the data of one has failed.
        """
        exchanged, self._found = _of_all_processes(self._found), []
        found = [record for record in exchanged if record.position != FAILURE]
        if found:
            self._count(found)
        if len(found) < len(exchanged):
            raise InputError(exchanged[0].reason)

    def _count(self, found: Sequence[BadRecord]) -> None:
        self._replaced += len({record.position for record in found})
        self._window += len({record.position for record in found})
        self._last = found[-1].reason
        if self._file:
            _append(self._file, found)

    def state(self) -> dict[str, Any]:
        """Returns what `collect` has counted for JSON, the same in every process."""
        counts = {"examples": self._examples, "replaced": self._replaced}
        return counts | {"window": self._window, "last": self._last}

    def close_window(self) -> int:
        """Returns the number of replaced examples since the last line of metrics."""
        count, self._window = self._window, 0
        return count

    def judge(self) -> None:
        """Raises InputError when more of the run's examples were bad than the limit allows."""
        if self._examples < JUDGED_FROM or self._replaced <= self._limit * self._examples:
            return
        of = f"{self._replaced:,} of {self._examples:,} examples were bad, more than pipeline.bad_limit {self._limit:g}"
        where = f"{BAD_SAMPLES} of the run lists them"
        raise InputError(f"{of}; the last: {self._last}; {where}: repair the data, or raise --pipeline.bad-limit")


def _append(file: Path, found: Sequence[BadRecord]) -> None:
    """Adds a line for each key that the file does not have."""
    try:
        data = file.read_bytes() if file.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        known = {json.loads(line)["key"] for line in whole.splitlines()}
        with open(file, "ab") as out:
            out.truncate(len(whole))  # drops a last line that a kill cut
            for record in found:
                if record.key not in known:
                    known.add(record.key)
                    out.write(json.dumps({"key": record.key, "reason": record.reason}).encode() + b"\n")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{file}: cannot be written or read ({error})") from error


def _of_all_processes(found: Sequence[BadRecord]) -> list[BadRecord]:
    """Returns the records that all processes found, by position; rows that several processes build count once."""
    texts = exchange(json.dumps([[record.position, record.key, record.reason] for record in found]).encode())
    records = {tuple(entry) for text in texts for entry in json.loads(text)}
    return [BadRecord(key, reason, position) for position, key, reason in sorted(records)]
