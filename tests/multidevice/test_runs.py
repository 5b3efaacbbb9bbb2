"""Whole runs in processes of their own: killed, spread over two processes, moved to another number of devices."""

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from heirloom.common.checkpoint.state import Checkpoints
from heirloom.common.mesh import MeshConfig, start
from heirloom.common.train.optim import OptimConfig, make_optimizer
from heirloom.common.train.state import abstract_state
from tests.multidevice.jobs import environments

ROOT = Path(__file__).parents[2]
LIMIT = 120  # seconds until a process that hangs is a failure


def launch(run, *options, **env):
    command = [sys.executable, str(Path(__file__).with_name("toy_run.py")), str(run), *map(str, options)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    clean |= {"PYTHONPATH": str(ROOT)} | env  # `environments` for one of several
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == code, err[-3000:]
    return out


def curve(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "timing"} for line in lines]


@pytest.mark.slow
def test_killed_at_any_step_it_resumes_to_the_same_bits(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    reference = launch(whole)
    # while the state of step 32 is being written, and between two saves, each time with a log window half full
    for stall in (32, 47):
        process = launch(parts, "--stall", stall)
        assert "stalled\n" in process.stdout  # reads up to that line
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=LIMIT)
        assert process.returncode == -signal.SIGKILL
    finish(launch(parts))
    finish(reference)
    assert [line["step"] for line in curve(whole)] == list(range(5, 61, 5))
    assert curve(parts) == curve(whole)
    assert curve(whole)[-1]["loss"] < 0.9 * curve(whole)[0]["loss"]
    expected, found = np.load(whole / "model" / "state.npz"), np.load(parts / "model" / "state.npz")
    assert len(expected.files) == 6 and found.files == expected.files
    for name in expected.files:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def spec():
    from importlib.util import module_from_spec, spec_from_file_location

    found = spec_from_file_location("toy_run", Path(__file__).with_name("toy_run.py"))
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module.SPEC


def restored(run, step):
    """A state of the toy run, over the eight devices of this process."""
    leaves, mesh = spec(), start(MeshConfig(2, 2, 2))
    optimizer = make_optimizer(OptimConfig(lr=1e-3, warmup=5, schedule="constant"), leaves, 1000)
    return Checkpoints(run / "checkpoints").restore(step, abstract_state(optimizer, leaves, mesh, 0.9))


def test_a_state_moves_from_eight_devices_to_two_and_back(tmp_path):
    finish(launch(tmp_path / "eight", "--total", 9))
    finish(launch(tmp_path / "eight", "--devices", 2, "--mesh", 1, 2, 1, "--copy", tmp_path / "two"))
    written = [restored(tmp_path / name, 9) for name in ("eight", "two")]
    assert written[0].data == written[1].data and written[0].data["data"] == {"next": 9}
    jax.tree.map(np.testing.assert_array_equal, written[0].state, written[1].state)
    kernel = written[1].state.params["up/kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (64, 256) and float(abs(kernel).max()) > 0.1


@pytest.mark.slow
def test_two_processes_are_stopped_and_resumed_as_one(tmp_path):
    run, alone = tmp_path / "run", tmp_path / "alone"
    mesh = ("--devices", 2, "--mesh", 2, 2, 1, "--total", 10**6)
    # only the second process hears SIGTERM: both must stop at the same step, and save it together
    terms = ((), ("--term", 3))
    processes = [launch(run, *mesh, *term, **env) for term, env in zip(terms, environments(2), strict=True)]
    out = [finish(process, 75) for process in processes]
    said = re.search(r"^stopped at step ([\d,]+) of 1,000,000", out[0], re.MULTILINE)
    assert said and "stopped at" not in out[1], out
    step = int(said[1].replace(",", ""))
    assert Checkpoints(run / "checkpoints").latest() == step

    total = step + 10
    for folder in (run, alone):
        finish(launch(folder, "--devices", 4, "--mesh", 2, 2, 1, "--total", total))
    expected, found = np.load(alone / "model" / "state.npz"), np.load(run / "model" / "state.npz")
    for name in expected.files:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-4, err_msg=name)
    lines = curve(run)
    assert [line["step"] for line in lines] == [line["step"] for line in curve(alone)]
    np.testing.assert_allclose([line["loss"] for line in lines], [line["loss"] for line in curve(alone)], rtol=1e-3)


@pytest.mark.slow
def test_processes_with_folders_of_their_own_continue_a_run_from_that_of_the_first(tmp_path):
    own, alone = tmp_path / "own", tmp_path / "alone"
    mesh = ("--mesh", 2, 2, 1, "--total")
    reference = launch(alone, "--devices", 4, *mesh, 16)
    finish(launch(own / "0", "--devices", 4, *mesh, 8))
    for process in [launch(own, "--apart", "--devices", 2, *mesh, 16, **env) for env in environments(2)]:
        finish(process)
    finish(reference)
    assert not (own / "1" / "metrics.jsonl").exists() and not list((own / "1" / "checkpoints").iterdir())
    assert [line["step"] for line in curve(own / "0")] == [5, 8, 10, 15, 16]
    found, expected = (restored(folder, 16) for folder in (own / "0", alone))
    assert found.data["data"] == expected.data["data"] == {"next": 16}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), found.state, expected.state)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rates, folders, said",
    [
        ((1e-3, 3e-3), ("a", "a"), "config.optim.lr: 0.001 in process 0, 0.003 in process 1; start all alike"),
        ((1e-3, 1e-3), ("a", "b"), "process 1 on .* does not see what process 0 on .* give a --run that is one place"),
        ((1e-3, 1e-3), ("a", "a"), ""),
    ],
)
def test_processes_that_differ_end_before_the_first_step(tmp_path, rates, folders, said):
    mesh = ("--devices", 1, "--mesh", 2, 1, 1)
    processes = [
        launch(tmp_path / folder, *mesh, "--lr", lr, **env)
        for lr, folder, env in zip(rates, folders, environments(2), strict=True)
    ]
    for process in processes:
        _, err = process.communicate(timeout=LIMIT)
        assert process.returncode == (1 if said else 0), err[-3000:]
        assert re.search(said, err), err[-3000:]
    assert not list(tmp_path.rglob(".*")) or said.startswith("process 1")


def test_the_parts_of_a_run_start_no_device():
    """Else the processes of a job could not find each other: jax joins them before devices exist, or never."""
    code = """if True:
    import jax
    from heirloom.common import config
    for method in ("tinyclip", "lit", "learngene"):
        assert config.load(method + "/smoke").parts().model.spec
    jax.config.update("jax_num_cpu_devices", 3)  # RuntimeError once devices are there
    print(jax.device_count())
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    clean |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr[-3000:]
