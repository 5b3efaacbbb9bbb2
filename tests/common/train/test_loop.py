import dataclasses
import itertools
import json
import os
import signal

import jax
import numpy as np
import optax
import pytest

from heirloom.common.errors import InputError, Remark, Stopped
from heirloom.common.mesh import start
from heirloom.common.surgery.axes import Axes, Leaf
from heirloom.common.train import loop
from heirloom.common.train.loop import Cadence, Run, closing, difference
from heirloom.common.train.metrics import MetricsFile
from heirloom.common.train.optim import OptimConfig, make_optimizer
from heirloom.common.train.state import abstract_state, create_state
from heirloom.common.train.step import StepConfig, make_step

TOTAL = 23
SCALE = {"logit_scale": Leaf(Axes.parse(""), (), np.dtype("float32"))}


class Rows:
    """Batch n is a function of n; `on[n]` is called when batch n is asked for, `bad` names batches with a NaN."""

    def __init__(self, on=None, bad=()):
        self.next, self.on, self.bad = 0, on or {}, bad

    def __next__(self):
        n, self.next = self.next, self.next + 1
        self.on.get(n, lambda: None)()
        x = np.random.default_rng(n).normal(size=(16, 16)).astype("float32")
        return {"x": x, "factor": np.full((16, 1), np.nan if n in self.bad else 1, "float32")}

    def state(self):
        return {"next": self.next}

    def restore(self, state):
        self.next = state["next"]


@pytest.fixture
def train(tmp_path, loss, spec, params, mesh):
    optimizer = make_optimizer(OptimConfig(lr=1e-2, warmup=5), spec, TOTAL)
    step = make_step(loss, optimizer, spec, mesh, StepConfig(ema=0.9, max_skipped=4))

    def train(name, data, cadence={}, **options):  # noqa: B006  # read only
        run = Run.open(tmp_path / name, {"lr": 1e-2})
        like = abstract_state(optimizer, spec, mesh, ema=0.9)
        state = run.restore_or(lambda: create_state(params, optimizer, spec, mesh, ema=0.9), like)
        defaults = {
            "examples_per_step": 16,
            "cadence": Cadence(**{"log": 5, "save": 7, "eval": 1000} | cadence),
        } | options
        return run, run.fit(state, step, data, TOTAL, **defaults)

    return train


def curve(run):
    return [
        {name: value for name, value in line.items() if name != "timing"}
        for line in MetricsFile(run.directory / "metrics.jsonl").lines()
    ]


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(np.array(x), np.array(y)), a, b))


