"""ResNet towers: batch-norm statistics in the tree, inherited leading filters, and open_clip's layout."""

import json
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import save_file

from heirloom.common import config
from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.weights import open_safetensors
from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.sources import SourceConfig
from heirloom.common.data.text import Tokenizer
from heirloom.common.errors import InputError
from heirloom.common.mesh import MeshConfig
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.graft import graft
from heirloom.common.surgery.plan import Source
from heirloom.common.train.optim import OptimConfig, make_optimizer
from heirloom.common.train.state import create_state
from heirloom.common.train.step import STATISTICS, StepConfig, make_step
from tinyclip_jax.inherit import manual
from tinyclip_jax.model import Clip, ClipConfig, TextConfig
from tinyclip_jax.pretrained import Pretrained
from tinyclip_jax.resnet import ResNetConfig

TEXT = TextConfig(context=8, vocab=40, width=64, layers=2, heads=1, hidden=16)
TEACHER = ClipConfig(ResNetConfig(size=32, width=4, blocks=(1, 2, 1, 1), heads=2), TEXT, joint=12)
SHORT = replace(TEACHER, image=replace(TEACHER.image, blocks=(1, 1, 1, 1)), text=replace(TEXT, layers=1))
STUDENT = replace(TEACHER, image=replace(TEACHER.image, width=2, heads=1), text=replace(TEXT, layers=1))


@pytest.fixture(scope="module")
def teacher():
    model = functional(Clip, TEACHER)
    rng = np.random.default_rng(0)
    params = {path: rng.uniform(0.1, 0.9, leaf.shape).astype(np.float32) for path, leaf in model.spec.items()}
    return model, params


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    return {
        "image": rng.normal(size=(8, 32, 32, 3)).astype(np.float32),
        "text": rng.integers(0, 40, (8, 8)).astype(np.int32),
    }


