"""The verbs of tinyclip_jax in Python."""

from dataclasses import replace

import numpy as np
import pytest

import tinyclip_jax
from heirloom.common import config
from heirloom.common.errors import InputError
from heirloom.common.files import read_json
from tinyclip_jax import pretrained
from tinyclip_jax.model import ImageConfig
from tinyclip_jax.resnet import ResNetConfig
from tinyclip_jax.vit import VitImageConfig
from tinyclip_jax.zoo import STUDENTS, student


@pytest.fixture(scope="module")
def teacher(one_device):
    return tinyclip_jax.load("embedded:emoji")


def test_students_have_names():
    assert student("vit_39m_16") is STUDENTS["vit_39m_16"]
    assert student("tinyclip/emoji") == config.load("tinyclip/emoji").student
    with pytest.raises(InputError, match=r"no student 'vit_39m'; did you mean 'vit_39m_16'"):
        student("vit_39m")
    with pytest.raises(InputError, match=r"the student of lit/digits is no CLIP"):
        student("lit/digits")


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (ImageConfig(patch=16), "224 px, patch 16, 12 layers of width 768"),
        (VitImageConfig(projection="affine", pool="norm_cls"), "224 px, patch 16, 12 layers of width 384"),
        (ResNetConfig(), "224 px, ResNet of width 64"),
    ],
)
def test_the_repr_names_every_kind_of_image_tower(teacher, image, says):
    assert replace(teacher, cfg=replace(teacher.cfg, image=image))._about()["image"] == says


def test_a_student_by_name_knows_where_it_comes_from(teacher, tmp_path, capsys):
    made = tinyclip_jax.inherit_from(teacher, "tinyclip/emoji")
    assert repr(teacher).splitlines()[0] == "tinyclip: 6.32 M parameters, 125 M multiply-adds"
    assert repr(made).splitlines()[:3] == [
        "tinyclip: 3.41 M parameters, 58.1 M multiply-adds",
        "  parameters: image 1.68 M, text 942 k, token table 786 k",
        "  inherited: 100.0% of the parameters, from embedded:emoji",
    ]
    assert len(repr(made).splitlines()) <= 6
    line = made.provenance["parameters"]["text/blocks/attn/query/kernel"]
    assert line["fraction"] == 1 and line["maps"] == "layer: rows 0 2, embed: first 192, head: first 3"
    query = teacher.params["text/blocks/attn/query/kernel"]
    np.testing.assert_array_equal(made.params["text/blocks/attn/query/kernel"], query[::2, :192, :3])
    made.save(tmp_path / "student")
    assert read_json(tmp_path / "student" / "provenance.json")["fraction"] == made.provenance["fraction"] > 0.99
    made.summary()
    shown = capsys.readouterr().out
    assert shown.startswith("3,406,977 parameters") and "inherited 100.0% from embedded:emoji" in shown


def test_similarity_is_that_of_the_features(teacher):
    pictures = [np.full((20, 30, 3), value, np.uint8) for value in (0, 200)]
    captions = ["black", "white", "grey"]
    both = teacher.similarity(pictures, captions)
    assert isinstance(both, np.ndarray) and both.shape == (2, 3)
    features = np.asarray(teacher.encode_image(pictures)) @ np.asarray(teacher.encode_text(captions)).T
    np.testing.assert_allclose(both, features, atol=1e-6)


def test_many_inputs_are_encoded_in_batches_of_few_sizes(teacher, monkeypatch):
    teacher = replace(teacher)  # without compiled programs
    pictures = [np.full((20, 30, 3), 40 * i, np.uint8) for i in range(5)]
    captions = [f"a picture of {i}" for i in range(5)]
    alone = [np.concatenate([encode(x) for x in given]) for encode, given in _both(teacher, pictures, captions)]
    monkeypatch.setattr(pretrained, "BATCH", 2)
    for (encode, given), expected in zip(_both(teacher, pictures, captions), alone, strict=True):
        for count in (5, 4, 3, 1):
            np.testing.assert_allclose(encode(given[:count]), expected[:count], atol=1e-5)
    assert teacher._image._cache_size() == teacher._text._cache_size() == 2


def _both(model, pictures, captions):
    return (model.encode_image, pictures), (model.encode_text, captions)


def test_scores_are_those_of_the_command(teacher):
    """The embedded teacher has 7.7 % R@1 on held-out emoji (docs/results-tinyclip.md)."""
    scores = tinyclip_jax.evaluate(teacher)
    assert scores["r1"] == pytest.approx(0.077, abs=0.002) and 0 < scores["image_to_text_r1"] < 1
    with pytest.raises(InputError, match="no task 'zero_shot'; did you mean 'zeroshot'"):
        tinyclip_jax.evaluate(teacher, task="zero_shot")


@pytest.mark.slow
def test_a_training_gives_a_run_and_the_same_call_resumes_it(one_device, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = dict(steps=2, log_every=1, save_every=1, optim={"warmup": 1}, pipeline={"batch": 8})
    run = tinyclip_jax.train("tinyclip/smoke", held_out={"path": ""}, **short)
    assert str(run.folder) == "runs/tinyclip-smoke" and run.curve()[0].tolist() == [1, 2] and not run.unfinished
    assert run.model.cfg == config.load("tinyclip/smoke").student and run.first_batch.size[0] > 16
    again = tinyclip_jax.train("tinyclip/smoke", "runs/tinyclip-smoke", held_out={"path": ""}, **short)
    assert again.metrics == run.metrics
    with pytest.raises(InputError, match="was started with another config"):
        tinyclip_jax.train("tinyclip/smoke", "runs/tinyclip-smoke", held_out={"path": ""}, **short | {"seed": 1})
