"""Labelled pictures of a diffusion model's training: order of classes, crops, held-out data."""

import json
import shutil
from dataclasses import replace
from typing import Any, cast

import jax
import numpy as np
import pytest
from PIL import Image

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.data import emoji
from heirloom.common.data.labelled import open_labelled, read_labels
from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.errors import InputError
from heirloom.common.mesh import start
from heirloom.common.nn.functional import functional
from heirloom.common.train.parts import Opened
from lit_jax import train
from lit_jax.autoencoder import AutoencoderConfig
from lit_jax.components import write_names
from lit_jax.data import Pixels, adm_crop
from lit_jax.dit import Dit, DitConfig
from lit_jax.latents import data_origin
from lit_jax.origin import Origin, write_origin
from lit_jax.progress import held_out_loss
from lit_jax.text_cache import write_text_cache
from lit_jax.zoo import FAMILY
from tests.lit_jax.conftest import GOLDEN


def test_names_of_classes_become_numbers_in_alphabetical_order():
    source = open_labelled(SourceConfig("emoji:noto", split="test"), "group", 9)
    groups = sorted(
        {
            "activities",
            "animals-nature",
            "flags",
            "food-drink",
            "objects",
            "people-body",
            "smileys-emotion",
            "symbols",
            "travel-places",
        }
    )
    assert source.classes == tuple(groups) and len(source) == 300 and emoji.STYLES[0] == "noto"
    record = source[7]
    assert groups[record["label"]] == record["group"]
    with pytest.raises(InputError, match=r"has 9 classes .* the model 10"):
        open_labelled(SourceConfig("emoji:noto"), "group", 10)
    with pytest.raises(InputError, match="no column 'grp'"):
        open_labelled(SourceConfig("emoji:noto"), "grp", 9)


def test_pixels_are_cropped_flipped_and_centred_on_zero():
    ramp = np.broadcast_to(np.arange(16, dtype=np.uint8)[None, :, None] * 16, (16, 16, 3)).copy()
    plain = Pixels(16, flips=0.0)({"image": ramp, "label": 3}, np.random.default_rng(0))
    np.testing.assert_allclose(plain["image"][0, :, 0], np.arange(16) * 16 / 127.5 - 1, atol=1e-6)
    assert plain["label"] == 3 and plain["label"].dtype == np.int32
    mirrored = Pixels(16, flips=1.0)({"image": ramp, "label": 3}, np.random.default_rng(0))
    np.testing.assert_array_equal(mirrored["image"], plain["image"][:, ::-1])
    rng = np.random.default_rng(1)
    share = np.mean([Pixels(16, flips=0.5)({"image": ramp, "label": 0}, rng)["image"][0, 0, 0] > 0 for _ in range(300)])
    assert 0.4 < share < 0.6


def test_the_crop_of_guided_diffusion():
    """Halved by boxes while the short side is twice the size, then bicubic: by its steps, in PIL's own words."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 130, 3)).astype(np.uint8))
    by_hand = picture.resize((65, 37), Image.Resampling.BOX).resize((32, 18), Image.Resampling.BOX)
    by_hand = by_hand.resize((round(32 * 16 / 18), 16), Image.Resampling.BICUBIC)
    left = (by_hand.width - 16) // 2
    np.testing.assert_array_equal(adm_crop(picture, 16), np.asarray(by_hand)[:, left : left + 16])
    assert adm_crop(picture, 16).shape == (16, 16, 3) and jax.device_count() >= 1


@pytest.fixture
def pictures(tmp_path):
    """Two classes, whose pictures are black and white."""
    for value, name in ((0, "cat"), (255, "dog")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / "pictures" / name / f"{i}.png")
    return SourceConfig(str(tmp_path / "pictures"))


@pytest.mark.parametrize("names", [("dog", "cat"), None])
def test_classes_are_numbered_as_the_donors(pictures, tmp_path, remarks, names):
    root = tmp_path / "pipeline"
    shutil.copytree(GOLDEN, root / "transformer")
    donor = open_donor(root / "transformer", [FAMILY])
    donor = replace(donor, cfg=replace(donor.cfg, classes=2, channels=3))
    index = {"_class_name": "DiTPipeline"} | ({"id2label": dict(enumerate(names))} if names else {})
    (root / "model_index.json").write_text(json.dumps(index))
    cfg = train.Config(student=donor.cfg, data=pictures, held_out=pictures, pipeline=PipelineConfig(batch=8))
    batch = next(train.batches(cfg, Opened(mesh=start(), donor=donor, teacher=None)))
    white = np.asarray(batch["image"])[:, 0, 0, 0] > 0
    np.testing.assert_array_equal(white, np.asarray(batch["label"]) == (0 if names else 1))
    assert any("in alphabetical order, which is taken for the donor's" in said for said in remarks()) == (names is None)


def cached(folder, names, labels):
    """A latent cache in which a picture's moments say its label."""
    folder.mkdir()
    moments = np.broadcast_to(np.float16(labels)[:, None, None, None, None], (len(labels), 2, 8, 8, 8))
    np.save(folder / "moments.npy", moments)
    np.save(folder / "label.npy", np.asarray(labels, np.int32))
    write_origin(folder, Origin(AutoencoderConfig()))
    write_names(folder, names)
    return SourceConfig(str(folder), image="", text="", columns=("moments", "label"))


