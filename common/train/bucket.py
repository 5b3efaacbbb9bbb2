"""A run in a bucket: `heirloom train RECIPE --run gs://bucket/run`.

The run is written to a local folder, and that folder is copied to the bucket all the time: lines and pictures within
seconds, a training state when it is complete. The manifest of a state (`seal.py`) is copied last, so a state without it
is not there. Another machine that continues the run first downloads the newest state.

In a job of several processes, process 0 does all this, and reads and writes the states for all (`Checkpoints`, apart).
The others read what they need of the run, such as the model of the stage before, as anybody reads from a bucket.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from heirloom.common.checkpoint.seal import MANIFEST, METADATA
from heirloom.common.errors import InputError, Stopped, remark
from heirloom.common.fetch import copy_of, download, fetch_folder
from heirloom.common.files import read_json
from heirloom.common.mesh import start
from heirloom.common.paths import Address, copy_of_run
from heirloom.common.processes import together
from heirloom.common.train.agreement import agree
from heirloom.common.train.lease import FILE, STALE, Holder, await_silence
from heirloom.common.train.liveness import outlive_others, watch_each_other

PERIOD = 10.0  # seconds between two copies of what changed, which also say that this job lives
WAITS = (1.0, 5.0, 20.0, 60.0)  # seconds before the next tries of a request that failed
SETTLE = 2.0  # seconds after which two jobs that take a run in the same moment see who was last
SMALL = 8 * 2**20  # bytes: a file up to this size is read at once, as it may grow while it is copied
# What belongs to this machine: the lease, caches, compiled programs, files that are not complete, damaged states.
_OWN = re.compile(
    r"(^|/)(lease\.json|\.[^/]*|[^/]*\.part)$|(^|/)(cache|compiled)/|orbax-checkpoint-tmp|\.damaged/|(^|/)\."
)
_STATE = re.compile(r"(?P<folder>(?:.*/)?checkpoints/(?P<step>\d+))/")
Files = dict[str, tuple[int, int]]


@contextmanager
def in_bucket(address: Address, period: float = PERIOD) -> Iterator[Path]:
    """Yields the local folder of a run in a bucket, and copies what is written there to the bucket.

    Every process of a job calls it; only process 0 copies. When the bucket fails for longer than a minute and a half,
    the training is stopped as by SIGTERM. Raises InputError when the bucket cannot be read or written, with the last
    state that is there, and when another job writes the run.
    """
    start()
    watch_each_other()
    agree({"run": str(address)})
    if jax.process_count() > 1 and address.scheme == "memory":
        raise InputError(f"{address}: each process has a memory of its own; give a bucket, or a folder that all see")
    copy = _Copy(address) if jax.process_index() == 0 else None
    together(copy.take if copy else _nothing)
    try:
        together(copy.pull if copy else _nothing)
        _open.append((address, copy))
        share()
        if copy:
            copy.begin(period)
        end, all_end = copy.end if copy else _nothing, False
        try:
            yield copy.folder if copy else copy_of(address)
            all_end = True
        except Stopped:
            all_end = True
            raise
        finally:
            if all_end:  # the runtime wants the processes to end at one time: they wait for the last copies
                together(end)
            else:
                outlive_others()
                end()
    finally:
        _open.clear()
        if copy:
            copy.release()


def apart() -> bool:
    """Returns whether the processes of this job have the run in folders of their own."""
    return bool(_open) and jax.process_count() > 1


def share() -> None:
    """Brings what process 0 has written, but no states, to the other processes, through the bucket. All call it.

    Without effect where they see one folder.
    """
    if apart():
        address, copy = _open[0]
        together(copy.push if copy else _nothing)
        together(_nothing if copy else lambda: _download(address))


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config, as JSON, with the address for the local folder of the run: the same for every machine."""
    text = json.dumps(config)
    for address, copy in _open:
        folder = copy.folder if copy else copy_of(address)
        text = text.replace(json.dumps(str(folder))[1:-1], str(address))
    return json.loads(text)


