"""A training whose run and data are in a bucket in memory that fails now and then: a process of `soak.py`.

    python benchmarks/soak_bucket.py DATA RUN SEED COMMAND

DATA is copied into the bucket. COMMAND is given until it has finished; then the run is copied to RUN. Requests fail one
in twenty, and all of them during outages of up to three seconds, as a bucket's do with 500 and 503.
"""

import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.memory import MemoryFileSystem

from heirloom.common.cli import main
from heirloom.common.paths import Address, copy_of_run, place

TRIES = 10  # of the command
REQUESTS = ("cat_file", "pipe_file", "put_file", "info", "find", "rm_file", "_open")


class Weather:
    """Says whether a request fails now."""

    def __init__(self, seed: int) -> None:
        self._rng, self._lock = np.random.default_rng(seed), threading.Lock()
        self._until, self._bad, self.failed = time.monotonic() + 5, False, 0
        self.over = False

    def fails(self) -> bool:
        with self._lock:
            if self.over:
                return False
            if time.monotonic() > self._until:
                self._bad = not self._bad
                self._until = time.monotonic() + self._rng.uniform(0.2, 3.0 if self._bad else 6.0)
            bad = self._bad or self._rng.random() < 0.05
            self.failed += bad
            return bad


def install(weather: Weather) -> None:
    """Lets requests to fsspec's memory fail."""

    def flaky(real: Callable[..., Any]) -> Callable[..., Any]:
        def request(*args: Any, **kwargs: Any) -> Any:
            if weather.fails():
                raise OSError(5, "500 Internal Server Error")
            return real(*args, **kwargs)

        return request

    for name in REQUESTS:
        setattr(MemoryFileSystem, name, flaky(getattr(MemoryFileSystem, name)))


def run(data: Path, destination: Path, seed: int, words: list[str]) -> int:
    bucket, address = "memory://pod/data", f"memory://pod/run-{seed}"
    for file in sorted((data / "shards").glob("*.tar")):
        place(f"{bucket}/shards/{file.name}").write_bytes(file.read_bytes())
    words = [address if word == "R" else word.replace("D/", f"{bucket}/") for word in words]
    weather = Weather(seed)
    install(weather)
    there = place(address)
    assert isinstance(there, Address)
    local = copy_of_run(there)
    codes: list[int] = []
    shutil.rmtree(local, ignore_errors=True)  # another soak of the same seed
    while len(codes) < TRIES and (not codes or codes[-1]):
        codes.append(main(words))
    print(f"{weather.failed} requests failed; exit codes {codes}")
    if codes[-1]:
        return codes[-1]
    weather.over = True  # what has arrived in the bucket counts, not the local copy
    shutil.rmtree(local)
    for name in there.files():
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        (destination / name).write_bytes(there.child(name).read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
