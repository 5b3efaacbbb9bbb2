"""`heirloom supervise -- heirloom train ...`: runs a command again until it is finished."""

import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from heirloom.common.errors import Exit, InputError
from heirloom.common.paths import Address, AnyPath, copy_of_run, place

LONGEST = 300.0  # seconds between two tries
_STATE = re.compile(r"((?:.*/)?checkpoints/\d+)/sha256\.json")  # in a bucket it is written last


@dataclass(frozen=True)
class Ended:
    """How a supervision ended. code: the exit code of the last try. why: one line."""

    code: int
    why: str


def supervise(command: Sequence[str], tries: int, pause: float, sleep: Callable[[float], Any] = time.sleep) -> Ended:
    """Runs a command until it exits with 0, or with 2, which no second try mends.

    After 75, a graceful stop, it starts again at once. After a crash it waits `pause` seconds, doubled each time up to
    five minutes, and gives up after `tries` crashes between which no training state was saved (in the folder that the
    command's `--run` names). SIGTERM and SIGINT go to the command, which is then not started again. The command may get
    them twice, from the terminal as well: a training takes that for one (`Stop`).
    """
    run, crashes, seen = run_folder(command), 0, set[str]()
    while True:
        code, asked = _once(command)
        if code == Exit.DONE:
            return Ended(code, "finished")
        if asked:
            return Ended(code, f"stopped on request, exit code {code}; the same command continues")
        if code == Exit.BAD_INPUT:
            return Ended(code, "the command has bad input, see above: correct it and start again")
        if code == Exit.STOPPED:
            print(f"heirloom supervise: stopped gracefully ({Exit.STOPPED:d}), starting again", flush=True)
            crashes = 0
            continue
        saved = states(run)
        crashes = crashes + 1 if seen.issuperset(saved) else 1
        seen.update(saved)
        at = f"after the state {saved[-1]}" if saved else "before the first state"
        if crashes >= tries:
            return Ended(code, f"{crashes} crashes {at}, the last with exit code {code}: see its output above")
        wait = min(LONGEST, pause * 2 ** (crashes - 1))
        print(f"heirloom supervise: exit code {code} {at}; try {crashes + 1} of {tries} in {wait:g} s", flush=True)
        sleep(wait)


def run_folder(command: Sequence[str]) -> AnyPath | None:
    """Returns what follows `--run` in a command."""
    for i, word in enumerate(command):
        if word == "--run" and i + 1 < len(command):
            return place(command[i + 1])
        if word.startswith("--run="):
            return place(word.removeprefix("--run="))
    return None


def states(run: AnyPath | None) -> list[str]:
    """Lists the training states below a run folder, such as `stage_1/checkpoints/3000`, the newest last.

    By the time they were written: parts of a run have names of any order (`teacher` is trained before `gene-sws`).
    Those of a run in a bucket are looked up there, in the order of their steps: not every host of a job has them.
    """
    if run is None:
        return []
    if isinstance(run, Address):
        try:
            matches = map(_STATE.fullmatch, run.files())
        except FileNotFoundError:
            return []
        except OSError:  # of a bucket that is away, the local copy is what is known
            return states(copy_of_run(run))
        return sorted((one[1] for one in matches if one), key=lambda state: int(state.rpartition("/")[2]))
    found = [path for path in run.rglob("checkpoints/*") if path.name.isdecimal()]
    return [str(path.relative_to(run)) for path in sorted(found, key=_written)]


def _written(state: Path) -> tuple[int, int]:
    try:
        return state.stat().st_mtime_ns, int(state.name)
    except OSError:  # removed by another process of the job
        return 0, int(state.name)


def _once(command: Sequence[str]) -> tuple[int, bool]:
    """Runs the command once. Returns its exit code, 128 + N if signal N ended it, and whether we were asked to stop."""
    asked = False
    try:
        child = subprocess.Popen(command)
    except OSError as error:
        raise InputError(f"{command[0]} cannot be run ({error.strerror}): give a command after --") from error

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return (128 - code if code < 0 else code), asked