_open: "list[tuple[Address, _Copy | None]]" = []
"""The run of this process that is in a bucket, if any; process 0 copies it there."""


def _nothing() -> None: ...


def _download(address: Address) -> None:
    """Downloads the new files of a run, but no states, as they are read from any bucket."""
    try:
        there = address.files()
    except FileNotFoundError:  # the run begins
        return
    except OSError as error:
        raise InputError(f"{address} cannot be read ({error.strerror or error})") from error
    fetch_folder(address, there, lambda name: not _OWN.search(name) and not _STATE.match(name))


class _Copy:
    """The run in the process that writes it."""

    def __init__(self, address: Address) -> None:
        self.address, self.folder = address, copy_of_run(address)
        self._over, self._pushing = threading.Event(), threading.Lock()
        self._pushed: dict[str, tuple[int, int]] = {}
        self._states: set[str] = set()  # those that are complete in the bucket
        self._seen: set[str] = set()  # those that were in the local folder
        self._lease, self._mine = address.child(FILE), Holder.here()

    def take(self) -> None:
        """Takes the run for this job. Raises InputError when another one writes it."""
        with suppress(FileNotFoundError):
            self._tried(lambda: await_silence(self.address, self._lease, STALE, time.sleep))
        self._tried(lambda: self._lease.write_bytes(self._mine.bytes()))
        time.sleep(SETTLE)
        if (holder := self._tried(self._holder)) and holder.token != self._mine.token:
            raise InputError(f"{self.address} was just taken by {holder}; stop it, or choose another --run")

    def release(self) -> None:
        with suppress(OSError, InputError):  # else the next job waits until the lease is stale
            if (holder := self._holder()) and holder.token == self._mine.token:
                self._lease.unlink()

    def pull(self) -> None:
        """Downloads the newest state and all else, unless the local folder is as far as the bucket.

        Raises InputError when the local folder has states of a run that is not the one in the bucket.
        """
        try:
            there: Files = self._tried(self.address.files)
        except FileNotFoundError:
            there = {}
        there = {name: version for name, version in there.items() if not _OWN.search(name)}
        self._states = {found["folder"] for n in there if n.endswith(f"/{MANIFEST}") and (found := _STATE.match(n))}
        here = _states(self._files())
        if here and not there:
            raise self._another("there is no run", max(here, key=_order))
        if not there or (here and _newest(here) >= _newest(self._states)):
            same = {state for state in self._states & here if self._is_copied(state)}
            if self._states and not same:  # a job that was killed early has a config there, and no state
                there_at = max(self._states, key=_order)
                raise self._another(f"the run there is another one, at {there_at}", max(here, key=_order))
            self._pushed |= {n: _stat(self.folder / n) for n in self._files() for s in same if n.startswith(f"{s}/")}
            return
        newest = {_newest([s for s in self._states if _parent(s) == parent]) for parent in map(_parent, self._states)}
        wanted = [name for name in there if not (found := _STATE.match(name)) or _order(found["folder"]) in newest]
        total = sum(there[name][0] for name in wanted)
        remark(f"{self.address}: downloading {len(wanted)} files, {total / 1e6:,.0f} MB, into {self.folder}")
        for name in sorted(wanted, key=_rank):
            file = self.folder / name
            part = file.with_name(f"{file.name}.part")
            part.parent.mkdir(parents=True, exist_ok=True)
            part.unlink(missing_ok=True)
            download(self.address.child(name), there[name][0], part)
            part.replace(file)
            self._pushed[name] = _stat(file)

    def _is_copied(self, state: str) -> bool:
        """Returns whether a state in the bucket is the same in the local folder."""
        file = self.folder / state / MANIFEST
        there = self._tried(self.address.child(f"{state}/{MANIFEST}").read_bytes)
        return file.is_file() and file.read_bytes() == there

    def _another(self, there: str, newest: str) -> InputError:
        delete = f"delete {self.folder} if that run is no longer needed, or choose another --run"
        return InputError(f"{self.address}: {there}, and its copy on this machine is at {newest}: {delete}")

    def begin(self, period: float) -> None:
        """Copies what changes, in a thread, until `end`."""
        self._thread = threading.Thread(target=self._keep, args=(period,), name="bucket", daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()
        self.push()
        print(f"the run is in {self.address}")

    def push(self) -> None:
        """Uploads what changed, manifests and configs last, and removes states that are gone here."""
        with self._pushing:
            self._push()

    def _push(self) -> None:
        names = self._files()
        for name in sorted(names, key=_rank):
            file = self.folder / name
            try:
                stat = _stat(file)
                if self._pushed.get(name) == stat or not self._complete(name):
                    continue
                target = self.address.child(name)
                if stat[0] <= SMALL:
                    data = file.read_bytes()
                    self._tried(lambda: target.write_bytes(data))  # noqa: B023
                else:
                    self._tried(lambda: target.upload(file))  # noqa: B023
            except FileNotFoundError:  # it was replaced or removed in this moment
                continue
            self._pushed[name] = stat
            if name.endswith(f"/{MANIFEST}") and (found := _STATE.match(name)):
                self._states.add(found["folder"])
        here = _states(names)
        self._seen |= here
        for state in sorted((self._states & self._seen) - here):  # others are kept by an earlier job's rules
            folder = self.address.child(state)
            for name in sorted(self._tried(folder.files), key=_rank, reverse=True):
                self._tried(folder.child(name).unlink)
            self._states.discard(state)

    def _keep(self, period: float) -> None:
        """Copies and beats until `end`; when that fails, asks the training to stop."""
        while not self._over.wait(period):
            try:
                if (holder := self._tried(self._holder)) and holder.token != self._mine.token:
                    raise InputError(f"{self.address}: {holder} took over the run; this job stops")
                self._mine = self._mine.beats()
                self._tried(lambda: self._lease.write_bytes(self._mine.bytes()))
                self.push()
            except (OSError, InputError) as error:
                print(f"heirloom: {error}; the training is stopped", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _complete(self, name: str) -> bool:
        """Returns whether the state to which a file belongs is complete; its metadata are written last."""
        if not (found := _STATE.match(name)):
            return True
        manifest = self.folder / found["folder"] / MANIFEST
        return manifest.is_file() and METADATA in read_json(manifest)

    def _files(self) -> list[str]:
        files = (file for file in self.folder.rglob("*") if file.is_file()) if self.folder.is_dir() else ()
        names = (file.relative_to(self.folder).as_posix() for file in files)
        return [name for name in names if not _OWN.search(name)]

    def _holder(self) -> Holder | None:
        try:
            return Holder.read(self._lease)
        except FileNotFoundError:
            return None

    def _tried(self, request: Callable[[], Any]) -> Any:
        """Returns `request()`, tried again after each of WAITS. Raises InputError when the last try fails."""
        for wait in (*WAITS, None):
            try:
                return request()
            except FileNotFoundError:
                raise
            except OSError as error:
                if wait is None:
                    last = max(self._states, key=_order, default="")
                    kept = f"the last state there is {last}" if last else "no state is there"
                    raise InputError(f"{self.address} fails ({error.strerror or error}); {kept}") from error
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")


def _states(names: list[str]) -> set[str]:
    return {found["folder"] for name in names if (found := _STATE.match(name))}


def _parent(state: str) -> str:
    return state.rpartition("/")[0]


def _order(state: str) -> tuple[str, int]:
    return _parent(state), int(state.rpartition("/")[2])


def _newest(states: Any) -> tuple[str, int]:
    return max(map(_order, states), default=("", -1))


def _rank(name: str) -> tuple[bool, str]:
    """Orders names for copying: the files by which readers recognise a folder come last."""
    return name.rpartition("/")[2] in (MANIFEST, "config.json"), name


def _stat(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns
