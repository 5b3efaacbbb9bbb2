"""Teacher embeddings stored once teach what the live teacher teaches."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from heirloom.common import config
from heirloom.common.cli import main
from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.data.text import Tokenizer
from heirloom.common.errors import InputError
from tinyclip_jax.cache import Cached
from tinyclip_jax.inputs import read_inputs
from tinyclip_jax.zoo import open_clip_model


@pytest.fixture(scope="module")
def recipe(one_device):
    cfg = config.load("tinyclip/emoji")
    small = replace(
        cfg,
        data=SourceConfig("emoji:noto", split="test"),
        held_out=SourceConfig(),
        augment="none",
        steps=3,
        log_every=1,
        optim=replace(cfg.optim, warmup=1),
    )
    return replace(
        small,
        student=replace(cfg.student, image=replace(cfg.student.image, layers=1)),
        pipeline=replace(cfg.pipeline, batch=16),
    )


@pytest.fixture(scope="module")
def stored(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "cache"
    recipe.cache(folder)
    return folder


def losses(cfg, folder):
    cfg.train(folder)
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_is_that_of_the_live_teacher(recipe, stored, tmp_path):
    live, cached = (
        losses(recipe, tmp_path / "live"),
        losses(replace(recipe, teacher=f"cache:{stored}"), tmp_path / "cached"),
    )
    np.testing.assert_allclose(cached, live, rtol=1e-5)
    assert len(set(live)) == 3


def test_a_recipe_without_donor_finds_the_inputs_beside_the_cache(recipe, stored):
    cfg = replace(recipe, teacher=f"cache:{stored}", donor="")
    inputs, theirs = read_inputs(cfg, None, None), open_clip_model(recipe.teacher)
    assert inputs.tokenizer.vocab_size <= theirs.cfg.text.vocab and inputs.pre.size == theirs.cfg.image.size


def test_a_cache_of_something_else_is_refused(recipe, stored, tmp_path):
    cached = replace(recipe, teacher=f"cache:{stored}")
    with pytest.raises(
        InputError, match=r"was made with path 'emoji:noto', here it is 'emoji:fluent': make another cache"
    ):
        replace(cached, data=SourceConfig("emoji:fluent", split="test")).train(tmp_path / "fluent")
    with pytest.raises(InputError, match=r"was made with text 'caption', here it is 'tags'"):
        replace(cached, data=replace(recipe.data, text="tags")).train(tmp_path / "column")
    with pytest.raises(
        InputError, match='augment is "random", and stored embeddings belong to centre crops: set augment to "none"'
    ):
        replace(cached, augment="random").train(tmp_path / "random")
    with pytest.raises(InputError, match="is not a cache of embeddings"):
        inputs = read_inputs(recipe, open_clip_model(recipe.donor), None)
        Cached(open_source(recipe.data), tmp_path, recipe.data, inputs.pre, inputs.tokenizer)
    with pytest.raises(InputError, match="exists; give another name"):
        recipe.cache(stored)
    with pytest.raises(InputError, match=r'set pipeline.tags to 0, or augment to "random"'):
        replace(cached, pipeline=replace(cached.pipeline, tags=0.5)).train(tmp_path / "tags")


def test_data_that_was_moved_is_the_same_data(recipe, tmp_path, one_device):
    rng = np.random.default_rng(0)
    for i in range(3):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(tmp_path / "data" / f"{i}.png")
        (tmp_path / "data" / f"{i}.txt").write_text(f"caption {i}")
    cfg = replace(recipe, data=SourceConfig(f"{tmp_path / 'data'}/"))
    cfg.cache(tmp_path / "cache")
    inputs = read_inputs(recipe, open_clip_model(recipe.donor), None)
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = replace(recipe, data=SourceConfig(str(tmp_path / "moved")))
    assert len(opened(moved, tmp_path / "cache", inputs.tokenizer, inputs.pre)) == 3
    Image.new("RGB", (9, 9)).save(tmp_path / "moved" / "1.png")  # as if made anew in another size
    with pytest.raises(InputError, match=r"cache was made with path '.*data/', here it is '.*moved'"):
        opened(moved, tmp_path / "cache", inputs.tokenizer, inputs.pre)


def opened(recipe, folder, tokenizer, pre):
    return Cached(open_source(recipe.data), folder, recipe.data, pre, tokenizer)


def test_a_student_may_read_captions_and_pictures_in_another_way_than_the_teacher(recipe, stored, tmp_path, remarks):
    inputs = read_inputs(recipe, open_clip_model(recipe.donor), None)
    opened(recipe, stored, inputs.tokenizer, inputs.pre)
    assert not remarks()
    other = Tokenizer.train(["words of another kind"] * 3, 540)
    opened(recipe, stored, other, replace(inputs.pre, mode="squash"))
    what = "the teacher had another preprocessing or tokenizer than the student (mode, tokenizer)"
    assert remarks() == [f"{stored}: {what}"]
    old = tmp_path / "old"  # of a version that stored no hash of the captions
    shutil.copytree(stored, old)
    about = json.loads((old / "cache.json").read_text())
    del about["captions"]
    (old / "cache.json").write_text(json.dumps(about))
    opened(recipe, old, inputs.tokenizer, inputs.pre)
    with pytest.raises(InputError, match=r"was made with tokens '\w{16}'"):
        opened(recipe, old, other, inputs.pre)
    (old / "cache.json").write_text(json.dumps(about | {"captions": "of other data"}))
    with pytest.raises(InputError, match="was made with captions 'of other data'"):
        opened(recipe, old, inputs.tokenizer, inputs.pre)


def test_the_command_says_what_it_needs(capsys, tmp_path):
    assert main(["cache", "tinyclip/smoke", str(tmp_path / "cache")]) == 2
    assert "has no live teacher" in capsys.readouterr().err
    assert main(["cache", "learngene/smoke", str(tmp_path / "cache")]) == 2
    assert "learngene/smoke: this recipe has no heirloom cache; it has heirloom train," in capsys.readouterr().err


def test_data_without_captions_or_pictures_is_refused_in_one_line(recipe, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    data = SourceConfig(str(tmp_path))
    with pytest.raises(InputError, match=r"0\.png has no caption; name its column with text, or add captions"):
        replace(recipe, data=data).cache(tmp_path / "cache")
    with pytest.raises(InputError, match=r"0\.png has no caption; name its column with text, or add captions"):
        read_inputs(replace(recipe, data=data, tokenizer="fit"), None, None)
    with pytest.raises(InputError, match=r"emoji:noto has no pictures: name their column with data\.image"):
        replace(recipe, data=replace(recipe.data, image="")).cache(tmp_path / "cache")