def test_a_stopped_run_continues_to_the_last_bit(train, tmp_path):
    scores = {"evaluate": lambda state: {"step": float(state.step)}, "cadence": {"eval": 9}}
    whole, expected = train("whole", Rows(), **scores)
    assert [line["step"] for line in curve(whole)] == [5, 9, 10, 15, 18, 20, 23]
    assert [line.get("eval/step") for line in curve(whole)] == [None, 9.0, None, None, 18.0, None, 23.0]

    # a crash before any save; then SIGTERM while batch 11 is fetched: step 12 is finished, amid a log's window
    with pytest.raises(ZeroDivisionError):
        train("parts", Rows({6: lambda: 1 // 0}), **scores)
    with pytest.raises(Stopped) as stopped:
        train("parts", Rows({11: lambda: os.kill(os.getpid(), signal.SIGTERM)}), **scores)
    assert "stopped at step 12 of 23" in str(stopped.value)
    assert [line["step"] for line in curve(Run.open(tmp_path / "parts", {"lr": 1e-2}))] == [5, 9, 10]
    # a crash at batch 18, after lines that the checkpoint of step 14 does not know
    with pytest.raises(ZeroDivisionError):
        train("parts", Rows({18: lambda: 1 // 0}), **scores)
    parts, found = train("parts", Rows(), **scores)
    assert curve(parts) == curve(whole)
    assert same(found, expected)


def test_a_line_holds_the_mean_of_its_steps(train):
    fine, _ = train("fine", Rows(), cadence={"log": 1})
    coarse, _ = train("coarse", Rows(), cadence={"log": 10})
    losses = [line["loss"] for line in curve(fine)]
    np.testing.assert_allclose(
        [line["loss"] for line in curve(coarse)], [np.mean(losses[:10]), np.mean(losses[10:20]), np.mean(losses[20:])]
    )
    assert losses[-1] < 0.7 * losses[0]
    assert json.loads((fine.directory / "metrics.jsonl").read_text().splitlines()[0]).keys() >= {
        "step",
        "loss",
        "timing",
    }


def test_non_finite_steps_are_counted_and_the_good_state_is_kept(train):
    bad = range(12, 100)  # steps 13, 14, ... fail; 14 would have been saved
    message = (
        r"step 16: loss or gradient were not finite for 4 steps in a row, since step 13; the last good state is"
        r" .*checkpoints/7\."
    )
    with pytest.raises(InputError, match=message):
        train("bad", Rows(bad=bad))
    run, state = train("bad", Rows())  # with the data mended it goes on from there
    assert int(state.step) == TOTAL and int(state.skipped) == 0
    assert run.checkpoints.latest() == TOTAL


def test_few_non_finite_steps_do_no_harm(train):
    run, state = train("few", Rows(bad=(1, 2, 3, 5, 6)))
    assert [round(line["skipped"] * 5) for line in curve(run)[:2]] == [3, 2]
    assert all(np.isfinite(line["loss"]) for line in curve(run))
    assert int(state.step) == TOTAL


def test_a_finished_run_says_so(train):
    written = []

    def write(state):
        written.append(int(state.step))

    run, _ = train("done", Rows(), on_finish=write)
    assert not run.finished(TOTAL)
    run.model.mkdir()
    assert run.finished(TOTAL) and not run.finished(TOTAL + 1)
    _, state = train("done", Rows({n: lambda: 1 // 0 for n in range(99)}), on_finish=write)  # asks for no batch
    assert written == [TOTAL, TOTAL] and int(state.step) == TOTAL


def test_a_signal_that_comes_twice_at_once_is_one(train, monkeypatch):
    """Ctrl-C reaches a supervised training from the terminal and from `heirloom supervise`."""
    twice = {3: lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)]}
    with pytest.raises(Stopped, match="stopped at step 4 of 23"):
        train("once", Rows(twice))
    monkeypatch.setattr(loop, "REPEATED", 0.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for jobs in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            train("at once", Rows(twice))
    finally:
        signal.signal(signal.SIGINT, before)


def test_data_that_end_are_named(train):
    class Short(Rows):
        def __next__(self):
            if self.next == 9:
                raise StopIteration
            return super().__next__()

    with pytest.raises(InputError, match="the data ended after 9 of 23 steps"):
        train("short", Short())


def test_signals_are_given_back(train):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train("signals", Rows())
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_changed_config_is_refused_with_the_difference(tmp_path):
    config = {"optim": {"lr": 1e-4, "frozen": ("a", "b")}, "seed": 0, "old": True}
    Run.open(tmp_path, config | {"seed": 7})
    Run.open(tmp_path, config)  # nothing has happened yet: a mistake in the first command can be mended
    (tmp_path / "metrics.jsonl").touch()
    Run.open(tmp_path, json.loads(json.dumps(config)))  # the same, read back: tuples are lists
    changed = {"optim": {"lr": 3e-4, "frozen": ["a"]}, "seed": 0, "new": None}
    with pytest.raises(InputError) as refused:
        Run.open(tmp_path, changed)
    assert str(refused.value).partition("set it back: ")[2].split("; ") == [
        "optim.lr: 0.0001 before, 0.0003 now",
        'optim.frozen: ["a", "b"] before, ["a"] now',
        "old: true before, absent now",
        "new: absent before, null now",
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "metrics.jsonl"}


def test_a_folder_with_a_config_of_something_else_is_left_alone(tmp_path):
    for config in ({"format": 1, "method": "a", "model": {}}, {"model_type": "vit", "hidden_size": 8, "seed": 0}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=r"has the config\.json of something else; take a new folder"):
            Run.open(tmp_path, {"optim": {}, "steps": 4, "seed": 0, "method": "a"})
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
        assert json.loads((tmp_path / "config.json").read_text()) == config


def test_a_finished_run_without_its_states_is_finished_and_nothing_else(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    (tmp_path / "config.json").write_text('{"steps": 3}')
    assert not Run.open(tmp_path, {"steps": 3}).finished(3)  # killed before the first state: it begins again
    (tmp_path / "model").mkdir()
    assert Run.open(tmp_path, {"steps": 3}).finished(3)
    with pytest.raises(InputError, match=r"states are gone; copy checkpoints/ back, or take a new folder"):
        Run.open(tmp_path, {"steps": 4})
    assert json.loads((tmp_path / "config.json").read_text()) == {"steps": 3}


def test_where_a_run_computes_may_change(tmp_path):
    config = {"mesh": {"data": 2, "fsdp": 2}, "pipeline": {"workers": 0, "batch": 32}, "writers": []}
    Run.open(tmp_path, config)
    (tmp_path / "metrics.jsonl").touch()
    pipeline = {"workers": 4, "batch": 32, "bad": "stop", "bad_limit": 0.5}
    moved = {"mesh": {"data": 1, "fsdp": 8}, "pipeline": pipeline, "writers": ["wandb"]}
    assert Run.open(tmp_path, moved).config == moved
    with pytest.raises(InputError, match=r"pipeline\.batch: 32 before, 64 now"):
        Run.open(tmp_path, moved | {"pipeline": {"workers": 4, "batch": 64}})


def test_no_difference():
    assert difference({"a": {"b": [1, 2]}}, {"a": {"b": [1, 2]}}) == []


def test_a_run_needs_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/run: cannot write a run here \(Not a directory\)"):
        Run.open(tmp_path / "file" / "run", {})


def test_batches_are_asked_for_in_order_and_once(train):
    asked = []
    data = Rows({n: lambda n=n: asked.append(n) for n in itertools.islice(itertools.count(), 50)})
    train("order", data)
    assert asked == list(range(TOTAL))


def test_a_second_phase_goes_on_where_the_first_ended(train):
    asked = []
    with pytest.raises(Stopped):
        train("phases", Rows({11: lambda: os.kill(os.getpid(), signal.SIGTERM)}))
    # A wish to stop in the last step of a phase: the phase is whole, and what would follow does not begin.
    ended = []
    with pytest.raises(Stopped) as stopped:
        on = {TOTAL - 1: lambda: os.kill(os.getpid(), signal.SIGTERM)}
        train("phases", Rows({n: lambda n=n: asked.append(n) for n in range(TOTAL - 1)} | on), on_finish=ended.append)
    assert len(ended) == 1 and "stopped after the last step, 23" in str(stopped.value)
    asked.append(TOTAL - 1)
    data = Rows({n: lambda n=n: asked.append(n) for n in range(50)})
    run, state = train("phases", data)
    step = make_step(
        lambda p, b, k, f: (p["logit_scale"] ** 2, {}), optax.sgd(0.1), SCALE, start(), StepConfig()
    )
    fresh = create_state({"logit_scale": np.float32(1)}, optax.sgd(0.1), SCALE, step.mesh)
    fresh = dataclasses.replace(fresh, step=state.step)
    run.fit(fresh, step, data, TOTAL + 5, examples_per_step=16, cadence=Cadence(log=5))
    assert asked == list(range(12, TOTAL + 5))
    assert [line["step"] for line in curve(run)] == [5, 10, 15, 20, 23, 25, 28]


def test_a_score_that_is_not_finite_ends_the_run_in_one_line(train):
    with pytest.raises(InputError, match=r"step 9: eval/loss is nan, though all parameters are finite") as ended:
        train("scores", Rows(), evaluate=lambda state: {"loss": float("nan")}, cadence={"eval": 9})
    assert "\n" not in str(ended.value)


def test_seconds_of_saves_are_in_the_next_line(train):
    run, _ = train("stall", Rows())  # saves after steps 7, 14 and 21
    stalls = [line["timing"]["save_stall"] for line in MetricsFile(run.directory / "metrics.jsonl").lines()]
    assert [stall > 0 for stall in stalls] == [False, True, True, False, True]  # lines of steps 5, 10, 15, 20, 23


def test_a_damaged_last_state_costs_steps_and_nothing_else(train):
    whole, expected = train("whole", Rows())
    with pytest.raises(ZeroDivisionError):
        train("parts", Rows({16: lambda: 1 // 0}))
    parts = Run.open(whole.directory.with_name("parts"), {"lr": 1e-2})
    assert parts.checkpoints.latest() == 14
    data = next(path for path in (parts.checkpoints.directory / "14" / "state" / "d").iterdir())
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    asked = []
    used = r"14 is damaged: state/d/\w+ differs from its SHA-256; the state of step 7 is used"
    with pytest.warns(Remark, match=used):
        parts, found = train("parts", Rows({n: lambda n=n: asked.append(n) for n in range(TOTAL)}))
    assert asked == list(range(7, TOTAL)) and curve(parts) == curve(whole)
    assert same(found, expected)


def test_a_lost_metrics_file_is_named_and_the_config_is_still_compared(train, tmp_path):
    with pytest.raises(ZeroDivisionError):
        train("lost", Rows({16: lambda: 1 // 0}))
    (tmp_path / "lost" / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"lr: 0\.01 before, 0\.02 now"):
        Run.open(tmp_path / "lost", {"lr": 2e-2})
    with pytest.warns(Remark, match=r"metrics\.jsonl is missing: the lines up to step 14 are lost"):
        run, _ = train("lost", Rows())
    assert [line["step"] for line in curve(run)] == [15, 20, 23]


def test_a_run_that_another_job_took_over_stops_at_once(train, tmp_path):
    run = Run.open(tmp_path / "taken", {"lr": 1e-2})
    with pytest.raises(InputError, match=r"taken: host far, pid 1 took over the run; this job stops"):
        train("taken", Rows({9: lambda: run.lease.lost.append("host far, pid 1 took over the run")}))
    assert [line["step"] for line in curve(run)] == [5]


def test_the_last_word_names_the_weights_that_are_there(tmp_path):
    def finished(folder, loss):
        (folder / "model").mkdir(parents=True)
        lines = ({"step": 2, "loss": 1.0, "eval/r1": loss}, {"step": 3, "loss": 1.0})
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    assert closing(tmp_path, "runs/a") == ""  # a zoo, or a comparison: no run
    finished(tmp_path / "one", 0.25)
    assert closing(tmp_path / "one", "gs://bucket/one") == (
        "weights: gs://bucket/one/model; held out: r1 0.25; curves and pictures: heirloom report gs://bucket/one"
    )
    (tmp_path / "two" / "stage_old").mkdir(parents=True)  # somebody's copy
    for n in (2, 10):  # stages: the last one's
        finished(tmp_path / "two" / f"stage_{n}", n / 20)
    assert closing(tmp_path / "two", "runs/two").startswith("weights: runs/two/stage_10/model; held out: r1 0.5;")
    (tmp_path / "two" / "stage_10" / "model").rmdir()
    assert closing(tmp_path / "two", "runs/two") == ""
