"""Two processes index shards: each reads half of them, and has the indexes of all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.common.data.conftest import write_tar  # noqa: F401
from tests.multidevice.jobs import environments

LIMIT = 120  # seconds until a process that hangs is a failure


def both(tmp_path, places):
    command = [sys.executable, str(Path(__file__).with_name("sharing.py")), str(tmp_path / "data"), places]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    found = [
        subprocess.Popen(command, env=env | {"XDG_CACHE_HOME": str(tmp_path / env["JAX_PROCESS_ID"])}, **pipes)
        for env in environments(2)
    ]
    try:
        return [(process.communicate(timeout=LIMIT), process.returncode) for process in found]
    finally:
        for process in found:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("places", ["shared", "own"])
def test_each_shard_is_read_once_in_a_job(tmp_path, write_tar, places):  # noqa: F811
    (tmp_path / "data").mkdir()
    for n in range(5):
        write_tar(tmp_path / "data" / f"{n}.tar", 10 * n, 2)
    found = []
    for (out, err), code in both(tmp_path, places):
        assert code == 0, err[-3000:]
        found.append(json.loads(out.splitlines()[-1]))
    assert sorted(found[0]["read"]) == ["0.tar", "2.tar", "4.tar"] and sorted(found[1]["read"]) == ["1.tar", "3.tar"]
    assert found[0]["later"] == found[1]["later"] == []
    assert found[0]["records"] == found[1]["records"] == [f"caption {10 * n + i}" for n in range(5) for i in range(2)]


@pytest.mark.slow
def test_a_shard_that_cannot_be_indexed_ends_both(tmp_path, write_tar):  # noqa: F811
    (tmp_path / "data").mkdir()
    for n in range(2):
        write_tar(tmp_path / "data" / f"{n}.tar", 10 * n, 2)
    os.truncate(tmp_path / "data" / "1.tar", 1500)
    errors = []
    for (_, err), code in both(tmp_path, "shared"):
        assert code != 0
        errors.append(err)
    assert "1.tar is" in errors[1] and "InputError" in errors[1]
    assert "process 1 on" in errors[0] and "1.tar is" in errors[0], errors[0]
