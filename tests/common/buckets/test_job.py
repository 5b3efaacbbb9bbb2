"""A job of several hosts whose run is in a bucket: no host sees the disk of another."""

import subprocess
import sys
from pathlib import Path

import pytest

from heirloom.common.cli import main
from heirloom.common.supervise import states
from tests.multidevice.jobs import environments

RECIPE = Path(__file__).with_name("staged_recipe.py")
LIMIT = 240  # seconds until a process that hangs is a failure


def job(run, disks, cache):
    """Starts a process on each of `disks`, as on a host of its own."""
    command = [sys.executable, "-m", "heirloom.common.cli", "train", str(RECIPE), "--run", str(run), "--mesh.fsdp", "2"]
    more = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    more |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(command, env=env | more | {"XDG_CACHE_HOME": str(disk)}, **pipes)
        for env, disk in zip(environments(len(disks)), disks, strict=True)
    ]


def ended(processes, code):
    found = [process.communicate(timeout=LIMIT) for process in processes]
    assert [process.returncode for process in processes] == [code] * len(found), [err[-3000:] for _, err in found]
    return found[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["gs", "s3"], indirect=True)
def test_other_hosts_continue_a_job_to_the_same_bits(bucket, tmp_path):
    run, shared = bucket.child("run"), tmp_path / "shared"
    first = job(run, [tmp_path / "a", tmp_path / "b"], tmp_path / "compiled")
    for line in first[0].stdout:
        if line.startswith("step 5/40"):
            break
    first[1].terminate()  # one host hears of a preemption
    assert f"the run is in {run}" in ended(first, 75)
    saved = states(run)
    assert saved[0] == "stage_1/checkpoints/4" and saved[-1].startswith("stage_2/")
    assert not list((tmp_path / "b").rglob("checkpoints/*"))

    said = ended(job(run, [tmp_path / "c", tmp_path / "d"], tmp_path / "compiled"), 0)
    assert f"weights: {run}/stage_2/model" in said
    ended(job(shared, [tmp_path / "e", tmp_path / "f"], tmp_path / "compiled"), 0)
    for stage in ("stage_1", "stage_2"):
        name = f"{stage}/model/model.safetensors"
        assert run.child(name).read_bytes() == (shared / name).read_bytes()
    assert "lease.json" not in run.files()
    assert main(["inspect", str(run.child("stage_2/model"))]) == 0