def test_labels_of_latents_are_matched_by_name(tmp_path, remarks):
    """To the classes of the donor, and those of held-out latents to the training's; else nothing would say so."""
    folder = tmp_path / "donor"
    shutil.copytree(GOLDEN, folder)
    write_names(folder, ("dog", "bee", "cat"))
    donor = open_donor(folder, [FAMILY])
    donor = replace(donor, cfg=replace(donor.cfg, size=8, channels=4, classes=3))
    data = cached(tmp_path / "train", ("bee", "cat", "dog"), [0, 0, 1, 1, 2, 2, 2, 2])
    held_out = cached(tmp_path / "val", ("cat", "dog"), [0, 1])
    cfg = train.Config(student=donor.cfg, data=data, held_out=held_out, pipeline=PipelineConfig(batch=8))
    opened = Opened(mesh=start(), donor=donor, teacher=None, inputs=data_origin(data, held_out))
    batch = next(train.batches(cfg, opened))
    stored = np.asarray(batch["moments"])[:, 0, 0, 0, 0].astype(int)
    np.testing.assert_array_equal(np.array([1, 2, 0])[stored], batch["label"])
    names = train.labelled(cfg, opened).classes
    assert names == ("dog", "bee", "cat")
    source = open_labelled(held_out, "label", 3, names)
    assert [source[i]["label"] for i in range(2)] == [2, 0]
    with pytest.raises(InputError, match=r"val has 2 classes \(cat, dog\), the model 3"):
        train.labelled(replace(cfg, data=held_out), replace(opened, donor=None))
    train.sidecars(cfg, opened, tmp_path)  # the student keeps the names
    assert read_labels(tmp_path) == names
    bare = cached(tmp_path / "bare", None, [0, 1])
    train.labelled(replace(cfg, data=bare), opened)
    assert any("bare: a cache without labels.json, so its numbers are taken" in said for said in remarks())


def test_pictures_of_a_latent_model_are_to_be_cached(pictures):
    """Three channels are the latents of some autoencoders, and fit the student."""
    student = DitConfig(size=8, channels=3, width=16, layers=1, heads=2, hidden=16, classes=2)
    cfg = train.Config(student=student, data=pictures, autoencoder="kl-f4", pipeline=PipelineConfig(batch=8))
    with pytest.raises(InputError, match="these are pictures, and autoencoder is set: cache their latents first"):
        train.batches(cfg, Opened(mesh=start(), donor=None, teacher=None))
    recipe = replace(cfg, data=replace(pictures, image="", text="", columns=("moments", "label")))  # as published ones
    with pytest.raises(InputError, match="pictures is no cache of latents, which this recipe reads: cache the latents"):
        train.batches(recipe, Opened(mesh=start(), donor=None, teacher=None))
    with pytest.raises(InputError, match="pictures is no cache of latents"):
        held_out_loss(replace(cfg, held_out=recipe.data), functional(Dit, student), start())


def test_held_out_data_of_another_shape_is_refused_at_the_start(pictures):
    student = DitConfig(size=8, channels=4, width=16, layers=1, heads=2, hidden=16, classes=2)
    cfg, mesh = train.Config(student=student, held_out=pictures), start()
    with pytest.raises(InputError, match=r"the held-out data is \[8, 8, 3\], the student takes \[8, 8, 4\]"):
        held_out_loss(cfg, functional(Dit, student), mesh)
    student = replace(student, channels=3)
    assert held_out_loss(replace(cfg, student=student), functional(Dit, student), mesh) is not None


@pytest.mark.parametrize(
    ("table", "needed"),
    [
        ("metadata.csv", r"--data\.path .*/d/train/metadata\.csv --data\.image file_name --data\.text text takes"),
        ("metadata.jsonl", r"put a \.txt next to each picture.* \(metadata\.jsonl is not read\)"),
    ],
)
def test_pictures_with_captions_in_a_table_next_to_them_are_not_cached_without(table, needed, tmp_path):
    (tmp_path / "d" / "train").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "d" / "train" / "0.png")
    (tmp_path / "d" / "train" / table).write_text("file_name,text\n0.png,a cat\n")
    data, nothing = SourceConfig(str(tmp_path / "d"), split="train"), cast(Any, None)
    with pytest.raises(InputError, match=f"pictures without captions: {needed}"):
        write_text_cache(tmp_path / "cache", data, [(8, 8)], nothing, "", nothing, "", nothing)
    assert not (tmp_path / "cache").exists()
