"""The count of bad records: in the metrics, in the file, against the limit, and across a restart."""

import json
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from heirloom.common.data.bad import BadRecord, Delivered
from heirloom.common.errors import InputError
from heirloom.common.train.bad_samples import BadSamples, Feed
from heirloom.common.train.loop import Cadence, Run
from heirloom.common.train.metrics import Work
from heirloom.common.train.optim import OptimConfig, make_optimizer
from heirloom.common.train.progress import describe
from heirloom.common.train.state import abstract_state, create_state
from heirloom.common.train.step import StepConfig, make_step

TOTAL, ROWS = 12, 16


def found(*positions, key="a.png"):
    return Delivered(ROWS, tuple(BadRecord(key, f"{key} does not decode", at) for at in positions))


class Rows:
    """Batch n is a function of n, and in `bad` what it says; it claims `examples` examples in each batch."""

    def __init__(self, bad, limit=1.0, examples=ROWS, ends=-1):
        self.next, self.bad, self.bad_limit, self.examples, self.ends = 0, bad, limit, examples, ends

    def __next__(self):
        n, self.next = self.next, self.next + 1
        if n == self.ends:
            raise ZeroDivisionError
        self.delivered = replace(self.bad.get(n, Delivered()), examples=self.examples)
        return {"x": np.random.default_rng(n).normal(size=(ROWS, 16)).astype("float32")}

    def state(self):
        return {"next": self.next}

    def restore(self, state):
        self.next = state["next"]


@pytest.fixture
def train(tmp_path, loss, spec, params, mesh):
    optimizer = make_optimizer(OptimConfig(lr=1e-2, warmup=1), spec, TOTAL)
    step = make_step(loss, optimizer, spec, mesh, StepConfig())

    def train(name, data, **cadence):
        run = Run.open(tmp_path / name, {})
        state = run.restore_or(
            lambda: create_state(params, optimizer, spec, mesh), abstract_state(optimizer, spec, mesh)
        )
        run.fit(state, step, data, TOTAL, examples_per_step=ROWS, cadence=Cadence(**cadence))
        return run.directory

    return train


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_timing(folder):
    return [{name: value for name, value in line.items() if name != "timing"} for line in lines(folder)]


BAD = {1: found(17), 5: found(81, 82, key="b.png"), 6: found(97), 9: found(145, 146, 147)}


def test_bad_records_are_counted_by_window_and_listed_once(train):
    folder = train("run", Rows(BAD), log=3, save=100)
    assert [line.get("bad") for line in lines(folder)] == [1, 2, 1, 3]
    listed = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert listed == [{"key": key, "reason": f"{key} does not decode"} for key in ("a.png", "b.png")]
    clean = train("clean", Rows({}), log=3, save=100)
    assert all("bad" not in line for line in lines(clean)) and not (clean / "bad_samples.jsonl").exists()
    timing = {"examples_per_second": 2000.0, "mfu": None, "data_wait": 0.02}
    shown = describe({"step": 400, "loss": 2.3, "bad": 1200, "timing": timing}, 600, Work(examples=60))
    assert shown == ["loss 2.3", "bad 1,200", "ETA 0:00:06", "2,000 examples/s", "data wait 2%"]


@pytest.mark.parametrize("ends", [7, 10])
def test_the_count_survives_a_restart_in_the_middle_of_a_window(train, ends):
    whole = train("whole", Rows(BAD), log=5, save=100)
    with pytest.raises(ZeroDivisionError):
        train("parts", Rows(BAD, ends=ends), log=5, save=7)
    parts = train("parts", Rows(BAD), log=5, save=7)
    assert without_timing(parts) == without_timing(whole)
    assert [line.get("bad") for line in lines(parts)] == [1, 6, None]
    assert (parts / "bad_samples.jsonl").read_text() == (whole / "bad_samples.jsonl").read_text()


def test_too_many_end_the_run_with_the_counts_and_the_last_key(train):
    # 7 of 12,000: judged from 10,000 on, at the line of step 10
    message = (
        r"^7 of 10,000 examples were bad, more than pipeline\.bad_limit 0\.0006; the last: a\.png does not decode; "
        r"bad_samples\.jsonl of the run lists them: repair the data, or raise --pipeline\.bad-limit$"
    )
    with pytest.raises(InputError, match=message):
        train("run", Rows(BAD, limit=0.0006, examples=1000), log=2, save=8)
    with pytest.raises(InputError, match=message):  # the count was saved with step 8
        train("run", Rows(BAD, limit=0.0006, examples=1000), log=2, save=8)
    folder = train("run", Rows(BAD, limit=0.0007, examples=1000), log=2, save=8)
    assert [line.get("bad", 0) for line in lines(folder)] == [1, 0, 2, 1, 3, 0]


def test_processes_add_up_what_each_of_them_found(tmp_path, monkeypatch):
    """Two processes share a row; the messages between them are run through a list."""
    shares = [[BadRecord("a", "a is bad", 1), BadRecord("b", "b is bad", 2)], [BadRecord("b", "b is bad", 2)]]
    shares[1].append(BadRecord("c", "c is bad" + "!" * 5000, 3))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    texts = [json.dumps([[r.position, r.key, r.reason] for r in share]).encode() for share in shares]

    def gathered(x):
        if x.ndim == 0:
            return np.array([len(text) for text in texts])
        rows = np.zeros((2, len(x)), np.uint8)
        for row, text in zip(rows, texts, strict=True):
            row[: len(text)] = np.frombuffer(text, np.uint8)
        return rows

    monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
    states = []
    for file, share in zip((tmp_path / "bad.jsonl", None), shares, strict=True):
        bad = BadSamples(file, 1.0, {})
        bad.add(Delivered(32, tuple(share)))
        bad.collect()
        states.append(bad.state())
    assert states[0] == states[1]
    assert [states[0][name] for name in ("examples", "replaced", "window")] == [32, 3, 3]
    assert [json.loads(line)["key"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == ["a", "b", "c"]


def test_data_that_fail_in_one_process_end_all(monkeypatch):
    """What the process that fails does: it repeats its batch, and all get its error."""
    data = Rows({1: found(17)})
    feed, bad = Feed(data), BadSamples(None, 1.0, {})
    batches = [feed.take(), feed.take()]
    bad.add(feed.delivered)

    def fail(self):
        raise InputError("a.png does not decode")

    monkeypatch.setattr(Rows, "__next__", fail)
    with pytest.raises(InputError, match=r"^a\.png does not decode$"):
        feed.take()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert feed.take() is batches[1] and feed.delivered == Delivered(failure="a.png does not decode")
    bad.add(feed.delivered)
    assert feed.take() is batches[1]
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    with pytest.raises(InputError, match=r"^a\.png does not decode$"):
        bad.collect()
    assert bad.state()["replaced"] == 1
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match=r"^a\.png does not decode$"):
        Feed(data).take()  # there is no batch to repeat


def test_a_line_that_a_kill_cut_is_left(tmp_path):
    file = tmp_path / "bad.jsonl"
    add = partial(BadSamples, file, 1.0, {})
    for key in ("a", "b"):
        bad = add()
        bad.add(found(1, key=key))
        bad.collect()
        with file.open("a") as out:
            out.write('{"key": "c')
    bad = add()
    bad.add(found(1, 2, key="a"))
    bad.collect()
    assert file.read_text().splitlines() == [
        json.dumps({"key": key, "reason": f"{key} does not decode"}) for key in ("a", "b")
    ]
