"""A run: one folder and the training loop. A run that was killed at any step resumes with the same results."""

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import jax
from jax.experimental import multihost_utils
from rich.console import Console

from heirloom.common.checkpoint.state import KEEP, Checkpoints, Keep, steps_on_disk
from heirloom.common.chips import peak_flops
from heirloom.common.errors import InputError, Stopped, remark
from heirloom.common.files import read_json, replacing
from heirloom.common.paths import METRICS, local, stages_of
from heirloom.common.processes import on_first
from heirloom.common.train.bad_samples import BAD_SAMPLES, BadSamples, Feed
from heirloom.common.train.bucket import apart, portable
from heirloom.common.train.lease import Lease
from heirloom.common.train.metrics import Clock, MetricsFile, Recorder, Window, Work, last_scores
from heirloom.common.train.progress import ProgressLine
from heirloom.common.train.resume import FREE, changes, difference
from heirloom.common.train.state import State
from heirloom.common.train.step import Batch, Step
from heirloom.common.train.watch import Profile, Watchdog
from heirloom.common.train.writers import Writer

REPEATED = 2.0
"""Seconds in which a signal that comes again is the same one: a terminal, and schedulers, send it to `heirloom
supervise` and to the training, and the former sends it on.
"""


@dataclass(frozen=True)
class Cadence:
    """Steps between two lines of metrics, two checkpoints and two evaluations."""

    log: int = 50
    save: int = 1000
    eval: int = 1000
    stuck: float = 0
    """Seconds without a step after which the process ends (`Watchdog`); 0: never."""
    profile: int = 0
    """Steps that are recorded to RUN/profile (`Profile`)."""


class Data(Protocol):
    """An iterator of batches on devices. state(): the position after the last batch returned, not prefetched.

    One that replaces bad records has `delivered`, what it says of the last batch, and `bad_limit` (`Batches`).
    """

    def __next__(self) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any], /) -> None: ...


