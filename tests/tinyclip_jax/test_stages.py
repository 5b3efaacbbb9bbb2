"""Automatic inheritance and progressive distillation as a user runs them: one recipe, several stages, a stop."""

import json
import shutil
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import optax
import pytest

from heirloom.common import config
from heirloom.common.checkpoint.state import Checkpoints
from heirloom.common.checkpoint.weights import open_safetensors
from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.data.text import Tokenizer
from heirloom.common.errors import InputError
from heirloom.common.files import read_json
from heirloom.common.mesh import MeshConfig
from heirloom.common.nn.functional import functional
from heirloom.common.train.optim import OptimConfig
from tinyclip_jax.automatic import mask_optimizer
from tinyclip_jax.cost import parameters
from tinyclip_jax.inputs import captions
from tinyclip_jax.masks import MaskConfig, initial_masks, mask_spec, sparsity
from tinyclip_jax.model import Clip, ClipConfig, ImageConfig, TextConfig
from tinyclip_jax.pretrained import Pretrained
from tinyclip_jax.zoo import open_clip_model

TEACHER = ClipConfig(
    ImageConfig(size=16, patch=8, width=32, layers=2, heads=4, hidden=64),
    TextConfig(context=8, vocab=540, width=32, layers=2, heads=4, hidden=64),
    joint=16,
)
FAST = MaskConfig(prune_step=6, target=0.6, warmup=3, lr=1.5)


