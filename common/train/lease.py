"""One job writes a run: `RUN/lease.json` names the process that does.

The holder counts up the `beat` of the file every few seconds. Another job that finds the file looks up the process
where it can, which is for the same kernel and the same process namespace; then it is known at once whether it runs. Of
any other process it watches whether the beat changes. The times in the file are for people only, since the clocks of
two hosts may differ. The token, random in each process, says whose the file is: two containers may well have equal host
names and process ids.
"""

import json
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from heirloom.common.errors import InputError, remark
from heirloom.common.files import alive
from heirloom.common.paths import AnyPath

FILE = "lease.json"
BEAT = 10.0  # seconds between two beats
STALE = 60.0  # seconds without a beat after which the file belongs to nobody
SETTLE = 0.1  # seconds after which two jobs that take a stale lease in the same moment see who was last
SIZE = 1024  # bytes of the file, always the same, so that it is rewritten in place
_TOKEN = secrets.token_hex(8)


@dataclass(frozen=True)
class Holder:
    """Who writes a run. place: kernel and process namespace. born: when the process started, in ticks of that kernel.

    since, seen: when it took the run and when it last beat, on its own clock. Place and born are empty where the system
    does not tell (not Linux).
    """

    host: str
    pid: int
    since: str
    token: str
    place: str = ""
    born: str = ""
    beat: int = 0
    seen: str = ""

    @classmethod
    def here(cls) -> "Holder":
        """Returns this process as a holder."""
        pid, now = os.getpid(), _now()
        token = f"{_TOKEN}-{pid}"  # a forked process is another one
        return cls(socket.gethostname(), pid, now, token, place=_place(), born=_born(pid), seen=now)

    @classmethod
    def read(cls, file: AnyPath) -> "Holder | None":
        """Returns the holder, or None when the file is just being written or damaged. Raises FileNotFoundError."""
        try:
            found: dict[str, Any] = json.loads(file.read_bytes())
            return cls(**found) if isinstance(found["pid"], int) else None
        except (ValueError, TypeError, KeyError):
            return None

    def gone(self) -> bool:
        """Returns whether the process certainly ended; False where that is not known."""
        if self.place != _place() or (not self.place and self.host != socket.gethostname()):
            return False
        born = _born(self.pid)
        return born != self.born if born else not alive(self.pid)  # a new process with this id started later

    def runs(self) -> bool:
        """Returns whether the process certainly runs; False where that is not known."""
        return bool(self.place) and self.place == _place() and not self.gone()

    def beats(self) -> "Holder":
        """Returns the holder with the next beat."""
        return replace(self, beat=self.beat + 1, seen=_now())

    def bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode().ljust(SIZE)

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}"


@dataclass(eq=False)
class Lease:
    """The right of this process to write one run, while the object lives. `take` makes it."""

    file: Path
    holder: Holder
    lost: list[str] = field(default_factory=list)
    """Why the lease is no longer ours, in words; empty while it is."""

    @classmethod
    def take(
        cls,
        directory: Path,
        *,
        stale: float = STALE,
        beat: float = BEAT,
        sleep: Callable[[float], None] = time.sleep,
    ) -> "Lease":
        """Takes the lease of a run, from a job that ended without releasing it if need be; one lease per process.

        Looks up to `stale` seconds whether an unknown holder still lives. Raises InputError when it does.
        """
        file = directory.resolve() / FILE
        if (held := _held.get(file)) and not held.lost:
            return held
        mine = Holder.here()
        while not _create(file, mine):
            try:
                await_silence(directory, file, stale, sleep)
                _overwrite(file, mine)
                sleep(SETTLE)
                found = Holder.read(file)
            except FileNotFoundError:  # released in this moment
                continue
            if found is None or found.token != mine.token:
                who = found or "another job"
                raise InputError(f"{directory} was just taken by {who}; stop it, or choose another --run")
            break
        lease = cls(file, mine)
        _held[file] = lease
        stop = threading.Event()
        arguments = (file, mine, stop, lease.lost, beat)
        threading.Thread(target=_keep, args=arguments, name="lease", daemon=True).start()
        weakref.finalize(lease, _release, file, mine, stop)  # also at the end of the process
        return lease

    def check(self) -> None:
        """Raises InputError when another job has taken the run, for example while this process was suspended."""
        if self.lost:
            raise InputError(f"{self.file.parent}: {self.lost[0]}; this job stops, so that only one writes the run")


# Leases that live in this process: a second `Run` of the same folder shares the lease of the first.
_held: "weakref.WeakValueDictionary[Path, Lease]" = weakref.WeakValueDictionary()


def await_silence(directory: AnyPath, file: AnyPath, stale: float, sleep: Callable[[float], None]) -> None:
    """Returns once the holder has ended or was silent for `stale` seconds. Raises InputError if it lives."""
    first, waited, step = file.read_bytes(), 0.0, min(1.0, stale / 10)
    while True:
        holder = Holder.read(file)
        if holder and (holder.token == Holder.here().token or holder.gone()):
            return
        if holder and (holder.runs() or file.read_bytes() != first):
            since = f"is being written by {holder} since {holder.since}"
            raise InputError(f"{directory} {since}; stop it, or choose another --run")
        if waited >= stale:
            break
        if not waited:
            who = holder or "an unknown process"
            remark(f"{directory} was last written by {who}; waiting {stale:g} s to see whether it still does")
        sleep(step)
        waited += step
    remark(f"{directory}: its writer was silent for {stale:g} s and is taken to have ended")


def _keep(file: Path, mine: Holder, stop: threading.Event, lost: list[str], beat: float) -> None:
    """Beats until `stop`, or until the file names another holder."""
    while not stop.wait(beat):
        try:
            found = Holder.read(file)
            if found and found.token == mine.token:
                mine = mine.beats()
                _overwrite(file, mine)
            elif found:
                lost.append(f"{found} took over the run at {found.since}")
                return
        except FileNotFoundError:
            lost.append(f"{file.name} was removed")
            return
        except OSError:  # a shared disk that is away for a moment: the next beat tries again
            continue


def _create(file: Path, holder: Holder) -> bool:
    """Creates the file; returns False if it exists."""
    try:
        with file.open("xb") as new:
            new.write(holder.bytes())
    except FileExistsError:
        return False
    return True


def _overwrite(file: Path, holder: Holder) -> None:
    """Writes in place: on NFS an opened file shows changes at once, a replaced one when the cache of names expires."""
    with file.open("r+b") as old:
        old.write(holder.bytes())
        old.truncate(SIZE)


def _release(file: Path, mine: Holder, stop: threading.Event) -> None:
    stop.set()
    if os.getpid() != mine.pid:  # a forked process ends
        return
    try:
        found = Holder.read(file)
        if found and found.token == mine.token:
            file.unlink()
    except OSError:  # the run was moved or removed, or its disk is away: then the lease becomes stale
        return


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z")


def _place() -> str:
    """Returns what tells apart processes with equal ids: the boot of the kernel and the namespace; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> str:
    """Returns when a process started, in ticks since the boot; empty when it cannot be seen (or without Linux)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if fields[0] in "ZX" else fields[19]  # a zombie has ended; field 22 of proc(5)