@dataclass
class Run:
    """The folder `RUN/{config.json, metrics.jsonl, checkpoints/, model/}`, which one job writes; `bad_samples.jsonl` in
    it lists bad records.
    """

    directory: Path
    config: dict[str, Any]
    keep: Keep = KEEP
    lease: Lease | None = None
    """In the first process of a job; released when the run is no longer used."""
    resumed: dict[str, Any] = field(default_factory=dict)
    """The JSON saved with the restored state: the position in the data, the open metrics window, the bad records."""
    counted: dict[str, Any] = field(default_factory=dict)
    """The bad records of the phases before, `BadSamples.state()`."""

    @classmethod
    def open(
        cls,
        directory: Path | str,
        config: Mapping[str, Any],
        *,
        keep: Keep = KEEP,
        defaults: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> "Run":
        """Creates or reopens the folder and takes its lease. Call it after `start`, in every process.

        defaults: adds the fields that are missing in the config of an earlier version (`with_defaults`). A change that
        a resume may have is remarked. Raises InputError when the folder has a run with another config, with the
        differing fields, when it has the config.json of something else, when its last state is gone though it has a
        model, when another job writes it, and when it cannot be written.
        """
        local(Path(directory), "a run")
        directory = Path(directory).absolute()
        file, text = directory / "config.json", json.dumps(portable(config), indent=2)
        lease: list[Lease] = []

        def take() -> None:
            done, steps = _done(directory), config.get("steps", math.inf)
            # Before that the config may still change. An imported zoo has neither steps nor metrics.
            begun = done > 0 or (directory / METRICS).exists() or (directory / "zoo").is_dir()
            before = read_json(file) if begun or file.exists() else {}
            # Recipes of any two methods share more than a third of their fields.
            if before and not begun and 3 * len(before.keys() & config.keys()) <= len(before):
                raise InputError(f"{directory} has the config.json of something else; take a new folder")
            lines = difference(defaults(before), json.loads(text)) if begun else []
            if refused := [line for line in lines if not FREE.match(line)]:
                changed = "; ".join(map(str.strip, refused))
                set_back = f"take a new folder, or set it back: {changed}"
                raise InputError(f"{directory} was started with another config; {set_back}")
            if done > steps:
                raise InputError(f"steps is {steps}, but {directory} is at step {done}; choose {done} or more")
            if done != steps and (directory / "model").exists() and not steps_on_disk(directory / "checkpoints"):
                gone = f"{directory} has a model, but its training states are gone"
                raise InputError(f"{gone}; copy checkpoints/ back, or take a new folder")
            lease.append(Lease.take(directory))
            for line in changes(lines):
                remark(f"{directory} continues with a change: {line}")
            with replacing(file) as part:
                part.write_text(text)

        with _writable(directory):
            directory.mkdir(parents=True, exist_ok=True)
            on_first(take)
        return cls(directory, json.loads(text), keep, lease[0] if lease else None)

    @cached_property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.directory / "checkpoints", self.keep, apart=apart())

    @property
    def model(self) -> Path:
        """The weights folder that `on_finish` writes; it gets this name when it is complete."""
        return self.directory / "model"

    def finished(self, total: int) -> bool:
        """Returns whether all `total` steps are done and the model is written."""
        return on_first(lambda: self.model.exists() and _done(self.directory) == total)

    def restore_or(self, make_state: Callable[[], State], like: State, after: int = 0) -> State:
        """Restores the last whole state, in shapes and shardings of `like` (`abstract_state`), or makes a new one.

        after: states up to this step belong to an earlier phase of the run and have other shapes.
        """
        step = self.checkpoints.latest()
        if step is None or step <= after:
            return make_state()
        restored = self.checkpoints.restore(step, like)
        self.resumed = restored.data
        return restored.state

    def fit(
        self,
        state: State,
        step: Step,
        data: Data,
        total: int,
        *,
        examples_per_step: int,
        cadence: Cadence = Cadence(),  # frozen
        evaluate: Callable[[State], Mapping[str, float]] | None = None,
        on_finish: Callable[[State], None] | None = None,
        flops_per_example: float | None = None,
        writers: Sequence[Writer] = (),
    ) -> State:
        """Trains up to step `total` and returns the last state; with a state of step `total` it only calls `on_finish`.

        state: from `restore_or`, or new. Every `cadence.log` steps it writes a line with the means since the last line;
        every `cadence.eval` steps and at the end, the line has `evaluate(state)` as `eval/*`. Metrics are read one step
        late, so that the devices always have the next step queued. on_finish: writes `RUN/model`. Every process of a
        job calls both functions; only the first writes lines.

        On SIGTERM, Ctrl-C or a preemption notice it finishes the step, saves the state, and raises `Stopped`. The
        command then exits with 75, so that a scheduler runs it again; 0 means finished. Raises InputError after
        `max_skipped` non-finite steps in a row, when a score of the evaluation is not finite, when too many records are
        bad, and when the disk or the data fail. The last good state stays on disk: no state is saved during such steps.
        """
        first, start = jax.process_index() == 0, int(state.step)
        resumed, self.resumed = self.resumed, {}  # used once: a run of two phases calls fit twice
        if resumed:
            data.restore(resumed["data"])
        file = MetricsFile(self.directory / METRICS) if first else None
        if file:
            if start and not file.path.exists():
                remark(f"{file.path} is missing: the lines up to step {start} are lost, and a new file is begun")
            file.truncate(start)
        peak = peak_flops(jax.devices()[0].device_kind)
        work = Work(examples_per_step, flops_per_example, peak and peak * jax.device_count())
        clock, window = Clock(work), Window(resumed.get("window", {}))
        limit, counted = getattr(data, "bad_limit", 1.0), resumed.get("bad", self.counted)
        feed, bad = Feed(data), BadSamples(self.directory / BAD_SAMPLES if first else None, limit, counted)
        stops = False
        dog = Watchdog(cadence.stuck, self.directory / ("stacks.txt" if first else f"stacks_{jax.process_index()}.txt"))
        profile = Profile(cadence.profile, self.directory / "profile")
        console = Console(quiet=not first)

        with Stop() as stop, ProgressLine(total, work, console) as progress, self._saved(), dog, profile:
            written: dict[str, Any] = dict(file=file, progress=progress, writers=writers, skipped=int(state.skipped))
            recorder = Recorder(log_every=cadence.log, clock=clock, window=window, bad=bad, **written)
            for n in range(start + 1, total + 1):
                with clock.waiting():
                    batch = feed.take()
                if batch is None:
                    ended = f"the data ended after {n - 1} of {total} steps"
                    raise InputError(f"{ended}; a training needs batches without end")
                if self.lease:
                    self.lease.check()
                state, metrics = step(state, batch)
                recorder.push(n, metrics, feed.delivered)
                dog.step()
                profile.step()

                last, stops = n == total, stop.requested(n)
                evaluates = evaluate is not None and (n % cadence.eval == 0 or last)
                saves = n % cadence.save == 0 or last or stops
                if evaluates or saves:
                    recorder.read()
                if recorder.skipped >= step.cfg.max_skipped:
                    raise InputError(self._diverged(recorder.step, recorder.skipped))
                if not (evaluates or saves):
                    continue

                with clock.paused(), dog.paused():
                    scores = _finite(n, evaluate(state)) if evaluate is not None and evaluates else {}
                if evaluates or last or n % cadence.log == 0:
                    recorder.write(scores)
                if saves and (recorder.skipped == 0 or last):
                    with clock.saving(), dog.paused():
                        self.checkpoints.save(n, state, {"data": data.state(), **recorder.state()})
                if stops and not last:
                    self.checkpoints.wait()
                    raise Stopped(f"stopped at step {n:,} of {total:,}; the same command continues" if first else "")
        self.counted = bad.state()
        if on_finish is not None:
            on_finish(state)
        if stops:  # requested in the last step: the same command runs a phase or stage that may follow
            raise Stopped(f"stopped after the last step, {total:,}; the same command continues" if first else "")
        return state

    @contextlib.contextmanager
    def _saved(self) -> Iterator[None]:
        """Completes a pending save however the block ends."""
        try:
            yield
        finally:
            self.checkpoints.wait()

    def _diverged(self, step: int, skipped: int) -> str:
        self.checkpoints.wait()
        kept = "no state was saved before that"
        if saved := self.checkpoints.steps():
            kept = f"the last good state is {self.checkpoints.directory / str(saved[-1])}"
        since = f"{skipped} steps in a row, since step {step - skipped + 1}"
        advice = "Lower optim.lr or optim.clip in a new run, or check the data"
        return f"step {step}: loss or gradient were not finite for {since}; {kept}. {advice}"


