"""The trainer as a person uses it: a recipe, a run folder, a kill, the same command again."""

import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from math import log
from pathlib import Path

import chex
import jax
import ml_dtypes
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from heirloom.common import config
from heirloom.common.checkpoint.weights import open_safetensors
from heirloom.common.cli import main
from heirloom.common.data.sources import SourceConfig
from heirloom.common.errors import InputError
from heirloom.common.mesh import start
from heirloom.common.nn.functional import functional
from heirloom.common.train import recipe
from heirloom.common.train.optim import OptimConfig, make_optimizer
from heirloom.common.train.parameters import best
from heirloom.common.train.state import create_state
from heirloom.common.train.step import StepConfig, make_step
from tinyclip_jax.losses import affinity_mimicking
from tinyclip_jax.model import Clip
from tinyclip_jax.train import (
    EMBEDDINGS,
    TARGETS,
    Config,
    LossConfig,
    _no_vector,
    constrain_scale,
    describe_first_batch,
    loss_fn,
)
from tinyclip_jax.zoo import open_clip_model

ROOT = Path(__file__).parents[2]
FLAGS = "--steps 8 --log-every 1 --save-every 2 --eval-every 4 --pipeline.batch 32 --optim.warmup 2 --step.ema 0.9"
SMALL = "--student.text.vocab 600"  # whose tokenizer is soon trained
ARGUMENTS = ["train", "tinyclip/smoke", *FLAGS.split(), *SMALL.split(), "--run"]
PATIENCE = 300  # seconds after which a run counts as stuck


def run(folder):
    command = [sys.executable, "-m", "heirloom.common.cli", *ARGUMENTS, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def curve(folder):
    return [
        {k: v for k, v in json.loads(line).items() if k != "timing"}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(folder).wait(PATIENCE) == 0
    return folder


def test_a_run_leaves_what_its_folder_promises(uninterrupted):
    assert {p.name for p in uninterrupted.iterdir()} >= {
        "config.json",
        "about.json",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "first_batch.png",
    }
    lines = curve(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert [line["step"] for line in lines if "eval/r1" in line] == [4, 8]
    written = {"model.safetensors", "config.json", "preprocess.json", "tokenizer.json"}
    assert {p.name for p in (uninterrupted / "model").iterdir()} == written
    (start,) = json.loads((uninterrupted / "about.json").read_text())["starts"]
    assert start["command"].startswith("heirloom train tinyclip/smoke --steps 8 ") and start["step"] == 0


def test_killed_and_resumed_it_is_the_same_run_to_the_bit(uninterrupted, tmp_path):
    folder = tmp_path / "killed"
    process = run(folder)
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 300  # a busy machine compiles for minutes
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "model").exists()
    assert run(folder).wait(PATIENCE) == 0
    assert curve(folder) == curve(uninterrupted)
    starts = json.loads((folder / "about.json").read_text())["starts"]
    assert len(starts) == 2 and 2 <= starts[1]["step"] < 8
    ours, theirs = (open_safetensors(f / "model" / "model.safetensors") for f in (folder, uninterrupted))
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path])


def test_a_finished_run_exits_at_once_and_a_changed_config_is_refused(uninterrupted, capsys):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    assert main([*ARGUMENTS, str(uninterrupted)]) == 0
    assert "is finished: 8 steps" in capsys.readouterr().out
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before
    assert main([*ARGUMENTS, str(uninterrupted), "--optim.lr", "5"]) == 2
    said = capsys.readouterr().err
    assert "optim.lr: 0.001 before, 5.0 now" in said and said.count("\n") == 1


@pytest.fixture(scope="module")
def emoji():
    return config.load("tinyclip/emoji")


@pytest.fixture(scope="module")
def inherited(emoji):
    """The student of that recipe before its first step."""
    return initial(emoji)


def initial(cfg):
    parts = cfg.parts()
    return recipe.initial(cfg, parts, recipe.open_sources(parts, start(cfg.mesh)), None)


def test_the_students_start_is_the_plans_graft(emoji, inherited):
    donor, params = open_clip_model(emoji.donor), inherited
    theirs = whole(donor)
    # Manual inheritance, by hand: leading channels, heads of 64, every second text layer.
    np.testing.assert_array_equal(
        params["image/blocks/attn/query/kernel"], theirs["image/blocks/attn/query/kernel"][:, :128, :2]
    )
    np.testing.assert_array_equal(params["text/blocks/mlp/up/kernel"], theirs["text/blocks/mlp/up/kernel"][[0, 2]])
    np.testing.assert_array_equal(params["image/projection/kernel"], theirs["image/projection/kernel"][:128])
    assert float(params["logit_scale"]) == pytest.approx(log(50), abs=1e-6)


def whole(donor):
    return {path: np.asarray(value, np.float32) for path, value in donor.source.values.items()}


