"""Two processes of a job tell each other what was decided, what failed, and arrays that one of them has."""

import json
import subprocess
import sys
from pathlib import Path
from socket import gethostname

import pytest

from heirloom.common.processes import on_first, together
from tests.multidevice.jobs import environments


def test_alone_work_is_just_done():
    assert on_first(lambda: 3) == together(lambda: 3) == 3


@pytest.mark.slow
def test_two_processes_tell_each_other():
    command = [sys.executable, str(Path(__file__).with_name("telling.py"))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    jobs = [subprocess.Popen(command, env=env, **pipes) for env in environments(2)]
    found = []
    for job in jobs:
        out, err = job.communicate(timeout=120)
        assert job.returncode == 0, err[-3000:]
        found.append(json.loads(out.splitlines()[-1]))
    first, second = found
    assert first["first"] == [{"own": 0}, "no room"]
    assert second["first"] == [{"own": 0}, "process 0 failed in what the others wait for; its own message says why"]
    assert first["slow"] == second["slow"] == [None, True]
    assert first["together"] == [0, f"process 1 on {gethostname()} failed: no room", "of 0"]
    assert second["together"] == [1, "no room", "of 1"]
    assert (first["whole"], second["whole"]) == (["a", "b", "c"], [])
