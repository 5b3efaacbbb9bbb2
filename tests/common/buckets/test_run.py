"""A run in a bucket: what is copied when, and that another machine continues it."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from heirloom.common.cli import main
from heirloom.common.errors import InputError
from heirloom.common.paths import Address, copy_of_run
from heirloom.common.supervise import run_folder, states
from heirloom.common.train import bucket as runs
from heirloom.common.train.bucket import in_bucket
from heirloom.common.train.lease import Holder, _born

FLAGS = ("--pipeline.batch", "8", "--pipeline.workers", "0", "--log-every", "1", "--save-every", "1")


@pytest.fixture(autouse=True)
def at_once(monkeypatch, one_device):
    monkeypatch.setattr(runs, "WAITS", (0, 0))
    monkeypatch.setattr(runs, "SETTLE", 0)


def train(run, steps):
    more = ("--steps", str(steps), "--optim.warmup", "1", "--optim.schedule", "constant")
    return main(["train", "learngene/smoke", *FLAGS, *more, "--run", str(run)])


def write_state(folder, step, complete=True):
    state = folder / "checkpoints" / str(step)
    state.mkdir(parents=True)
    (state / "a").write_text(f"arrays of {step}")
    (state / "sha256.json").write_text('{"a": "0", "_CHECKPOINT_METADATA": "0"}' if complete else '{"a": "0"}')


@pytest.mark.slow
def test_another_machine_continues_a_run(bucket, tmp_path, capsys):
    run = bucket.child("run")
    assert train(run, 2) == 0
    assert f"the run is in {run}" in capsys.readouterr().out
    names = set(run.files())
    assert {"config.json", "metrics.jsonl", "model/model.safetensors", "model/config.json"} <= names
    assert {f"checkpoints/{step}/sha256.json" for step in (1, 2)} <= names
    assert not {name for name in names if name.startswith(("compiled/", "lease")) or ".orbax" in name}
    shutil.rmtree(copy_of_run(run))  # the other machine has nothing
    assert train(run, 3) == 0
    assert "downloading" in capsys.readouterr().out
    assert train(tmp_path / "alone", 2) == train(tmp_path / "alone", 3) == 0
    expected = load_file(tmp_path / "alone" / "model" / "model.safetensors")
    found = load_file(copy_of_run(run) / "model" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert main(["inspect", str(run.child("model"))]) == 0


def test_a_state_is_copied_when_it_is_complete_and_its_manifest_last(memory, monkeypatch):
    written, write = [], Address.write_bytes

    def noted(self, data):
        written.append(str(self.relative_to(memory)))
        write(self, data)

    monkeypatch.setattr(Address, "write_bytes", noted)
    with in_bucket(memory) as folder:
        write_state(folder, 1)
        write_state(folder, 2, complete=False)
        (folder / "metrics.jsonl").write_text("{}\n")
        (folder / "compiled").mkdir()
        (folder / "compiled" / "program").write_text("of this machine")
    names = [name for name in written if name != "lease.json"]
    assert names == ["checkpoints/1/a", "metrics.jsonl", "checkpoints/1/sha256.json"]
    assert set(memory.files()) == set(names)


def test_a_state_that_is_gone_here_goes_there_but_one_of_another_machine_stays(memory):
    with in_bucket(memory) as folder:
        write_state(folder, 1)
        write_state(folder, 2)
    shutil.rmtree(copy_of_run(memory))
    with in_bucket(memory) as folder:
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["2"]
        write_state(folder, 3)
    with in_bucket(memory) as folder:
        shutil.rmtree(folder / "checkpoints" / "2")  # before anything is copied: it was never seen
        write_state(folder, 4)
    states = {name.split("/")[1] for name in memory.files() if name.startswith("checkpoints")}
    assert states == {"1", "2", "3", "4"}
    with in_bucket(memory, period=0.01) as folder:
        write_state(folder, 5)
        while "checkpoints/5/sha256.json" not in memory.files():
            pass
        shutil.rmtree(folder / "checkpoints" / "3")
    states = {name.split("/")[1] for name in memory.files() if name.startswith("checkpoints")}
    assert states == {"1", "2", "4", "5"}


def test_a_local_folder_that_is_further_wins(memory):
    with in_bucket(memory) as folder:
        write_state(folder, 1)
        (folder / "metrics.jsonl").write_text("first")
    write_state(folder, 2)  # a job that was killed before it copied this
    (folder / "metrics.jsonl").write_text("further")
    with in_bucket(memory):
        assert (folder / "metrics.jsonl").read_text() == "further"
    assert memory.child("metrics.jsonl").read_text() == "further"
    assert "checkpoints/2/sha256.json" in memory.files()


def test_a_bucket_that_fails_names_the_last_state_there(memory, monkeypatch):
    def fails(self, data):
        raise OSError(5, "503 Service Unavailable")

    with in_bucket(memory) as folder:
        write_state(folder, 1)
    message = r"fails \(503 Service Unavailable\); the last state there is checkpoints/1$"
    with pytest.raises(InputError, match=message), in_bucket(memory) as folder:
        write_state(folder, 2)
        monkeypatch.setattr(Address, "write_bytes", fails)
    assert (copy_of_run(memory) / "checkpoints" / "2" / "a").read_text() == "arrays of 2"


def test_one_job_writes_a_run(memory, monkeypatch):
    def refused():
        with in_bucket(memory):
            raise AssertionError("never")

    other = replace(Holder.here(), pid=os.getppid(), token="another", born=_born(os.getppid()))
    memory.child("lease.json").write_bytes(other.bytes())
    with pytest.raises(InputError, match=r"is being written by host .* stop it, or choose another --run"):
        refused()
    memory.child("lease.json").write_bytes(replace(other, pid=2**22 + 1).bytes())  # no such process
    with in_bucket(memory):
        assert Holder.read(memory.child("lease.json")).token == Holder.here().token
    assert "lease.json" not in memory.files()


def test_a_job_of_several_processes_has_no_run_in_memory(memory, monkeypatch):
    for name in ("watch_each_other", "agree"):
        monkeypatch.setattr(runs, name, lambda *_: monkeypatch.setattr(runs.jax, "process_count", lambda: 4))
    refused = pytest.raises(InputError, match="each process has a memory of its own; give a bucket")
    with refused, in_bucket(memory):
        raise AssertionError("never")


def test_the_config_of_a_run_names_the_bucket_not_this_machine(memory):
    with in_bucket(memory) as folder:
        config = {"donor": f"{folder}/stage_1/model", "steps": 3}
        assert runs.portable(config) == {"donor": f"{memory}/stage_1/model", "steps": 3}
    assert runs.portable(config) == config


def test_supervise_finds_the_states_in_the_bucket(memory, monkeypatch):
    assert states(memory) == []
    for name in ("stage_1/checkpoints/100", "stage_2/checkpoints/20", "checkpoints/3"):
        memory.child(f"{name}/sha256.json").write_bytes(b"{}")
    memory.child("stage_2/checkpoints/30/state/a").write_bytes(b"not complete")
    assert states(memory) == ["checkpoints/3", "stage_2/checkpoints/20", "stage_1/checkpoints/100"]
    assert run_folder(["train", "--run", str(memory)]) == memory
    write_state(copy_of_run(memory), 7)
    monkeypatch.setattr(Address, "files", lambda self: (_ for _ in ()).throw(OSError(5, "503")))
    assert states(memory) == ["checkpoints/7"]


def test_a_copy_of_a_run_that_was_removed_or_begun_anew_is_not_uploaded(memory):
    def refused(message):
        with pytest.raises(InputError, match=message), in_bucket(memory):
            raise AssertionError("never")

    with in_bucket(memory) as folder:
        write_state(folder, 5)
    for name in memory.files():
        memory.child(name).unlink()
    refused(f"there is no run, and its copy on this machine is at checkpoints/5: delete {folder} if that run")
    for state in ("2", "5"):  # begun anew elsewhere
        memory.child(f"checkpoints/{state}/sha256.json").write_bytes(b'{"a": "1", "_CHECKPOINT_METADATA": "0"}')
    refused("the run there is another one, at checkpoints/5, and its copy on this machine is at checkpoints/5")
    assert set(memory.files()) == {"checkpoints/2/sha256.json", "checkpoints/5/sha256.json"}


def test_a_first_job_that_was_killed_goes_on(memory):
    with in_bucket(memory) as folder:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    write_state(folder, 1)
    with in_bucket(memory):
        pass
    assert "checkpoints/1/sha256.json" in memory.files()
