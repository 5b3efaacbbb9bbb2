"""Breaks trainings of all methods at random, continues them, and compares their weights with those of undisturbed runs.

    python benchmarks/soak.py --faults 100 --json benchmarks/results/soak.json
    python benchmarks/soak.py --faults 10 --seed 921 --jobs 2       # what CI runs

Each run trains a tiny model for a few steps and meets one to three faults of FAULTS (`soak_faults.py`), drawn from
(seed, number of the run) alone. After each fault the same command is given again, until the run has finished. Then its
weights must be those of the run of the same method that nothing disturbed, bit for bit; no output may have a traceback;
no command may take longer than LIMIT. The table counts what does not hold; the exit code is 1 if there is anything.

Commands are forked from a process that has imported heirloom (`soak_zygote.py`), and programs compiled by the
undisturbed run are given to the others. With --json, a run that is done is written at once, and the same command
continues after it. Disks are filled on a tmpfs, which only root can mount; without that, that fault is left out, and
the table says so.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import bench
from benchmarks.soak_faults import FAULTS, Fault, inject
from benchmarks.soak_jobs import METHODS, Job, Method, Zygote, make_data, may_mount, mounted

BAD = ("differs", "tracebacks", "hangs", "unexpected")
SIZE = 2**26  # bytes of the disk of a run that is filled


@dataclass
class Outcome:
    """What became of one run. faults: kind, and step after which it came. exits: of each command, by process."""

    run: int
    method: str
    faults: list[dict[str, Any]] = field(default_factory=list)
    exits: list[list[int]] = field(default_factory=list)
    differs: bool = False
    tracebacks: list[str] = field(default_factory=list)
    hangs: int = 0
    unexpected: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return any(getattr(self, key) for key in BAD)


@dataclass(frozen=True)
class Plan:
    """What a run meets: a function of the seed and the number of the run."""

    number: int
    method: Method
    faults: list[Fault]

    @classmethod
    def draw(cls, seed: int, number: int, kinds: list[str]) -> "Plan":
        rng = np.random.default_rng((seed, number))
        methods = [method for method in METHODS if any(map(method.takes, kinds))]
        method = methods[int(rng.integers(len(methods)))]
        pool = [kind for kind in kinds if method.takes(kind)]
        faults = [Fault.draw_one(pool, method, rng) for _ in range(int(rng.integers(1, 4)))]
        alone = [fault for fault in faults if fault.kind == "bucket fails"]  # that run is in a bucket from the start
        return cls(number, method, alone[:1] or faults)


def plans(seed: int, kinds: list[str], faults: int) -> list[Plan]:
    """Returns the first runs of a seed that together have this many faults, or a little more."""
    out: list[Plan] = []
    while sum(len(plan.faults) for plan in out) < faults:
        out.append(Plan.draw(seed, len(out), kinds))
    return out


class Soak:
    """Runs in a folder, where undisturbed runs are kept by method."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        self.zygote = Zygote()
        self._locks = {method.name: threading.Lock() for method in METHODS}
        if not self.data.exists():
            make_data(self.data)

    def undisturbed(self, method: Method) -> Path:
        """Returns a run to the end, made once."""
        run = self.folder / "undisturbed" / method.name
        with self._locks[method.name]:
            if not (run / "model").exists():
                job = Job(method, run, self.data, self.zygote)
                codes = job.wait()
                if codes != [0] * method.processes:
                    raise SystemExit(f"the undisturbed run of {method.name} ended with {codes}:\n{job.output()}")
        return run

    def run(self, plan: Plan) -> Outcome:
        """Runs a plan to the end of its training."""
        expected, began = self.undisturbed(plan.method), time.monotonic()
        out = Outcome(plan.number, plan.method.name)
        place = Path(tempfile.mkdtemp(prefix=f"soak-{plan.number}-", dir=self.folder))
        try:
            fills = any(fault.kind == "disk full" for fault in plan.faults)
            with mounted(place / "disk", SIZE if fills else 0) as disk:
                self._disturb(Job(plan.method, disk / "run", place / "data", self.zygote), plan.faults, out, expected)
        finally:
            shutil.rmtree(place)
        out.seconds = round(time.monotonic() - began, 1)
        return out

    def _disturb(self, job: Job, faults: list[Fault], out: Outcome, expected: Path) -> None:
        shutil.copytree(self.data, job.data, copy_function=shutil.copy2)
        shutil.copytree(expected / "compiled", job.run / "compiled")
        for fault in faults:
            injected = inject(fault, job)
            out.faults.append(asdict(fault) | {"injected": injected.done})
            out.exits += injected.exits
            out.unexpected += injected.unexpected
        if not job.finished():
            out.exits.append(job.wait())
        out.hangs, out.tracebacks = job.hangs, job.tracebacks()
        if not job.finished():
            out.unexpected.append(f"not finished: {out.exits[-1]}: {job.last_line()}")
        else:
            out.differs = not same(expected / "model", job.run / "model")


