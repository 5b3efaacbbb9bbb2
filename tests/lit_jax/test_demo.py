"""The demo at toy size, and the models that live in the package."""

from dataclasses import replace

import pytest
from PIL import Image

from heirloom.common import config
from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.cli import main
from heirloom.common.files import read_json
from heirloom.common.nn.functional import functional
from lit_jax import demo
from lit_jax.autoencoder import Autoencoder, AutoencoderConfig
from lit_jax.autoencoder_layouts import FAMILY as AUTOENCODERS
from lit_jax.icon_scores import read_icons
from lit_jax.pixart import PixArt
from lit_jax.zoo import EMBEDDED, ICONS, icons_lit, icons_pixart, open_dit, open_pixart


@pytest.fixture
def tiny(one_device, tmp_path, draw, monkeypatch):
    """The demo's recipe with models of one layer, latents of 8 x 8, and two steps."""
    donor = replace(icons_pixart(), size=8, width=24, layers=1, heads=2, cross_heads=2, hidden=32)
    autoencoder = AutoencoderConfig(channels=(4, 4, 4, 4), resnets=1, latent=4, groups=2, scaling_factor=1.0, size=64)
    for name, method, module, cfg in (
        ("donor", "pixart", PixArt, donor),
        ("autoencoder", "autoencoder", Autoencoder, autoencoder),
    ):
        (tmp_path / name).mkdir()
        weights.write_params(tmp_path / name, draw(functional(module, cfg).spec))
        weights.write_config(tmp_path / name, method, cfg)
    shipped = config.load(demo.RECIPE)
    cfg = replace(
        shipped,
        student=replace(donor, attention="linear", heads=2),
        donor=str(tmp_path / "donor"),
        teacher=str(tmp_path / "donor"),
        autoencoder=str(tmp_path / "autoencoder"),
        data=replace(shipped.data, split="test"),  # the smaller one
        pipeline=replace(shipped.pipeline, batch=8),
        sample=replace(shipped.sample, steps=2),
        optim=replace(shipped.optim, warmup=1),
        steps=2,
        eval_every=1,
        log_every=1,
        save_every=2,
    )
    monkeypatch.setattr(demo.config, "load", lambda name: cfg)
    monkeypatch.setattr(demo, "PROMPTS", 10)
    return cfg


def test_the_demo_races_draws_and_reports(tiny, tmp_path, capsys):
    assert main(["demo", "lit", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "demo.json")]) == 0
    told = read_json(tmp_path / "demo.json")
    assert set(told) == {"parameters", "scores", "curves", "steps", "steps_to_scratch", "seconds", "picture"}
    assert set(told["scores"]) == {"teacher", "inherited", "scratch", "real"}
    shares = {"object", "colour", "both"}
    models = ("teacher", "inherited", "scratch")
    assert all(set(told["scores"][name]) == {"mse", "mse_swapped", *shares} for name in models)
    assert told["scores"]["real"] == dict.fromkeys(shares, 1)
    assert told["curves"]["inherited"]["step"] == told["curves"]["scratch"]["step"] == [0, 1, 2]
    assert abs(told["curves"]["scratch"]["mse"][0] - 1) < 0.05  # a fresh model predicts 0 for unit noise
    assert open_pixart(str(tmp_path / "out" / "student")).cfg == tiny.student
    assert Image.open(tmp_path / "out" / "demo.png").size == (1680, 552)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"demo.png", "student"}
    assert "the inherited student reached scratch's final loss" in capsys.readouterr().out


def test_which_prompts_were_shown_in_training():
    assert set(demo.SEEN) <= set(read_icons("train").prompts) and set(demo.UNSEEN) <= set(read_icons("test").prompts)


def test_the_embedded_models():
    assert open_pixart("embedded:t2i_donor").cfg == icons_pixart()
    assert open_pixart("embedded:t2i").cfg == icons_lit()
    autoencoder = open_donor(ICONS / "autoencoder", [AUTOENCODERS]).cfg
    assert autoencoder == config.load("lit/icons_autoencoder").student
    assert sum(file.stat().st_size for file in ICONS.rglob("*") if file.is_file()) <= 20e6


def test_the_embedded_student_draws_right_after_installation(one_device, tmp_path):
    flags = ["--prompt", "a red apple", "--steps", "2", "--out", str(tmp_path / "drawn")]
    assert main(["sample", "embedded:t2i", *flags]) == 0
    (picture,) = (tmp_path / "drawn").glob("*.png")
    assert Image.open(picture).size == (64, 64)


def test_the_embedded_digits():
    donor = open_dit("embedded:digits_dit")
    student = config.load("lit/digits").student
    assert donor.cfg == replace(student, attention="softmax", heads=4)
    assert sum(file.stat().st_size for file in EMBEDDED["digits_dit"].iterdir()) <= 8e6
