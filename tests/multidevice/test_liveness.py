import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from socket import create_server, socketpair
from threading import Event, Timer

import pytest

from heirloom.common.train import liveness

ROOT = Path(__file__).parents[2]
LIMIT = 120  # seconds until a process that hangs is a failure


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, last, others, said",
    [
        ("killed", -9, 70, r"heirloom: process 2 on \S+ has ended without a word: see its own output"),
        ("fails", 1, 1, r"heirloom: process 2 on \S+ failed: ZeroDivisionError: of one process"),
        ("refuses", 2, 2, r"heirloom: process 2 on \S+ failed: the disk is full"),
        ("finishes", 0, 0, None),
    ],
)
def test_processes_end_together_and_say_which_ended_first(how, last, others, said):
    with create_server(("localhost", 0)) as server:
        job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{server.getsockname()[1]}", "JAX_NUM_PROCESSES": "3"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    command = [sys.executable, str(Path(__file__).with_name("lively.py")), how]
    processes = [
        subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=clean | job | {"PYTHONPATH": str(ROOT), "JAX_PROCESS_ID": i}
        )
        for i in "012"
    ]
    processes[2].wait(LIMIT)
    ended = time.monotonic()
    errors = [process.communicate(timeout=LIMIT)[1] for process in processes]
    assert time.monotonic() - ended < 30
    assert [process.returncode for process in processes] == [others, others, last], errors
    for error in errors[:2]:
        lines = [line for line in error.splitlines() if line.startswith("heirloom:")]
        assert len(lines) == (1 if said else 0) and "Traceback" not in error, error
        assert said is None or re.fullmatch(said, lines[0])


@pytest.mark.parametrize("outlives", [True, False])
def test_a_process_with_last_files_to_copy_is_not_ended_by_bad_input_of_others(outlives, monkeypatch):
    ours, theirs = socketpair()
    ended, ending = [], Event()
    monkeypatch.setattr(liveness, "_ending", ending)
    monkeypatch.setattr(liveness, "OWN", 30 if outlives else 0.01)
    monkeypatch.setattr(liveness.os, "_exit", lambda code: (ended.append(code), ending.set()))
    if outlives:
        Timer(0.1, liveness.outlive_others).start()
    theirs.sendall(json.dumps({"process": 1, "host": "h", "code": 2, "why": "the loss diverged"}).encode() + b"\n")
    with ours, theirs:
        liveness._listen(liveness._Peer(ours, 1, "h"))
    assert ended == ([] if outlives else [2])
