"""What watches over a training: who is stuck is stopped, steps are profiled, compiled programs are kept."""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import jax
from jax.experimental.compilation_cache import compilation_cache

from heirloom.common.errors import Exit

TIMES = 10  # medians without a step are too many
AFTER = 10  # steps before a profile begins: compilation and the first batches are over


class Watchdog:
    """Ends a process whose loop stands still: no step for `seconds`, and for ten times the median of the steps before.

    Evaluations and saves, inside `paused`, do not count, nor does the first step, which compiles. Before the end it
    writes the stacks of all threads to `file`, and one line that names it. seconds: 0 watches nothing.
    """

    def __init__(self, seconds: float, file: Path, end: Callable[[int], NoReturn] = os._exit) -> None:
        self.seconds, self.file, self._end = seconds, file, end
        self._before: float | None = None
        self._steps: deque[float] = deque(maxlen=101)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def step(self) -> None:
        """One more step is done."""
        now = time.monotonic()
        if self._before is not None:
            self._steps.append(now - self._before)
        self._before = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What lasts in this block is no part of a step."""
        self._before = None
        yield
        self._before = time.monotonic() if self._steps else None

    def limit(self) -> float:
        """Returns the seconds without a step from which the loop is stuck."""
        return max(self.seconds, TIMES * statistics.median(self._steps)) if self._steps else self.seconds

    def _watch(self) -> None:
        # Counted in waits, not by the clock: none ends while the process is suspended (Ctrl-Z, a closed laptop).
        before, still, wait = self._before, 0.0, min(self.seconds / 10, 10)
        while not self._over.wait(wait):
            if self._before is None or self._before != before:
                before, still = self._before, 0.0
                continue
            still += wait
            if still < self.limit():
                continue
            with open(self.file, "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            stuck = f"no step for {still:.0f} s: what every thread was doing is in {self.file}"
            print(f"heirloom: {stuck}; the same command continues from the last state", file=sys.stderr, flush=True)
            self._end(Exit.LOST)
            return


class Profile:
    """Records `steps` steps, after the first ten of a process, to `directory`, for xprof or TensorBoard; 0: none."""

    def __init__(self, steps: int, directory: Path) -> None:
        self.steps, self.directory = steps, directory
        self._done, self._open = 0, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def step(self) -> None:
        """One more step is done."""
        self._done += 1
        if self.steps and self._done == AFTER:
            jax.profiler.start_trace(str(self.directory))
            self._open = True
        elif self._done == AFTER + self.steps:
            self._close()

    def _close(self) -> None:
        if self._open:
            self._open = False
            jax.profiler.stop_trace()


CACHE = "jax_compilation_cache_dir"
_kept = ""  # the folder of the last run that this process kept programs in


def keep_compiled(directory: Path) -> None:
    """Keep compiled programs in a folder, so that a resume starts without compiling again. A cache that somebody else
    has set (JAX_COMPILATION_CACHE_DIR) stays in use.
    """
    global _kept
    if (getattr(jax.config, CACHE) or "") == _kept:
        _kept = str(directory)
        jax.config.update(CACHE, _kept)
        compilation_cache.reset_cache()
