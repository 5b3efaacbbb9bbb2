"""Indexes tar shards on all cores, in processes of their own.

The processes are started by a command line, not by multiprocessing, which would run the user's script again in each.
"""

import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from heirloom.common.data.tar_index import index_shard
from heirloom.common.errors import InputError
from heirloom.common.paths import AnyPath, place
from heirloom.common.reading import PICTURES, Stamp

CAPTIONS = ("txt", "json")
HERE = 2**26  # bytes of shards that are indexed in threads of this process: starting others would take longer
_SERVE = "from heirloom.common.data.indexing import serve; serve()"


class Facts(NamedTuple):
    """What is needed of a shard before its samples are read. pictures, captions: whether every sample has one."""

    size: int
    changed: int
    samples: int
    pictures: bool
    captions: bool

    @property
    def stamp(self) -> Stamp:
        return Stamp(self.size, self.changed)


def facts(shard: AnyPath) -> Facts:
    """Indexes a shard unless it has a whole index. Raises the errors of `index_shard`."""
    stamp, index = Stamp.of(shard), index_shard(shard)
    if Stamp.of(shard) != stamp:
        raise InputError(f"{shard} changed while it was indexed; run the command again")
    table = index.table()
    complete = (bool(have(table, kinds).all()) for kinds in (PICTURES, CAPTIONS))
    return Facts(stamp.size, stamp.changed, len(table), *complete)


def have(table: np.ndarray, kinds: Sequence[str]) -> np.ndarray:
    """Returns which samples have a member with one of these extensions: bool [samples]."""
    found = np.zeros(len(table), bool)
    for extension in set(kinds) & set(table.dtype.names or ()):
        found |= table[extension]["size"] >= 0
    return found


def index_all(
    shards: Sequence[AnyPath], sizes: Sequence[int], done: Callable[[], object] = lambda: None
) -> list[Facts]:
    """Returns the facts of shards, indexed on all cores. sizes: in bytes. done: called after each shard.

    Raises the InputError of the first shard that cannot be indexed; the indexes of others stay.
    """
    count = min(len(shards), os.cpu_count() or 1)
    # What is in the memory of this process is not in that of another.
    here = sum(sizes) < HERE or any(str(shard).startswith("memory://") for shard in shards)
    local, workers = threading.local(), list[_Worker]()

    def one(shard: AnyPath) -> Facts:
        if here:
            found = facts(shard)
        else:
            if not hasattr(local, "worker"):
                workers.append(_Worker())
                local.worker = workers[-1]
            found = local.worker.facts(shard)
        done()
        return found

    pool = ThreadPoolExecutor(max(count, 1))
    try:
        return list(pool.map(one, shards))
    finally:
        pool.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


class _Worker:
    """A process that indexes shards: it reads a path a line and answers a line each."""

    def __init__(self) -> None:
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu"}
        command, pipe = [sys.executable, "-c", _SERVE], subprocess.PIPE
        # A session of its own: Ctrl-C reaches this process, which ends the others.
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, text=True, start_new_session=True)

    def facts(self, shard: AnyPath) -> Facts:
        """Raises InputError, also when the process has died."""
        assert self._process.stdin and self._process.stdout
        answer = ""
        with suppress(BrokenPipeError):  # it has ended: no answer
            self._process.stdin.write(json.dumps(str(shard)) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            raise InputError(f"{shard}: the process that indexed it ended with code {code}; run the command again")
        found = json.loads(answer)
        if "error" in found:
            raise InputError(found["error"])
        return Facts(**found)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin and self._process.stdout
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):  # what it did not read
            self._process.stdin.close()
        self._process.stdout.close()


def serve() -> None:
    """Runs in a worker until its input ends, as it does when the process that started it has ended."""
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        try:
            found = facts(place(json.loads(line)))._asdict()
        except InputError as error:
            found = {"error": str(error)}
        print(json.dumps(found), flush=True)
