"""Runs the stages of a long command one after another: a progress bar, the time, and the peak memory of each."""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[], None]
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Stage:
    """What a stage took. peak_bytes: largest resident memory of the process in it; None where the system tells none.

    device_bytes: largest memory in use on the first device since the process began; None on CPUs.
    """

    seconds: float
    peak_bytes: int | None
    device_bytes: int | None

    def __str__(self) -> str:
        memory = [(self.peak_bytes, "resident"), (self.device_bytes, "on the device")]
        shown = [f"{count / 1e9:.2f} GB {where}" for count, where in memory if count is not None]
        return f"{self.seconds:.1f} s" + (f", peak {', '.join(shown)}" if shown else "")


@dataclass
class Stages:
    """The stages of one command. quiet: neither bars nor lines."""

    quiet: bool = False
    done: dict[str, Stage] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str, steps: int) -> Iterator[Advance]:
        """Runs a stage of so many steps; the block calls what it gets after each of them."""
        reset_peak()
        begun = time.perf_counter()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(file=sys.stderr), transient=True, disable=self.quiet) as progress:
            task = progress.add_task(name, total=steps)
            yield lambda: progress.advance(task)
        seconds = time.perf_counter() - begun
        self.done[name] = Stage(seconds, peak_bytes(), device_bytes())
        if not self.quiet:
            print(f"{name:<14} {self.done[name]}")

    def to_json(self) -> dict[str, Any]:
        """Returns the stages as plain data."""
        return {name: asdict(stage) for name, stage in self.done.items()}


def reset_peak() -> None:
    """Starts a new measurement of the peak memory, where the system can (Linux)."""
    if _CLEAR.exists():
        _CLEAR.write_text("5")


def peak_bytes() -> int | None:
    """Returns the largest resident memory of this process since `reset_peak`; None where the system tells none."""
    if not _STATUS.exists():
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    return int(found[1]) * 1024 if found else None


def device_bytes() -> int | None:
    """Returns the largest memory in use on the first device; None where the backend tells none."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