def closing(directory: Path, shown: str) -> str:
    """Says where the weights of a finished training are, its last scores, and how to look at it; "" where the folder
    holds no run whose weights are one model. shown: the folder's name for the user.
    """
    last = [directory, *stages_of(directory)][-1]
    if not (last / "model").is_dir() or not (last / METRICS).is_file():
        return ""
    _, scores = last_scores(MetricsFile(last / METRICS).lines())
    held_out = f"; held out: {', '.join(f'{name} {value:.4g}' for name, value in scores.items())}" if scores else ""
    run = "/".join((shown, *last.relative_to(directory).parts))
    return f"weights: {run}/model{held_out}; curves and pictures: heirloom report {run}"


def _done(directory: Path) -> int:
    """Returns the step of the last state on disk; of a run with a model and without states, of its last metrics."""
    if steps := steps_on_disk(directory / "checkpoints"):
        return steps[-1]
    lines = MetricsFile(directory / METRICS).lines() if (directory / "model").exists() else []
    return int(lines[-1]["step"]) if lines else 0


@contextlib.contextmanager
def _writable(directory: Path) -> Iterator[None]:
    """Turns errors of the disk into InputError."""
    try:
        yield
    except OSError as error:
        failed = f"cannot write a run here ({error.strerror})"
        raise InputError(f"{directory}: {failed}; choose another folder") from error


def _finite(step: int, scores: Mapping[str, float]) -> Mapping[str, float]:
    """Returns the scores. Raises InputError when one is not finite: as parameters always are, the data is at fault."""
    if name := next((name for name, value in scores.items() if not math.isfinite(value)), None):
        why = "check the held-out data, or lower optim.lr in a new run"
        raise InputError(f"step {step}: eval/{name} is {scores[name]}, though all parameters are finite; {why}")
    return scores


class Stop:
    """Handles SIGTERM and Ctrl-C inside the block; a second one, after REPEATED seconds, stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self._since: dict[int, float] = {}
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may set signal handlers
        if jax.process_count() > 1:
            # JAX handles SIGTERM and lets all hosts agree on a step, so Ctrl-C on one host becomes SIGTERM
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        else:
            self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Returns whether to stop after `step`, the same in every process. Call it once a step."""
        return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else self.asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked, now = True, time.monotonic()
        if now - self._since.setdefault(number, now) > REPEATED:
            signal.signal(number, self._before[signal.Signals(number)])
            signal.raise_signal(number)