@pytest.fixture(scope="module")
def recipe(one_device, draw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    model, data = functional(Clip, TEACHER), SourceConfig("emoji:noto", split="test")
    tokenizer = Tokenizer.train(captions(open_source(data)), 540)
    Pretrained(TEACHER, model, draw(model.spec), Preprocess(16), tokenizer).save(folder)
    published = config.load("tinyclip/auto_45m_32")  # whose optimizer, precision and stages stay
    first, second = (replace(stage, student=replace(TEACHER, remat=stage.student.remat)) for stage in published.stages)
    return replace(
        published,
        student=first.student,
        teacher=str(folder),
        donor=str(folder),
        data=data,
        pipeline=PipelineConfig(batch=16),
        mesh=MeshConfig(),
        optim=replace(published.optim, lr=1e-3),
        log_every=1,
        eval_every=100,
        save_every=2,
        # Stages alike but for where they start, so that the step with masks is compiled once.
        stages=(replace(first, steps=10, masks=FAST), replace(second, steps=10, masks=FAST)),
    )


def lines(folder):
    return [
        {k: v for k, v in json.loads(line).items() if k != "timing"}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    recipe.train(folder)
    return folder


def test_masks_are_learned_then_cut_then_the_small_model_learns(whole):
    first = lines(whole / "stage_1")
    assert [line["step"] for line in first] == list(range(1, 11))
    wanted = [line["wanted"] for line in first[:6]]
    np.testing.assert_allclose(wanted, [0, 0.2, 0.4, 0.6, 0.6, 0.6], atol=1e-6)
    assert first[0]["sparsity"] < 0.02 < 0.1 < first[5]["sparsity"]
    # Linear over the whole phase whatever the warm-up; then from the full rate down, without a second one.
    np.testing.assert_allclose([line["lr"] for line in first[:6]], [1e-3 * n / 6 for n in range(1, 7)], rtol=1e-5)
    np.testing.assert_allclose(
        [line["lr"] for line in first[6:]], [5e-4 * (1 + np.cos(np.pi * n / 4)) for n in range(4)], rtol=1e-5
    )
    assert "sparsity" in first[5] and "sparsity" not in first[6]
    weights = open_safetensors(whole / "stage_1" / "model" / "model.safetensors").values()
    about = json.loads((whole / "stage_1" / "about.json").read_text())  # of the model after the cut
    assert about["student"]["parameters"]["total"] == sum(value.size for value in weights)


def test_each_stage_starts_from_the_model_of_the_one_before(whole, recipe):
    sizes = [parameters(open_clip_model(str(whole / f"stage_{n}" / "model")).source.spec)["total"] for n in (1, 2)]
    assert parameters(functional(Clip, TEACHER).spec)["total"] > sizes[0] > sizes[1]
    assert read_json(whole / "stage_2" / "config.json")["donor"] == str(whole / "stage_1" / "model")
    assert read_json(whole / "stage_2" / "config.json")["teacher"] == recipe.teacher
    # The first step of a stage knows what is gone already.
    masks = initial_masks(open_clip_model(str(whole / "stage_1" / "model")).cfg, TEACHER)
    gone = float(jax.jit(partial(sparsity, TEACHER))(masks))
    assert lines(whole / "stage_2")[0]["sparsity"] == pytest.approx(gone, abs=1e-5) and gone > 0.1


def test_killed_after_the_cut_it_goes_on_to_the_same_bits(recipe, whole, tmp_path):
    # What a kill after step 9 leaves: the state of step 8, a line too many, no model.
    left = tmp_path / "stage_1"
    shutil.copytree(whole / "stage_1", left, ignore=shutil.ignore_patterns("model", "10"))
    metrics = (left / "metrics.jsonl").read_text().splitlines(keepends=True)
    (left / "metrics.jsonl").write_text("".join(metrics[:9]))
    assert (
        Checkpoints(left / "checkpoints").latest() == 8 and (left / "pruned").exists() and not (left / "model").exists()
    )
    replace(recipe, stages=recipe.stages[:1]).train(tmp_path)
    assert lines(tmp_path / "stage_1") == lines(whole / "stage_1")
    ours, theirs = (open_safetensors(f / "stage_1" / "model" / "model.safetensors") for f in (tmp_path, whole))
    assert ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


def test_a_stage_runs_by_itself_when_the_one_before_is_there(recipe, whole, tmp_path):
    with pytest.raises(
        InputError, match=r"stage 2 starts from .*stage_1/model, which does not exist: run stage 1 first"
    ):
        replace(recipe, stage=2).train(tmp_path)
    with pytest.raises(InputError, match="stage is 3: choose 1 to 2"):
        replace(recipe, stage=3).train(tmp_path)
    replace(recipe, stage=2).train(whole)  # finished: exits at once


@pytest.mark.parametrize("flag", ["--steps", "--student.remat", "--masks.round_to", "--optim.warmup"])
def test_a_flag_that_every_stage_has_for_itself_is_refused(flag):
    with pytest.raises(
        InputError, match=rf"{flag} has no effect in this recipe: each stage has its own; set --stages\.0\.[a-z]+$"
    ):
        config.load("tinyclip/auto_63m_32", [flag, "none"])
    assert config.load("tinyclip/auto_63m_32", ["--stages.0.steps", "7"]).in_stage(1, "").steps == 7


def test_flags_of_masks_need_masks_and_have_their_own_layers():
    with pytest.raises(InputError, match=r"--masks\.target has no effect in .*no masks; set --masks\.prune_step"):
        config.load("tinyclip/emoji", ["--masks.target", "0.5"])
    masks = ["--masks.target", "0.5", "--masks.prune_step", "9"]
    assert config.load("tinyclip/emoji", masks).masks.target == 0.5
    with pytest.raises(InputError, match=r"--depth-rule has no effect in .*: learned masks choose the layers"):
        config.load("tinyclip/emoji", [*masks, "--depth-rule", "even"])


def test_masks_up_multipliers_down_and_the_clip_over_all(recipe):
    spec = {"image/cls": functional(Clip, TEACHER).spec["image/cls"]} | mask_spec(TEACHER)
    cfg = replace(recipe, masks=FAST, optim=OptimConfig(lr=1e-3, clip=1.0, weight_decay=0.0))
    params = {path: np.zeros(leaf.shape, np.float32) for path, leaf in spec.items()}
    gradients = {path: np.ones(leaf.shape, np.float32) for path, leaf in spec.items()}
    optimizer = mask_optimizer(cfg, spec)
    updates, state = jax.jit(lambda: optimizer.update(gradients, optimizer.init(params), params))()
    assert float(updates["masks/image/linear"]) == pytest.approx(1.5, rel=1e-3)  # Adam's first step: the rate, up
    np.testing.assert_allclose(updates["masks/text/head"], -1.5, rtol=1e-3)
    np.testing.assert_allclose(updates["image/cls"], -1e-3 / 6, rtol=1e-2)
    # Adam's first step ignores the size of gradients, its moments do not: a tenth of the clipped ones.
    moments = [
        moment for _, moments in optax.tree.get_all_with_path(state, "mu") for moment in jax.tree.leaves(moments)
    ]
    assert sum(m.size for m in moments) == sum(p.size for p in params.values())
    assert np.sqrt(sum(float((m**2).sum()) for m in moments)) == pytest.approx(0.1, rel=1e-4)


def test_what_cannot_be_pruned_is_said(recipe, tmp_path):
    auto = replace(recipe, stages=(), masks=FAST, steps=10)
    with pytest.raises(InputError, match="prunes with learned masks, which need training"):
        auto.inherit(tmp_path / "student")
    smaller = replace(TEACHER, image=replace(TEACHER.image, width=16, heads=2, hidden=32))
    with pytest.raises(InputError, match="the donor's 'embed' is 32, the student's 16"):
        replace(auto, student=smaller).train(tmp_path / "run")
    with pytest.raises(InputError, match=r"masks.prune_step is 10 of 10 steps"):
        replace(auto, masks=replace(FAST, prune_step=10)).train(tmp_path / "late")


def test_before_the_first_step_all_gates_are_open(recipe):
    """The student that masks are put on scores as its donor does."""
    auto = replace(recipe, stages=(), masks=FAST, held_out=recipe.data)
    donor = replace(auto, masks=MaskConfig())
    for ours, theirs in zip(auto.evaluate(), donor.evaluate(), strict=True):
        assert ours["metric"] == theirs["metric"] and ours["value"] == pytest.approx(theirs["value"], abs=1.0)