def same(one: Path, other: Path) -> bool:
    """Returns whether two weights folders have the same tensors, bit for bit."""
    from safetensors.numpy import load_file

    names = sorted(file.relative_to(one) for file in one.rglob("*.safetensors"))
    if not names or names != sorted(file.relative_to(other) for file in other.rglob("*.safetensors")):
        return False
    return all(_bits(load_file(one / name)) == _bits(load_file(other / name)) for name in names)


def _bits(tensors: dict[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (str(x.dtype), x.shape, x.tobytes()) for name, x in tensors.items()}


def table(outcomes: list[dict[str, Any]], left_out: list[str]) -> list[str]:
    """Returns the table. A run counts in the row of each kind of fault that it met."""
    lines = [f"{'fault':<22}{'injected':>9}{'runs':>6}{'differ':>8}{'tracebacks':>12}{'hangs':>7}{'unexpected':>12}"]

    def row(name: str, count: int, runs: list[dict[str, Any]]) -> str:
        bad = {key: sum(o[key] if isinstance(o[key], int) else len(o[key]) for o in runs) for key in BAD}
        cells = f"{bad['differs']:>8}{bad['tracebacks']:>12}{bad['hangs']:>7}{bad['unexpected']:>12}"
        return f"{name:<22}{count:>9}{len(runs):>6}{cells}"

    counts = Counter(f["kind"] for o in outcomes for f in o["faults"] if f["injected"])
    for kind in FAULTS:
        runs = [o for o in outcomes if any(f["kind"] == kind and f["injected"] for f in o["faults"])]
        lines.append(row(kind, counts[kind], runs) if kind not in left_out else f"{kind:<22}left out: needs root")
    return [*lines, row("all", counts.total(), outcomes)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="what is done, which the same command continues")
    parser.add_argument("--kinds", nargs="+", default=list(FAULTS), choices=list(FAULTS), metavar="KIND")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after that")
    parser.add_argument("--folder", type=Path, help="where runs are made (default: a temporary folder)")
    args = parser.parse_args()
    left_out = [] if may_mount() else ["disk full"]
    kinds = [kind for kind in args.kinds if kind not in left_out]
    done, lock = list[dict[str, Any]](), threading.Lock()
    if args.json and args.json.exists():
        found = json.loads(args.json.read_text())
        if found["seed"] == args.seed and found["kinds"] == args.kinds:
            done = found["outcomes"]
    began, temporary = time.monotonic(), None if args.folder else tempfile.mkdtemp(prefix="soak-")
    folder = args.folder or Path(str(temporary))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        soak, known = Soak(folder), {outcome["run"] for outcome in done}

        def one(plan: Plan) -> None:
            if plan.number in known or time.monotonic() - began > 60 * args.minutes:
                return
            outcome = soak.run(plan)
            said = ", ".join(f"{f['kind']}{'' if f['injected'] else ' (came too late)'}" for f in outcome.faults)
            bad = f": FAILED {outcome}" if outcome.failed else ""
            print(f"run {outcome.run} {outcome.method}: {said}; {outcome.seconds:.0f} s{bad}", flush=True)
            with lock:
                done.append(asdict(outcome))
                write(args, done)

        pool = ThreadPoolExecutor(args.jobs)
        try:
            for future in as_completed([pool.submit(one, plan) for plan in plans(args.seed, kinds, args.faults)]):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            soak.zygote.close()
    finally:
        if temporary:
            shutil.rmtree(temporary)
    print("\n".join(table(done, left_out)))
    return int(any(o[key] for o in done for key in BAD))


def write(args: argparse.Namespace, done: list[dict[str, Any]]) -> None:
    """Writes what is done to --json, whole or not at all."""
    if not args.json:
        return
    machine = f"{platform.machine()}, {os.cpu_count()} cores, shared"
    about = bench.header(machine=machine) | {"seed": args.seed, "kinds": args.kinds}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    part = args.json.with_name(f"{args.json.name}.part")
    part.write_text(json.dumps(about | {"outcomes": done}, indent=1) + "\n")
    part.replace(args.json)


if __name__ == "__main__":
    sys.exit(main())
