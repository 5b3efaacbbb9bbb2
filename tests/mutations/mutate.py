"""Files that are nearly right: seeded mutations of JSON and of bytes, and what reading them may do.

    python tests/mutations/mutate.py 100000      # all targets in turn; prints what is neither right nor refused in one
    line

A mutated file may be read, or refused with an InputError of one line, within ten seconds of computing and without a
gigabyte of memory.
"""

import argparse
import contextlib
import copy
import json
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from heirloom.common.errors import InputError

SECONDS, BYTES = 10, 2**30
WALL = 6 * SECONDS  # of a busy machine, or of something that waits without computing
ROOT = str(Path(__file__).parents[2])
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**9, 2**40, 10**30, 0.0, 0.5, -1.5, 1e-30, 1e300,
    float("nan"), float("inf"),
    "", "0", "12", "gelu", "x" * 300, "../x", "\u2028", "None",
    [], {}, [0], [1, 2], [[]], [None], {"a": 1}, {"0": "a"}, [224, 224], [224, 160], [0.5, 0.5, 0.5], ["a"],
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A file inside a folder of good files, how it is damaged, and what reads it."""

    name: str
    files: Callable[[Path], Path]
    """Writes the good files into an empty folder; returns the one to damage."""
    read: Callable[[Path], Any]
    """Reads the folder."""
    mutate: Callable[[bytes, np.random.Generator], bytes]
    weight: int = 4
    """Its share of a full run, relative to the others: models are slower to open than data."""


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def mutate_json(content: bytes, rng: np.random.Generator) -> bytes:
    """One to three values replaced, removed, renamed or added; now and then the text itself is damaged."""
    if rng.random() < 0.1:
        return mutate_bytes(content, rng)
    value = copy.deepcopy(json.loads(content))
    for _ in range(rng.integers(1, 4)):
        places = list(_places(value))
        if not places:
            break
        path = places[rng.integers(len(places))]
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        key, odd = path[-1], copy.deepcopy(ODD[rng.integers(len(ODD))])
        kind = rng.random()
        if kind < 0.65 or isinstance(holder, list):
            holder[key] = odd
        elif kind < 0.8:
            del holder[key]
        elif kind < 0.9:
            holder[f"{key}_"] = holder.pop(key)
        else:
            holder[f"new_{key}"] = odd
    return json.dumps(value).encode()


def mutate_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes overwritten (half of the time near the front), cut out, repeated, or the end cut off."""
    out = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        if not out:
            return b""
        end = len(out) if rng.random() < 0.5 else min(len(out), 600)
        at, kind = int(rng.integers(end)), rng.random()
        if kind < 0.6:
            out[at] = int(rng.integers(256))
        elif kind < 0.7:
            del out[at : at + int(rng.integers(1, 64))]
        elif kind < 0.8:
            out[at:at] = out[at : at + int(rng.integers(1, 64))]
        elif kind < 0.9:
            out[at : at + 4] = int(rng.integers(2**32)).to_bytes(4, "little")
        else:
            del out[at:]
    return bytes(out)


class TookTooLong(BaseException):
    """Not an Exception: nothing on the way may catch it."""


def _alarm(*_: Any) -> None:
    raise TookTooLong


def attempt(target: Target, seed: int, folder: Path) -> str:
    """`read`, `refused`, or what went wrong, of one mutation. folder: empty."""
    rng = np.random.default_rng([seed, *target.name.encode()])
    file = target.files(folder)
    file.write_bytes(target.mutate(file.read_bytes(), rng))
    before = {number: signal.signal(number, _alarm) for number in (signal.SIGPROF, signal.SIGALRM)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        said = _read(target, folder)
    except TookTooLong:  # it may come while an error is handled
        said = f"no end after {SECONDS} s"
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
    if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 > BYTES:
        said = f"{said}, with more than a gigabyte"
    return said


def _read(target: Target, folder: Path) -> str:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL)
    try:
        target.read(folder)
    except InputError as error:
        return "refused" if "\n" not in str(error).strip() else f"several lines: {str(error)[:200]!r}"
    except TookTooLong:
        raise
    except BaseException as error:
        frames = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if f.filename.startswith(ROOT) and "site-packages" not in f.filename
        ]
        return f"{type(error).__name__} in {Path(frames[-1].filename).name}:{frames[-1].lineno}: {str(error)[:100]!r}"
    return "read"


def run(target: Target, seeds: Iterable[int]) -> dict[str, list[int]]:
    """The outcomes of these seeds; every one that is neither `read` nor `refused` is a fault."""
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401  # the first import can take seconds, which no file is to blame for
    found: dict[str, list[int]] = {}
    for seed in seeds:
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stderr(None),
            contextlib.redirect_stdout(None),
        ):
            found.setdefault(attempt(target, seed, Path(folder)), []).append(seed)
    return found


def main() -> None:
    from targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, help="mutations in all")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--only", default="", help="targets whose name contains this")
    args = parser.parse_args()
    targets, faults = [target for target in TARGETS if args.only in target.name], 0
    whole = sum(target.weight for target in targets)
    for target in targets:
        start = time.monotonic()
        found = run(target, range(args.first, args.first - (-args.count * target.weight // whole)))
        counts = Counter({said: len(seeds) for said, seeds in found.items()})
        bad = {said: seeds for said, seeds in found.items() if said not in ("read", "refused")}
        faults += sum(map(len, bad.values()))
        wrong, seconds = sum(map(len, bad.values())), time.monotonic() - start
        print(
            f"{target.name}: {counts['read']} read, {counts['refused']} refused, {wrong} wrong, {seconds:.0f} s",
            flush=True,
        )
        for said, seeds in sorted(bad.items(), key=lambda item: -len(item[1])):
            print(f"  {len(seeds)} x {said} (seed {seeds[0]})", flush=True)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
