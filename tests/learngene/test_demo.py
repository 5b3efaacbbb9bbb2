"""The demo at toy size."""

from dataclasses import replace

import pytest
from PIL import Image

from heirloom.common import config
from heirloom.common.cli import main
from heirloom.common.data.sources import SourceConfig
from heirloom.common.files import read_json
from learngene import demo
from learngene.convnet import ConvConfig
from learngene.zoo import open_classifier


@pytest.fixture
def tiny(one_device, monkeypatch):
    """The demo's recipe with a model of two blocks at 8 px, one depth and a few steps."""
    shipped = config.load(demo.RECIPE)
    shared = dict(data=SourceConfig("emoji:noto", split="test"), held_out=SourceConfig("emoji:noto", split="test"))
    shared |= dict(steps=2, log_every=1, eval_every=2, save_every=2, pipeline=replace(shipped.gene.pipeline, batch=100))
    student = replace(shipped.gene.student, size=8, patch=4, width=16, layers=2, hidden=32, layout=(1, 1))
    gene = replace(shipped.gene, student=student, optim=replace(shipped.gene.optim, warmup=1), **shared)
    conv = ConvConfig(size=8, widths=(8,), blocks=1, classes=9)
    teacher = replace(shipped.teacher, student=conv, optim=replace(shipped.teacher.optim, warmup=1), **shared)
    rates = {name: replace(getattr(shipped, name), warmup=1) for name in ("tune", "scratch")}
    cfg = replace(shipped, gene=gene, teacher=teacher, depths=(2,), **rates)
    monkeypatch.setattr(demo.config, "load", lambda name: cfg)
    return cfg


def test_the_demo_compares_draws_and_reports(tiny, tmp_path, capsys):
    assert main(["demo", "learngene", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "demo.json")]) == 0
    told = read_json(tmp_path / "demo.json")
    assert set(told) == {"parameters", "scores", "comparison", "steps", "steps_to_scratch", "seconds", "picture"}
    assert set(told["scores"]) == {"teacher", "inherited", "scratch"} and all(
        set(s) == {"top1"} for s in told["scores"].values()
    )
    arms = told["comparison"]["arms"]
    assert set(arms) == {"sws-2", "scratch-2"} and all(len(arm["top1"]) == 2 for arm in arms.values())
    assert arms["sws-2"]["top1"][0] == told["comparison"]["genes"]["sws"]["top1"]
    assert open_classifier(str(tmp_path / "out" / "gene")).cfg == tiny.gene.student
    assert Image.open(tmp_path / "out" / "demo.png").size == (1440, 576)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"demo.png", "gene"}
    assert "of 1 depths the gene" in capsys.readouterr().out
