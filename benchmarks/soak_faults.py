"""The faults of `soak.py`: each waits for its step, breaks something, and says how the command must end."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.soak_jobs import LIMIT, STEPS, Job, Method, command, environment

KILLED, GRACEFUL, BAD_INPUT, GONE = -signal.SIGKILL, 75, 2, 70
POLL = 0.002  # seconds between two looks at the run


@dataclass(frozen=True)
class Fault:
    """A fault to come. step: lines of metrics before it. delay: seconds after that. draw: for its details."""

    kind: str
    step: int
    delay: float
    draw: int

    @classmethod
    def draw_one(cls, kinds: list[str], method: Method, rng: np.random.Generator) -> "Fault":
        own = [kind for kind in kinds if kind in method.own]
        pool = own if own and rng.random() < 0.4 else kinds
        kind = pool[int(rng.integers(len(pool)))]
        return cls(kind, int(rng.integers(0, STEPS)), round(float(rng.exponential(0.05)), 3), int(rng.integers(2**31)))


@dataclass
class Injected:
    """done: whether the fault came before the run had finished. exits: codes of the commands that it ended."""

    done: bool = False
    exits: list[list[int]] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def ended(self, job: Job, allowed: Iterable[int]) -> None:
        """Waits for the end of the command, whose codes must be among those allowed."""
        codes = job.wait()
        self.exits.append(codes)
        if not set(codes) <= set(allowed):
            self.unexpected.append(f"exit codes {codes}, not {sorted(allowed)}: {job.last_line()}")


def inject(fault: Fault, job: Job) -> Injected:
    """Lets a fault come over a job, which it starts; afterwards no process of it runs."""
    out = Injected()
    if not job.finished():
        FAULTS[fault.kind](fault, job, out)
    return out


def _until(job: Job, condition: Callable[[], bool], delay: float = 0.0) -> bool:
    """Waits for a condition, then a delay; returns whether the job still runs."""
    job.start()
    deadline = time.monotonic() + LIMIT
    while not condition() and job.running() and time.monotonic() < deadline:
        time.sleep(POLL)
    time.sleep(delay)
    return job.running()


def _at_step(fault: Fault, job: Job) -> bool:
    target = max(fault.step, job.step() + 1)  # after a resume, later than it begins
    return _until(job, lambda: job.step() >= target, fault.delay)


def kill(fault: Fault, job: Job, out: Injected) -> None:
    """SIGKILL to all processes."""
    out.done = _at_step(fault, job) if fault.step else _until(job, lambda: True, fault.delay * 40)  # while it starts
    _kill_all(job, out)


def kill_one(fault: Fault, job: Job, out: Injected) -> None:
    """SIGKILL to one of several processes; the others must end by themselves."""
    out.done = _at_step(fault, job)
    if out.done:
        job.processes[fault.draw % len(job.processes)].signal(signal.SIGKILL)
    out.ended(job, (KILLED, GONE, 0))


def kill_in_a_save(fault: Fault, job: Job, out: Injected) -> None:
    """SIGKILL while a state is written."""
    checkpoints = job.run / "checkpoints"
    out.done = _until(job, lambda: any(checkpoints.glob("*orbax-checkpoint-tmp*")), fault.delay / 5)
    _kill_all(job, out)


def kill_at_the_end(fault: Fault, job: Job, out: Injected) -> None:
    """SIGKILL while the trained weights are written."""
    out.done = _until(job, lambda: any(job.run.glob(".model.*")), fault.delay / 20)
    _kill_all(job, out)


def sigterm(fault: Fault, job: Job, out: Injected) -> None:
    """SIGTERM to all processes, as a preemption does."""
    out.done = _at_step(fault, job)
    for process in job.processes:
        process.signal(signal.SIGTERM)
    out.ended(job, (GRACEFUL, 0))


def disk_full(fault: Fault, job: Job, out: Injected) -> None:
    """The disk of the run is full from a step on; then there is space again."""
    out.done = _at_step(fault, job)
    ballast = job.run.parent / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while file.write(bytes(2**16)) == 2**16:
                pass
        except OSError:
            file.flush()
    out.ended(job, (BAD_INPUT, 0))
    ballast.unlink()


def damaged_state(fault: Fault, job: Job, out: Injected) -> None:
    """A file of the newest state is flipped, cut or removed after the processes were killed, where an older one is."""
    enough = _until(job, lambda: len(job.states()) > 1, fault.delay)
    _kill_all(job, out)
    if not enough or len(states := job.states()) < 2:
        return
    out.done = True
    files = sorted(file for file in states[-1].rglob("*") if file.is_file())
    file = files[fault.draw % len(files)]
    data = bytearray(file.read_bytes())
    how = fault.draw // len(files) % 3
    if how == 0 and data:
        data[fault.draw % len(data)] ^= 1 << fault.draw % 8
        file.write_bytes(data)
    elif how == 1 and data:
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()


def shard_gone(fault: Fault, job: Job, out: Injected) -> None:
    """A shard is gone while the run goes on, and when it starts again; then it is back."""
    out.done = _at_step(fault, job)
    file = job.data / "shards" / f"{fault.draw % 3}.tar"
    away = file.rename(file.with_suffix(".away"))
    try:
        out.ended(job, (BAD_INPUT, 0))
        if not job.finished():
            out.ended(job, (BAD_INPUT,))
    finally:
        away.rename(file)


def picture_broken(fault: Fault, job: Job, out: Injected) -> None:
    """Pictures are overwritten while the run goes on; then they are whole again."""
    out.done = _at_step(fault, job)
    files = sorted((job.data / "classes").rglob("*.png"))
    for file in files[:: 1 + fault.draw % 3]:
        file.rename(file.with_suffix(".kept"))
        file.with_suffix(".png").write_bytes(b"\x89PNG no more")
    try:
        out.ended(job, (BAD_INPUT, 0))
    finally:
        for file in (job.data / "classes").rglob("*.kept"):
            file.rename(file.with_suffix(".png"))


def bucket_fails(fault: Fault, job: Job, out: Injected) -> None:
    """The whole run, in a bucket in memory whose requests fail now and then (`soak_bucket.py`)."""
    if job.step():
        return  # it has begun elsewhere
    script = Path(__file__).with_name("soak_bucket.py")
    argv = [sys.executable, str(script), str(job.data), str(job.run), str(fault.draw), *command(job.method, "R", "D")]
    try:
        done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        job.hangs += 1
        return
    job.note(done.stdout + done.stderr)
    out.exits.append([done.returncode])
    out.done = True
    if done.returncode:
        out.unexpected.append(f"bucket: exit code {done.returncode}: {job.last_line()}")


def _kill_all(job: Job, out: Injected) -> None:
    for process in job.processes:
        process.signal(signal.SIGKILL)
    out.ended(job, (KILLED, 0) if job.method.processes == 1 else (KILLED, GONE, 0))


FAULTS: dict[str, Callable[[Fault, Job, Injected], None]] = {
    "kill": kill,
    "kill one": kill_one,
    "kill in a save": kill_in_a_save,
    "kill at the end": kill_at_the_end,
    "SIGTERM": sigterm,
    "disk full": disk_full,
    "damaged state": damaged_state,
    "shard gone": shard_gone,
    "picture broken": picture_broken,
    "bucket fails": bucket_fails,
}