def test_inherited_and_scratch_differ_only_in_where_they_start(emoji, inherited):
    scratch = initial(replace(emoji, donor=""))
    chex.assert_trees_all_equal_shapes_and_dtypes(inherited, scratch)
    assert not np.array_equal(inherited["image/cls"], scratch["image/cls"])
    np.testing.assert_array_equal(inherited["logit_scale"], scratch["logit_scale"])


def test_the_scale_is_held_or_bounded():
    params = {"logit_scale": np.float32(9.0)}
    assert float(constrain_scale(LossConfig(), params)["logit_scale"]) == pytest.approx(3.912023)
    assert float(constrain_scale(LossConfig(scale="learned"), params)["logit_scale"]) == pytest.approx(log(100))
    assert float(constrain_scale(LossConfig(scale="learned"), {"logit_scale": np.float32(-1.0)})["logit_scale"]) == 0


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (LossConfig(), "and teacher is empty"),
        (LossConfig(alpha=0.5, teacher_scale=None), "and teacher is empty"),
        (LossConfig(alpha=0.0, teacher_scale=None), "set loss.teacher_scale to a number"),
    ],
)
def test_a_loss_that_cannot_be_computed_is_refused(loss, message):
    cfg = replace(config.load("tinyclip/smoke"), loss=loss)
    with pytest.raises(InputError, match=message):
        loss_fn(cfg, functional(Clip, cfg.student), None)


def test_a_teacher_that_teaches_nothing_is_said(remarks):
    cfg = replace(config.load("tinyclip/smoke"), teacher="embedded:emoji")
    loss_fn(cfg, functional(Clip, cfg.student), None)
    assert "the teacher embedded:emoji teaches nothing, because loss.alpha is 0" in remarks()


@pytest.mark.parametrize(("named", "missing"), [([], "teacher_image"), (["teacher_image"], "teacher_text")])
def test_embeddings_that_are_no_columns_are_missed_in_one_line(named, missing, tmp_path, capsys):
    rows = [{"image": b"", "caption": f"caption {i}", "teacher_image": [1.0, 0.0]} for i in range(3)]
    file = tmp_path / "pairs.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    flags = ["--teacher", "embeddings", "--loss.alpha", "1", "--data.path", str(file), "--data.split", ""]
    columns = ["--data.columns", *named] if named else []
    assert main(["train", "tinyclip/smoke", "--run", str(tmp_path / "run"), *flags, *columns]) == 2
    said = f"heirloom: {file} has no {missing}: add this column of teacher embeddings, and name it in data.columns\n"
    assert capsys.readouterr().err == said


def test_an_embedding_that_is_text_is_refused(tmp_path, capsys):
    rows = [{"image": b"", "caption": f"caption {i}", **dict.fromkeys(TARGETS, "[1.0, 0.0]")} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    flags = ["--teacher", "embeddings", "--loss.alpha", "1", "--data.path", str(tmp_path / "pairs.parquet")]
    flags += ["--data.split", "", "--data.columns", *TARGETS]
    assert main(["train", "tinyclip/smoke", "--run", str(tmp_path / "run"), *flags]) == 2
    assert "teacher_image is '[1.0, 0.0]'; a teacher embedding is a list of numbers" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_an_embedding_may_have_any_float(dtype):
    assert _no_vector(dict.fromkeys(TARGETS, np.ones(4, dtype))) == ""


def test_one_stored_embedding_is_not_that_of_several_captions(tmp_path, capsys):
    pixels, vector = io.BytesIO(), [1.0] * 256
    Image.new("RGB", (60, 60)).save(pixels, "PNG")
    row = {"image": pixels.getvalue(), "caption": ["one", "two"], **dict.fromkeys(TARGETS, vector)}
    parquet.write_table(pyarrow.Table.from_pylist([row] * 64), tmp_path / "rows.parquet")
    flags = ["--teacher", "embeddings", "--loss.alpha", "1", "--data.path", str(tmp_path / "rows.parquet")]
    flags += ["--data.split", "", "--data.columns", *TARGETS, "--donor="]
    assert main(["train", "tinyclip/smoke", "--run", str(tmp_path / "run"), *flags]) == 2
    assert "has several captions of a picture, and teacher_text belongs to one" in capsys.readouterr().err


def test_a_live_teacher_and_its_embeddings_teach_the_same(emoji, inherited):
    donor = open_clip_model(emoji.teacher)
    student, teacher = functional(Clip, emoji.student), whole(donor)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.standard_normal((8, 60, 60, 3)).astype(np.float32),
        "text": rng.integers(1, 4000, (8, 16)).astype(np.int32),
    }
    features = jax.jit(donor.model.apply)(teacher, batch["image"], batch["text"])
    live, _ = jax.jit(loss_fn(emoji, student, donor))(inherited, batch, jax.random.key(0), teacher)
    # As the columns of others may be: not of unit norm.
    stored = batch | {"teacher_image": 10 * features.image, "teacher_text": 9 * features.text}
    cached, _ = jax.jit(loss_fn(replace(emoji, teacher="embeddings"), student, None))(
        inherited, stored, jax.random.key(0), None
    )
    assert float(live) == pytest.approx(float(cached), rel=1e-6)


