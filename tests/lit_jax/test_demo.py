"""The demo at toy size, and the donor that lives in the package."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from heirloom.common import config
from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.weights import read_json
from heirloom.common.cli import main
from heirloom.common.nn.functional import functional
from lit_jax import demo
from lit_jax.dit import Dit, DitConfig
from lit_jax.zoo import EMBEDDED, open_dit


@pytest.fixture
def tiny(one_device, tmp_path, draw, monkeypatch):
    """The demo's recipe with a model of one layer and two steps."""
    donor = DitConfig(size=8, channels=3, patch=4, width=16, layers=1, heads=4, hidden=32, classes=10)
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
    assert set(told["scores"]) == {"teacher", "inherited", "scratch", "real"}
    assert all(
        set(told["scores"][name]) == {"mse", "kid", "recognised"} for name in ("teacher", "inherited", "scratch")
    )
    assert told["scores"]["real"]["recognised"] > 0.9  # nearest neighbours read what people wrote
    assert told["curves"]["inherited"]["step"] == told["curves"]["scratch"]["step"] == [0, 1, 2]
    assert abs(told["curves"]["scratch"]["mse"][0] - 1) < 0.05  # a fresh model predicts 0 for unit noise
    assert open_dit(str(tmp_path / "out" / "student")).cfg == tiny.student
    assert Image.open(tmp_path / "out" / "demo.png").size == (1680, 672)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"demo.png", "student"}
    assert "the inherited student reached scratch's final loss" in capsys.readouterr().out


def test_a_digit_is_recognised_by_its_nearest_neighbour():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    known = demo.pixel_features(pictures), np.array([4, 7, 1])
    np.testing.assert_allclose(known[0].reshape(3, 8, 8)[1, 2, 5], pictures[1, 2, 5].mean() / 127.5 - 1)
    assert demo.nearest_neighbour_accuracy(known, 0.9 * known[0], np.array([4, 7, 9])) == pytest.approx(2 / 3)


def test_the_embedded_donor():
    donor = open_dit("embedded:digits_dit")
    student = config.load(demo.RECIPE).student
    assert donor.cfg == replace(student, attention="softmax", heads=4)
    assert sum(file.stat().st_size for file in EMBEDDED["digits_dit"].iterdir()) <= 8e6
