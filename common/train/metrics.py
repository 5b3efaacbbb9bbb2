"""The lines of a run's metrics: means, rates and times of each window, written as JSON."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import jax
import numpy as np

from heirloom.common.data.bad import Delivered
from heirloom.common.errors import InputError
from heirloom.common.files import replacing
from heirloom.common.train.bad_samples import BadSamples
from heirloom.common.train.writers import Writer

if TYPE_CHECKING:
    from heirloom.common.train.progress import ProgressLine


EVAL = "eval/"  # begins the names of held-out scores


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, with `step` and `loss` at least.

    Everything but the object under `timing` depends on the run alone: cut back and continued, the file equals that of
    a run that never stopped.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line; it survives the process from here on."""
        with self._open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """Returns the complete lines; a last one that was cut short by a kill is left out.

        Raises InputError, with its number, for a line that cannot be one of ours.
        """
        try:
            complete = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from error
        lines: list[dict[str, Any]] = []
        for number, text in enumerate(complete, start=1):
            try:
                lines.append(_line(text, lines[-1]["step"] if lines else 0))
            except (ValueError, RecursionError) as error:
                repair = "copy the file back from a backup, or delete that line"
                raise InputError(f"{self.path}: line {number} is damaged ({error}); {repair}") from error
        return lines

    def truncate(self, step: int) -> None:
        """Keep the lines up to `step`. The file is replaced whole, so a kill in between harms nothing."""
        kept = [json.dumps(line) + "\n" for line in self.lines() if line["step"] <= step]
        with replacing(self.path) as part, MetricsFile(part)._open("w") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())

    def _open(self, mode: Literal["a", "w"]) -> Any:
        try:
            return open(self.path, mode)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from error


def last_scores(lines: Sequence[Mapping[str, Any]]) -> tuple[int, dict[str, Any]]:
    """Returns the step of the last evaluation in lines of metrics and its scores, {name: value or None}; 0 and an empty
    dictionary without any.
    """
    for line in reversed(lines):
        if scores := {name.removeprefix(EVAL): value for name, value in line.items() if name.startswith(EVAL)}:
            return line["step"], scores
    return 0, {}


def _line(text: bytes, before: int) -> dict[str, Any]:
    """Returns a line of metrics. before: the step of the line before it. Raises ValueError when it is damaged."""
    line = json.loads(text.decode(), parse_constant=lambda name: _damaged(f"{name} is not written"))
    if not isinstance(line, dict):
        _damaged(f"a JSON {type(line).__name__} is not an object")
    step, loss = line.get("step"), line.get("loss", "absent")
    if type(step) is not int or not before <= step < 2**53:
        _damaged(f"its step is {step} after {before}")
    if loss is not None and type(loss) not in (int, float):
        _damaged(f"its loss is {loss}")
    for name, value in line.items():
        if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
            _damaged(f"its {name} is {value}")
    return line


def _damaged(why: str) -> NoReturn:
    raise ValueError(why)


@dataclass
class Window:
    """Sums and counts since the last line, so that a line holds the mean over all its steps.

    It is saved with each checkpoint: a resumed run closes the window that the stopped one opened.
    """

    totals: dict[str, list[float]] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, Any]) -> None:
        """metrics: {name: (sum, count)} of one step, on the host."""
        for name, (total, count) in metrics.items():
            sums = self.totals.setdefault(name, [0.0, 0.0])
            sums[0] += float(total)
            sums[1] += float(count)

    def close(self) -> dict[str, float | None]:
        """{name: mean}, None where nothing was counted; the window starts anew."""
        means = {name: total / count if count else None for name, (total, count) in sorted(self.totals.items())}
        self.totals = {}
        return means


@dataclass(frozen=True)
class Work:
    """What one step costs, for the rates on the progress line."""

    examples: int
    """Examples in a step, over all devices."""
    flops_per_example: float | None = None
    """Floating-point operations of one example: forward, backward, and the teacher's forward. From `heirloom inspect`.
    """
    peak: float | None = None
    """Peak FLOP/s of all devices together; None where unknown."""


