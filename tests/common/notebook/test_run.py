"""Fields of recipes as arguments, and what a run object reads from its folder."""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image

from heirloom.common import config
from heirloom.common.errors import InputError, Stopped
from heirloom.common.notebook import run as runs
from heirloom.common.notebook.run import Trained, configured, new_folder, replaced
from tinyclip_jax.zoo import STUDENTS

LINES = [
    {"step": 10, "loss": 2.0, "timing": {"seconds": 1.0}},
    {"step": 20, "loss": None, "eval/r1": 0.25, "eval/r5": 0.5, "timing": {"seconds": 2.0}},
    {"step": 30, "loss": 1.0, "timing": {"seconds": 3.0}},
]


def test_fields_are_arguments_and_nested_ones_dictionaries(tmp_path):
    cfg = configured(
        "tinyclip/emoji",
        dict(steps=50, optim={"lr": 1, "no_decay": ["a"]}, data={"path": tmp_path}, student=STUDENTS["vit_39m_16"]),
        "tinyclip_jax",
    )
    same = config.load("tinyclip/emoji", ["--steps", "50", "--optim.lr", "1", "--optim.no-decay", "a"])
    assert (cfg.steps, cfg.optim) == (same.steps, same.optim) and type(cfg.optim.lr) is float
    assert cfg.data.path == str(tmp_path) and cfg.data.split == "train" and cfg.student == STUDENTS["vit_39m_16"]


@pytest.mark.parametrize(
    ("recipe", "given", "words"),
    [
        ("tinyclip/emoji", dict(log_evry=5), "no field log_evry; did you mean 'log_every'"),
        ("tinyclip/emoji", dict(optim={"rate": 5}), r"no field optim\.rate.*lr"),
        ("tinyclip/emoji", dict(steps="many"), "steps is 'many', and must be a whole number"),
        ("tinyclip/emoji", dict(steps=0), "steps is 0: choose 1 or more"),
        ("lit/digits", {}, r"lit/digits is a recipe of lit_jax: call lit_jax\.train\('lit/digits'\)"),
        ("weightgen/zoo", {}, "is a recipe of weightgen"),
        ("tinyclip/progressive_32", dict(steps=5), r"steps has no effect in this recipe: .*stages"),
        (3, dict(steps=5), "int is no config: give the name of a recipe"),
    ],
)
def test_mistakes_are_one_line(recipe, given, words):
    with pytest.raises(InputError, match=words):
        configured(recipe, given, "tinyclip_jax")


def test_a_new_folder_is_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(new_folder("tinyclip/emoji")) == "runs/tinyclip-emoji"
    (tmp_path / "runs" / "tinyclip-emoji").mkdir(parents=True)
    assert str(new_folder("tinyclip/emoji")) == "runs/tinyclip-emoji-2"
    assert str(new_folder("/home/me/my recipe.py")) == "runs/home-me-my-recipe"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path


def test_a_run_reads_its_metrics(folder):
    trained = Trained(folder, 40, str.upper)
    assert trained.metrics == LINES and trained.scores == {"r1": 0.25, "r5": 0.5}
    steps, losses = trained.curve()
    np.testing.assert_array_equal(steps, [10, 30])
    np.testing.assert_array_equal(losses, [2.0, 1.0])
    with pytest.raises(InputError, match=r"no metric 'eval/r2'; did you mean 'eval/r\d'\? \(there are loss, "):
        trained.curve("eval/r2")
    assert repr(trained).splitlines() == [
        f"{folder}: step 30 of 40",
        "  loss: 2 at first, 1 at last",
        "  held out: r1 0.25, r5 0.5",
    ]


def test_its_plot_is_a_picture_with_a_cell_for_each_curve(folder):
    trained = Trained(folder, 40, str.upper)
    one, three = trained.plot("loss"), trained.plot()
    assert isinstance(one, Image.Image) and one.size == (500, 300) and three.size == (1200, 300)
    assert np.asarray(one.convert("L")).std() > 5  # something is drawn


def test_its_model_is_loaded_once_it_is_finished(folder):
    with pytest.raises(InputError, match=r"has no model: it is not finished: train\(\.\.\., run='.*'\) continues it"):
        Trained(folder, 40, str.upper).model  # noqa: B018
    with pytest.raises(InputError, match="has no model: its recipe trains none"):
        Trained(folder, 0, str.upper).model  # noqa: B018
    (folder / "model").mkdir()
    assert Trained(folder, 30, str.upper).model == str(folder / "model").upper()


def test_a_run_of_stages_shows_its_last(folder, tmp_path):
    stage = tmp_path / "whole" / "stage_2"
    (stage / "model").mkdir(parents=True)
    (stage / "metrics.jsonl").write_text(json.dumps(LINES[0]) + "\n")
    trained = Trained(tmp_path / "whole", 0, str)
    assert trained.metrics == LINES[:1] and trained.model == str(stage / "model")
    (stage / "config.json").write_text(json.dumps({"steps": 10}))
    trained = Trained(tmp_path / "whole", 40, str)  # the recipe's own steps, which its stages replace
    assert trained._facts()[0] == f"{stage}: step 10 of 10" and not trained.unfinished


@dataclass(frozen=True)
class Interrupted:
    """A recipe whose training is stopped."""

    steps: int = 40
    inner: dict = field(default_factory=dict)

    def train(self, directory):
        raise Stopped("stopped at step 30 of 40; the same command continues")


def test_an_interrupted_run_is_returned_and_says_how_to_continue(tmp_path, remarks):
    trained = runs.train(Interrupted(), tmp_path / "run", {"steps": 50}, "tinyclip_jax", str)
    assert trained.unfinished and trained.steps == 50
    assert remarks() == [f"stopped at step 30 of 40; run={str(tmp_path / 'run')!r} continues it"]


def test_a_config_is_replaced_not_changed():
    cfg = config.load("tinyclip/emoji")
    assert replaced(cfg, {"pipeline": {"batch": 8}}).pipeline.batch == 8 and cfg.pipeline.batch == 128
