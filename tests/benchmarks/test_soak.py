"""The parts of the soak that decide its verdict; .ci/run runs ten of its faults."""

import subprocess
import sys
import threading

import numpy as np
from safetensors.numpy import save_file

from benchmarks import index, soak, soak_faults, soak_jobs
from heirloom.common.data.tar_members import _by_tarfile, members


def test_one_bit_of_the_weights_is_seen(tmp_path):
    weights = np.arange(6, dtype=np.float32)
    other = weights.copy()
    other.view(np.uint32)[3] ^= 1
    for name, found in {"a": weights, "b": weights.copy(), "c": other, "d": weights[:5]}.items():
        (tmp_path / name).mkdir()
        save_file({"x": found, "scalar": np.array(3.0)}, tmp_path / name / "model.safetensors")
    (tmp_path / "none").mkdir()
    names = ("a", "b", "c", "d", "none")
    assert [soak.same(tmp_path / "a", tmp_path / name) for name in names] == [True, True, False, False, False]
    assert not soak.same(tmp_path / "none", tmp_path / "none")
    nan = np.full(2, np.nan, np.float32)
    save_file({"x": nan}, tmp_path / "a" / "model.safetensors")
    assert soak.same(tmp_path / "a", tmp_path / "a")


def test_a_plan_is_a_function_of_the_seed_and_all_faults_come():
    kinds = list(soak.FAULTS)
    drawn = soak.plans(0, kinds, 100)
    few = soak.plans(0, kinds, 7)
    assert drawn == soak.plans(0, kinds, 100) and 0 < len(few) < len(drawn) and drawn[: len(few)] == few
    assert drawn != soak.plans(1, kinds, 100)
    assert {fault.kind for plan in drawn for fault in plan.faults} == set(kinds)
    assert {plan.method.name for plan in drawn} == {method.name for method in soak.METHODS}
    assert all(plan.method.takes(fault.kind) for plan in drawn for fault in plan.faults)
    assert 100 <= sum(len(plan.faults) for plan in drawn) < 103


def test_the_table_counts_runs_in_the_row_of_each_of_their_faults():
    good = {"differs": False, "tracebacks": [], "hangs": 0, "unexpected": []}
    first = {"kind": "kill", "injected": True}
    runs = [
        {"faults": [first, {"kind": "SIGTERM", "injected": True}], **good, "differs": True, "hangs": 1},
        {"faults": [first, {"kind": "disk full", "injected": False}], **good, "tracebacks": ["ValueError: x"]},
    ]
    rows = {line[:22].strip(): line[22:].split() for line in soak.table(runs, ["damaged state"])}
    assert rows["kill"] == ["2", "2", "1", "1", "1", "0"] and rows["SIGTERM"] == ["1", "1", "1", "0", "1", "0"]
    assert rows["disk full"] == ["0", "0", "0", "0", "0", "0"] and rows["all"] == ["3", "2", "1", "1", "1", "0"]
    assert rows["damaged state"] == ["left", "out:", "needs", "root"]


class Scripts:
    """Starts a script in the place of each training."""

    def __init__(self, code):
        self.code = code

    def start(self, argv, env, out):
        with open(out, "a") as file:
            child = subprocess.Popen([sys.executable, "-c", self.code], stdout=file, stderr=file)
        process = soak_jobs.Process(child.pid)

        def wait():
            process.code = child.wait()
            process.ended.set()

        threading.Thread(target=wait).start()
        return process


def test_tracebacks_and_hangs_are_found(tmp_path, monkeypatch):
    job = soak.Job(soak.METHODS[0], tmp_path / "run", tmp_path / "data", Scripts("print('x')\n1 / 0"))
    assert job.wait() == [1] and job.tracebacks() == ["ZeroDivisionError: division by zero"]
    assert not job.finished() and job.hangs == 0
    job.note('Traceback (most recent call last):\n  File "a", line 1\n    y\nKeyError: 1\nFatal Python error: Aborted')
    assert job.tracebacks() == ["ZeroDivisionError: division by zero", "KeyError: 1", "Fatal Python error: Aborted"]
    monkeypatch.setattr(soak_jobs, "LIMIT", 0.5)
    stuck = soak.Job(soak.METHODS[0], tmp_path / "run", tmp_path / "data", Scripts("import time; time.sleep(60)"))
    assert stuck.wait() == [-9] and stuck.hangs == 1


def test_an_exit_code_that_a_fault_does_not_explain_is_counted(tmp_path):
    job = soak.Job(soak.METHODS[0], tmp_path / "run", tmp_path / "data", Scripts("raise SystemExit(3)"))
    found = soak_faults.inject(soak.Fault("SIGTERM", 3, 0.0, 0), job)
    assert found.exits == [[3]] and len(found.unexpected) == 1 and not found.done
    assert found.unexpected[0].startswith("exit codes [3], not [0, 75]")


def test_the_zygote_starts_trainings_and_says_how_they_ended(tmp_path):
    zygote, env = soak_jobs.Zygote(), soak_jobs.environment()
    try:
        started = [zygote.start(["train", "no/recipe", "--run", "r"], env, tmp_path / f"{i}") for i in "ab"]
        assert all(process.ended.wait(120) for process in started) and [p.code for p in started] == [2, 2]
        assert (tmp_path / "a").read_text().startswith("heirloom: ")
    finally:
        zygote.close()


def test_shards_of_the_benchmark_are_tars(monkeypatch, tmp_path):
    index.write_shards(tmp_path / "data", 2, 150)
    shards = sorted((tmp_path / "data").iterdir())
    assert members(shards[1]) == _by_tarfile(shards[1]) and len(members(shards[1])) == 300
    done = subprocess.run(["tar", "-tf", str(shards[0])], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[:2] == ["000000000.jpg", "000000000.txt"]
    found = index.measure("index", tmp_path / "data", 0, 0)
    assert found["samples"] == 300 and found["memory_mb"]["main"] > 1
    assert index.index_bytes(tmp_path / "data") > 300 * 32
    monkeypatch.setattr(index, "BATCH", 32)
    monkeypatch.setattr(index, "BATCHES", 1)
    for first in (0, 2):
        assert index.measure("batches", tmp_path / "data", 0, first)["examples_per_s"] > 0