class Clock:
    """Where the time of a window went; what is paused (evaluation, saving) counts for nothing."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.opened = self.started = self._before = time.perf_counter()
        self.waited = self.stalled = 0.0
        self._steps: list[float] = []

    def step(self) -> None:
        """One more step is done."""
        now = time.perf_counter()
        self._steps.append(now - self._before)
        self._before = now

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time of this block is spent waiting for data."""
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time of this block is no part of the window."""
        before = time.perf_counter()
        yield
        spent = time.perf_counter() - before
        self.opened += spent
        self._before += spent

    @contextmanager
    def saving(self) -> Iterator[None]:
        """The loop stands still in this block to save a state; it is no part of the window, and counted separately."""
        before = time.perf_counter()
        with self.paused():
            yield
        self.stalled += time.perf_counter() - before

    def close(self) -> dict[str, float | None]:
        """`timing` of a line: seconds since the start, examples per second, MFU, share of time waiting for data,
        seconds of the window in which the loop stood still for saves, the median, 95th percentile and longest step of
        the window in seconds, and the peak memory of this process in bytes.
        """
        now = time.perf_counter()
        busy = max(now - self.opened, 1e-9)
        rate = len(self._steps) * self.work.examples / busy
        per_example, peak = self.work.flops_per_example, self.work.peak
        usage = rate * per_example / peak if per_example and peak else None
        timing: dict[str, float | None] = {"seconds": now - self.started, "examples_per_second": rate}
        timing |= {"mfu": usage, "data_wait": min(self.waited / busy, 1.0), "save_stall": self.stalled}
        times = np.percentile(self._steps, [50, 95, 100]) if self._steps else [None] * 3
        timing |= {name: t if t is None else float(t) for name, t in zip(STEP_TIMES, times, strict=True)}
        timing["host_peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
        self.opened, self._steps, self.waited, self.stalled = now, [], 0.0, 0.0
        return timing


STEP_TIMES = ("step_p50", "step_p95", "step_max")
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass
class Recorder:
    """Turns the metrics of single steps into lines, and sends each line everywhere.

    Metrics are read one step late: while they travel, the devices already have the next step queued, and the host is
    never more than that one step ahead.
    """

    log_every: int
    file: MetricsFile | None
    """None in all processes but the first, which alone writes."""
    progress: "ProgressLine"
    clock: Clock
    window: Window
    bad: BadSamples
    writers: Sequence[Writer]
    skipped: int
    """Non-finite steps in a row, up to `step`."""
    step: int = 0
    """The last step that was read."""
    _late: tuple[int, Mapping[str, Any], Delivered] | None = None

    def push(self, step: int, metrics: Mapping[str, Any], delivered: Delivered) -> None:
        """Takes the metrics of a step just dispatched; reads the step before and writes its line if one is due.

        delivered: what the data says of the step's batch.
        """
        if self._late is not None:
            self.read()
            if self.step % self.log_every == 0:
                self.write({})
        self._late = step, metrics, delivered

    def read(self) -> None:
        """Wait for the step pushed last and count its metrics."""
        assert self._late is not None, "nothing was pushed since the last read"
        (self.step, metrics, delivered), self._late = self._late, None
        values = jax.device_get(metrics)
        self.window.add(values)
        self.bad.add(delivered)
        self.clock.step()
        self.skipped = 0 if values["loss"][1] else self.skipped + 1
        self.progress.advance(self.step)

    def write(self, evaluation: Mapping[str, float]) -> None:
        """Close the window and write its line, with the evaluation of the same step.

        Raises InputError when too many records were bad.
        """
        values = self.window.close() | {f"{EVAL}{name}": value for name, value in evaluation.items()}
        values = {
            name: float(value) if value is not None and math.isfinite(value) else None for name, value in values.items()
        }
        self.bad.collect()
        bad = self.bad.close_window()
        line: dict[str, Any] = {"step": self.step, "loss": values.pop("loss"), **values}
        line |= ({"bad": bad} if bad else {}) | {"timing": self.clock.close()}
        if self.file is not None:
            self.file.append(line)
            self.progress.show(line)
            known = {name: value for name, value in line.items() if isinstance(value, float) or name == "bad"}
            for writer in self.writers:
                writer.write(self.step, known)
        self.bad.judge()

    def state(self) -> dict[str, Any]:
        """Returns the open window and the count of bad records, to be saved with the state of the same step."""
        self.bad.collect()
        return {"window": self.window.totals, "bad": self.bad.state()}