def test_running_statistics_follow_the_batch_and_are_used_in_evaluation_only(batch):
    model = functional(Clip, SHORT)
    params = {
        path: np.random.default_rng(0).uniform(0.1, 0.9, leaf.shape).astype(np.float32)
        for path, leaf in model.spec.items()
    }
    # Without moments for the rest the step compiles faster; gradients and their norm are of all.
    held = ("text/**", "image/layer*/**", "image/pool/**")
    optimizer = make_optimizer(OptimConfig(lr=0.0, warmup=0, schedule="constant", frozen=held), model.spec, 10)
    names = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh((2, 1, 1), names, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:2])

    def loss(params, batch, key, frozen):
        features, statistics = model.train(params, batch["image"], batch["text"])
        return features.image[:, 0].sum() * 1e-3, {STATISTICS: statistics}

    step = make_step(loss, optimizer, model.spec, mesh, StepConfig())
    state, metrics = step(create_state(params, optimizer, model.spec, mesh), batch)
    conv = jax.lax.conv_general_dilated(
        batch["image"],
        params["image/conv1/kernel"],
        (2, 2),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    seen = np.asarray(conv, np.float64).reshape(-1, conv.shape[-1])  # of the whole batch, which two devices share
    np.testing.assert_allclose(
        state.params["image/bn1/mean"], 0.9 * params["image/bn1/mean"] + 0.1 * seen.mean(0), rtol=1e-4
    )
    expected = 0.9 * params["image/bn1/variance"] + 0.1 * seen.var(0, ddof=1)
    np.testing.assert_allclose(state.params["image/bn1/variance"], expected, rtol=1e-4)
    np.testing.assert_array_equal(state.params["image/conv1/kernel"], params["image/conv1/kernel"])
    assert float(metrics["grad_norm"][0]) < 1  # the distances of statistics, of hundreds here, are no gradient
    # nothing overflows
    small = {path: value * 0.05 if path.endswith("kernel") else value for path, value in params.items()}
    moved = small | {path: value for path, value in state.params.items() if path.endswith(("mean", "variance"))}
    evaluated = [jax.jit(partial(model.apply, method="encode_image"))(p, batch["image"]) for p in (small, moved)]
    assert np.isfinite(evaluated).all()
    assert np.abs(np.asarray(evaluated[0]) - np.asarray(evaluated[1])).max() > 1e-3


def test_a_student_takes_leading_filters_statistics_and_heads(teacher):
    model, params = teacher
    student = functional(Clip, STUDENT)
    plan = manual(TEACHER, STUDENT).resolve(Source(model.spec, params), student.spec)
    got = graft(plan, Source(model.spec, params), student.spec, None, partial(student.init, jax.random.key(0)))
    for path, leaf in student.spec.items():
        if path.startswith("image/"):
            np.testing.assert_array_equal(got[path], params[path][tuple(slice(n) for n in leaf.shape)], err_msg=path)
    assert got["image/layer2/0/bn3/variance"].shape == (16,) and got["image/pool/query/kernel"].shape == (64, 1, 64)
    total = sum(leaf.count for leaf in student.spec.values())
    assert sum(line.fraction * line.target.count for line in plan.lines) == total - 1  # all but the scale


def test_towers_of_two_kinds_inherit_nothing():
    vit = replace(TEACHER, image=ClipConfig().image)
    with pytest.raises(InputError, match="one image tower is a ResNet, the other a ViT"):
        manual(vit, TEACHER)
    with pytest.raises(
        InputError, match=r"have \(1, 1, 1, 1\) blocks, the donor's \(1, 2, 1, 1\): set student.image.blocks"
    ):
        manual(TEACHER, replace(TEACHER, image=replace(TEACHER.image, blocks=(1, 1, 1, 1))))
    for change, message in (
        ({"size": 48}, "48 px is no multiple of 32"),
        ({"heads": 3}, "3 heads do not divide the 128 channels"),
        ({"heads": 0}, "heads is 0: choose 1 or more"),
        ({"blocks": (1, 1, 1)}, "a ResNet has four stages"),
    ):
        with pytest.raises(InputError, match=message):
            functional(Clip, replace(TEACHER, image=replace(TEACHER.image, **change)))


def test_to_open_clips_names_and_back_bit_for_bit(teacher, families, tmp_path):
    _, params = teacher
    cfg = replace(TEACHER, image=replace(TEACHER.image))
    Pretrained(cfg, functional(Clip, cfg), params, Preprocess(32), None).save(tmp_path / "ours")
    convert(open_donor(tmp_path / "ours", families), tmp_path / "open", "open_clip", verify=False)
    tensors = open_safetensors(tmp_path / "open" / "open_clip_model.safetensors")
    assert tensors["visual.layer2.0.downsample.0.weight"].shape == (32, 16, 1, 1)
    assert tensors["visual.layer1.0.conv2.weight"].shape == (4, 4, 3, 3)
    np.testing.assert_array_equal(tensors["visual.bn1.running_var"], params["image/bn1/variance"])
    np.testing.assert_array_equal(tensors["visual.conv1.weight"], params["image/conv1/kernel"].transpose(3, 2, 0, 1))
    # Torch's batch norm counts batches, and its files hold the number.
    file = tmp_path / "open" / "open_clip_model.safetensors"
    save_file(
        {name: np.array(t) for name, t in tensors.items()} | {"visual.bn1.num_batches_tracked": np.int64([7])}, file
    )
    again = open_donor(tmp_path / "open", families)
    assert again.cfg == cfg
    for path, value in params.items():
        np.testing.assert_array_equal(np.asarray(again.source.values[path]), value, err_msg=path)


def drawn(spec):
    """Small parameters, without compiling an initialiser."""
    rng, params = np.random.default_rng(2), {}
    for path, leaf in spec.items():
        bound = leaf.extent("read") ** -0.5
        params[path] = rng.uniform(-bound, bound, leaf.shape) if path.endswith("kernel") else np.full(leaf.shape, 0.1)
    return {path: np.asarray(value, np.float32) for path, value in params.items()}


def test_recomputed_blocks_give_the_same_gradients_and_statistics(batch):
    cfg = SHORT
    params = drawn(functional(Clip, cfg).spec)

    def gradients(cfg):
        def loss(params):
            features, statistics = functional(Clip, cfg).train(params, batch["image"], batch["text"])
            return features.image[:, 0].sum(), statistics

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    (plain, moved), (recomputed, again) = gradients(cfg), gradients(replace(cfg, remat="full"))
    for path, expected in plain.items():
        np.testing.assert_allclose(recomputed[path], expected, rtol=1e-4, atol=1e-6, err_msg=path)
    assert moved.keys() == again.keys() == {path for path in params if path.endswith(("mean", "variance"))}
    for path, expected in moved.items():
        np.testing.assert_allclose(again[path], expected, rtol=1e-4, atol=1e-6, err_msg=path)
        assert not plain[path].any() and np.abs(expected - params[path]).max() > 1e-3, path


def test_a_published_recipe_trains_at_a_small_size(one_device, tmp_path):
    donor = replace(SHORT, text=replace(SHORT.text, vocab=540))
    student = replace(donor, image=replace(donor.image, width=2, heads=1))
    model, data = functional(Clip, donor), SourceConfig("emoji:noto", split="test")
    params = drawn(model.spec)
    Pretrained(donor, model, params, Preprocess(32), Tokenizer.train(["a cat", "a dog"], 540)).save(tmp_path / "donor")
    published = config.load("tinyclip/rn_30m")
    cfg = replace(
        published,
        student=replace(student, remat=published.student.remat),
        teacher=str(tmp_path / "donor"),
        donor=str(tmp_path / "donor"),
    )
    replace(
        cfg,
        data=data,
        pipeline=PipelineConfig(batch=8),
        mesh=MeshConfig(),
        optim=replace(cfg.optim, warmup=1),
        steps=2,
        log_every=1,
    ).train(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx([1e-4, 1e-4]) and all(line["affinity"] > 1 for line in lines)
    trained = open_safetensors(tmp_path / "run" / "model" / "model.safetensors")
    np.testing.assert_allclose(trained["image/conv1/kernel"], params["image/conv1/kernel"][..., :1], atol=3e-4)
    # the statistics follow the pictures, a tenth of the way each step
    assert np.abs(trained["image/bn1/mean"]).max() > 1e-3
