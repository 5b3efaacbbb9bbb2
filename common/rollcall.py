"""Roll call: finds missing processes before JAX joins the processes of a job.

`jax.distributed.initialize` waits for every process and, when one is missing, ends all others without naming it. So
processes that the user starts (with three environment variables each) first report to process 0, on the port that JAX
uses next. SLURM, MPI and TPU runtimes start all processes or none, and need no roll call.
"""

import contextlib
import json
import socket
import time
from dataclasses import dataclass
from typing import Any

from heirloom.common.errors import InputError

RETRY = 0.1  # seconds between two attempts to reach process 0
GREETING = "heirloom process"  # what a report starts with, so that no other program is taken for a process
LINE = 10_000  # characters that a message may have
REPLY = 5.0  # seconds that an answer may take once connected


@dataclass(frozen=True)
class Job:
    """One process of a job. address: "host:port" of process 0. processes: their number. process: from 0."""

    address: str
    processes: int
    process: int

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


def roll_call(job: Job, limit: float = 300.0) -> None:
    """Waits until all processes of `job` have reported to process 0.

    limit: seconds to wait. Raises InputError in every process that reported, naming those that did not.
    """
    problem = _call(job, limit) if job.process == 0 else _answer(job, limit)
    if problem:
        raise InputError(problem)


def _call(job: Job, limit: float) -> str:
    """Runs in process 0: collects the reports, sends every process the error, "" for none, and returns it."""
    deadline = time.monotonic() + limit
    present: set[int] = set()
    peers: list[socket.socket] = []
    problem = ""
    try:
        server = socket.create_server(("", job.port))
    except OSError as error:
        return f"process 0 cannot listen on port {job.port} ({error.strerror}): is another job using it?"
    with server:
        while len(present) < job.processes - 1 and not problem:
            server.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                peer, _ = server.accept()
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, job.processes) if i not in present)
                absent = f"after {limit:g} s process {missing} of {job.processes} has not reported to {job.address}"
                problem = f"{absent}: start it, or check its log, then start all of them again"
                break
            peers.append(peer)
            peer.settimeout(REPLY)
            process = _reported(peer)
            if process is None:
                continue  # another program, or a process that died while it reported
            if process in present or not 0 < process < job.processes:
                twice = f"a second process calls itself {process} of {job.processes}"
                problem = f"{twice}: give each its own JAX_PROCESS_ID"
            present.add(process)
        for peer in peers:
            with peer, contextlib.suppress(OSError):  # a process that has ended needs no answer
                _send(peer, problem)
    return problem


def _answer(job: Job, limit: float) -> str:
    """Runs in any other process: reports, and returns the error that process 0 sends."""
    deadline = time.monotonic() + limit
    while True:
        try:
            with socket.create_connection((job.host, job.port), timeout=max(deadline - time.monotonic(), 1e-3)) as peer:
                _send(peer, {GREETING: job.process})
                peer.settimeout(limit + REPLY)  # process 0 may have started later, and answers after its limit
                return _receive(peer)
        except OSError:
            if time.monotonic() >= deadline:
                found = f"process {job.process} found no process 0 at {job.address} within {limit:g} s"
                return f"{found}: start it, or correct the address"
            time.sleep(RETRY)


def _reported(peer: socket.socket) -> int | None:
    """Returns the number that a process reports; None for anything else that is sent to the port."""
    try:
        message = _receive(peer)
    except (OSError, ValueError, RecursionError):
        return None
    process = message.get(GREETING) if isinstance(message, dict) else None
    return process if type(process) is int else None


def _send(peer: socket.socket, message: str | dict[str, int]) -> None:
    peer.sendall(json.dumps(message).encode() + b"\n")


def _receive(peer: socket.socket) -> Any:
    with peer.makefile("r") as file:
        line = file.readline(LINE)
    if not line:
        raise ConnectionError("the other process closed the connection during the roll call")
    return json.loads(line)