@pytest.fixture(scope="module")
def tiny_step(cfg, model, draw, one_device):
    """One step of the trainer's own wiring on a tiny CLIP: parameters before, batch, state after, metrics."""
    mesh, loss = start(), LossConfig(alpha=0.3, teacher_scale=20.0)
    cfg = Config(
        student=cfg, teacher=EMBEDDINGS, loss=loss, step=StepConfig(ema=0.75), optim=OptimConfig(warmup=0, lr=1e-2)
    )
    rng = np.random.default_rng(0)
    embeddings = {name: rng.standard_normal((8, 5)).astype(np.float32) for name in TARGETS}
    batch = {
        "image": rng.standard_normal((8, 16, 16, 3)).astype(np.float32),
        "text": rng.integers(0, 40, (8, 10)).astype(np.int32),
        **{name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in embeddings.items()},
    }
    params = draw(model.spec)
    optimizer = make_optimizer(cfg.optim, model.spec, 10)
    step = make_step(
        loss_fn(cfg, model, None), optimizer, model.spec, mesh, cfg.step, project=partial(constrain_scale, cfg.loss)
    )
    state, metrics = step(create_state(params, optimizer, model.spec, mesh, cfg.step.ema), batch)
    return params, batch, state, {name: float(total / count) for name, (total, count) in metrics.items()}


def test_the_loss_is_the_weighted_sum_of_its_parts_at_the_configured_scales(model, tiny_step):
    params, batch, state, metrics = tiny_step
    image, text, scale, _ = (
        np.asarray(x, np.float64) for x in jax.jit(model.apply)(params, batch["image"], batch["text"])
    )

    def log_softmax(x):
        x = x - x.max(1, keepdims=True)
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    logits = scale * image @ text.T
    teacher = 20.0 * np.asarray(batch["teacher_image"], np.float64) @ np.asarray(batch["teacher_text"], np.float64).T
    soft = [
        -(np.exp(log_softmax(t)) * log_softmax(s)).sum(1).mean() for s, t in ((logits, teacher), (logits.T, teacher.T))
    ]
    hard = [-np.diag(log_softmax(s)).mean() for s in (logits, logits.T)]
    assert metrics["affinity"] == pytest.approx(np.mean(soft), rel=1e-4)
    assert metrics["contrastive"] == pytest.approx(np.mean(hard), rel=1e-4)
    assert metrics["loss"] == pytest.approx(0.3 * np.mean(soft) + 0.7 * np.mean(hard), rel=1e-4)
    assert metrics["scale"] == pytest.approx(float(scale), rel=1e-6)
    assert float(state.params["logit_scale"]) == pytest.approx(log(20.0))


def test_the_average_is_what_is_scored_and_saved(tiny_step):
    params, _, state, _ = tiny_step
    path = "image/blocks/mlp/up/kernel"
    np.testing.assert_allclose(
        best(state)[path], 0.75 * params[path] + 0.25 * np.asarray(state.params[path]), rtol=1e-5, atol=1e-6
    )
    assert not np.allclose(best(state)[path], state.params[path], atol=1e-4)


def test_micro_batches_would_change_the_loss_and_are_refused(cfg, model):
    with pytest.raises(InputError, match="compares all pairs of a batch"):
        loss_fn(Config(student=cfg, teacher=EMBEDDINGS, step=StepConfig(accumulate=2)), model, None)


def test_similarities_are_computed_in_full_precision():
    x = jax.ShapeDtypeStruct((8, 4), "float32")
    with jax.default_matmul_precision("default"):
        text = jax.jit(affinity_mimicking).lower(x, x, x, x, 50.0, 50.0).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 2 and all("HIGHEST, HIGHEST" in line for line in products)


def test_patches_that_do_not_fill_the_picture_are_refused(cfg):
    with pytest.raises(InputError, match="patches of 8 px do not fill pictures of 33 px"):
        functional(Clip, replace(cfg, image=replace(cfg.image, size=33)))


@pytest.mark.parametrize(("same", "what"), [("image", "pictures"), ("text", "captions")])
def test_a_first_batch_that_is_all_the_same_is_refused(same, what):
    rng = np.random.default_rng(0)
    batch = {"image": rng.normal(size=(4, 2, 2, 3)), "text": rng.integers(0, 9, (4, 5))}
    batch[same] = np.zeros_like(batch[same])

    cfg = Config(data=SourceConfig("synthetic"))
    with pytest.raises(InputError, match=f"all {what} of the first batch are the same.* check data.path, synthetic"):
        describe_first_batch(cfg, None, jax.device_put(batch), None)
