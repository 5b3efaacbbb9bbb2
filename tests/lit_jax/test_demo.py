"""The demo at toy size, and the donor that lives in the package."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from common import config
from common.checkpoint import weights
from common.checkpoint.weights import read_json
from common.cli import main
from common.data.sources import SourceConfig
from common.nn.functional import functional
from lit_jax import demo
from lit_jax.dit import Dit, DitConfig
from lit_jax.zoo import EMBEDDED, open_dit


@pytest.fixture
def tiny(one_device, tmp_path, draw, monkeypatch):
    """The demo's recipe with a model of two layers at 8 px and four steps."""
    donor = DitConfig(size=8, channels=3, patch=4, width=16, layers=1, heads=4, hidden=32, classes=9)
    folder = tmp_path / "donor"
    folder.mkdir()
    weights.write_params(folder, draw(functional(Dit, donor).spec))
    weights.write_config(folder, "lit", donor)
    shipped = config.load(demo.RECIPE)
    cfg = replace(
        shipped,
        student=replace(donor, attention="linear", heads=2),
        donor=str(folder),
        teacher=str(folder),
        data=SourceConfig("emoji:noto", split="train"),
        held_out=SourceConfig("emoji:noto", split="test"),
        pipeline=replace(shipped.pipeline, batch=8),
        sample=replace(shipped.sample, steps=2),
        optim=replace(shipped.optim, warmup=1),
        steps=2,
        eval_every=1,
        log_every=1,
        save_every=2,
    )
    monkeypatch.setattr(demo.config, "load", lambda name: cfg)
    return cfg


def test_the_demo_races_draws_and_reports(tiny, tmp_path, capsys):
    assert main(["demo", "lit", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "demo.json")]) == 0
    told = read_json(tmp_path / "demo.json")
    assert set(told) == {"parameters", "scores", "curves", "steps", "steps_to_scratch", "seconds", "picture"}
    assert set(told["scores"]) == {"teacher", "inherited", "scratch"}
    assert all(set(scores) == {"mse", "kid"} for scores in told["scores"].values())
    assert told["curves"]["inherited"]["step"] == told["curves"]["scratch"]["step"] == [0, 1, 2]
    assert abs(told["curves"]["scratch"]["mse"][0] - 1) < 0.05  # a fresh model predicts 0 for unit noise
    assert open_dit(str(tmp_path / "out" / "student")).cfg == tiny.student
    assert Image.open(tmp_path / "out" / "demo.png").size == (1680, 672)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"demo.png", "student"}
    assert "the inherited student reached scratch's final loss" in capsys.readouterr().out


def test_thumbnails_are_block_means():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    small = demo.thumbnails(pictures).reshape(2, 8, 8, 3)
    np.testing.assert_allclose(small[1, 2, 5], pictures[1, 8:12, 20:24].mean((0, 1)) / 127.5 - 1)


def test_the_embedded_donor():
    donor = open_dit("embedded:emoji_dit")
    student = config.load(demo.RECIPE).student
    assert donor.cfg == replace(student, attention="softmax", heads=4)
    assert donor.cfg.classes == len(demo.CLASSES)
    assert sum(file.stat().st_size for file in EMBEDDED["emoji_dit"].iterdir()) <= 8e6
