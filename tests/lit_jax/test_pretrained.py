"""The door for notebooks: a DiT that draws, and an autoencoder there and back."""

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import lit_jax
from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.convert import convert, describe, open_donor
from heirloom.common.cli import main
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from lit_jax import generate
from lit_jax.autoencoder import AutoencoderConfig
from lit_jax.components import class_names, is_foreign, pipeline_of
from lit_jax.decode import autoencoder_example
from lit_jax.dit import Dit
from lit_jax.origin import Origin, read_origin, write_origin
from lit_jax.zoo import FAMILY

AUTOENCODER = Path(__file__).parents[1] / "golden" / "autoencoder"
FAST = dict(sampler="ddim", steps=2)


@pytest.fixture(scope="module")
def folder(lit, draw, one_device, tmp_path_factory):
    path = tmp_path_factory.mktemp("lit")
    weights.write_params(path, draw(functional(Dit, lit).spec))
    weights.write_config(path, "lit", lit)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return lit_jax.load(str(folder))


def test_pictures_do_not_depend_on_their_company(loaded):
    many = loaded.sample([3, 1], count=3, seed=5, batch=4, **FAST)
    assert many.shape == (6, 8, 8, 3) and many.dtype == np.uint8
    few = loaded.sample(1, count=2, seed=5, **FAST)
    assert np.abs(few.astype(int) - many[3:5]).max() <= 1  # rounding may differ where sums have another order
    assert np.abs(few.astype(int) - loaded.sample(1, count=2, seed=6, **FAST)).max() > 20


def test_the_command_draws_the_same(loaded, folder, tmp_path):
    from PIL import Image

    out = tmp_path / "grid.png"
    how = ["--steps", "2", "--sampler", "ddim", "--seed", "5"]
    assert main(["sample", str(folder), "--class", "1", "--count", "1", "--out", str(out), *how]) == 0
    picture = np.asarray(Image.open(out))[::32, ::32]  # enlarged 32 times
    assert np.abs(picture.astype(int) - loaded.sample(1, seed=5, **FAST)[0]).max() <= 1


def test_what_is_saved_can_be_loaded(loaded, tmp_path):
    origin = Origin(lit_jax.load(str(AUTOENCODER)).cfg, "somewhere", "1" * 64)
    write_origin(tmp_path, origin)
    lit_jax.Pretrained(loaded.cfg, loaded.model, loaded.params, loaded.mesh, None, origin).save(tmp_path / "out")
    again = lit_jax.load(str(tmp_path / "out"))
    assert again.cfg == loaded.cfg and again.origin == read_origin(tmp_path / "out") == origin
    for path, value in loaded.params.items():
        np.testing.assert_array_equal(again.params[path], value)
    with pytest.raises(InputError, match=r"outputs latents: decode them with load\(SOURCE, .*\), such as somewhere$"):
        again.sample(0, **FAST)
    assert autoencoder_example(4, None) == ", such as hf:stabilityai/sd-vae-ft-ema"
    others = (16, None), (4, Origin(AutoencoderConfig(scaling_factor=0.13025)))
    assert {autoencoder_example(*other) for other in others} == {""}


def test_a_saved_copy_keeps_where_it_came_from(golden, tmp_path, one_device, remarks):
    """That it is foreign, its pipeline with the decoder, and its class names."""
    root = tmp_path / "pipeline"
    shutil.copytree(golden[0], root / "transformer")
    classes = open_donor(golden[0], [FAMILY]).cfg.classes
    names = {str(i): f"name {i}" for i in range(classes)}
    (root / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "id2label": names}))
    for format in ("diffusers", "heirloom"):
        if format == "heirloom":
            convert(open_donor(root / "transformer", [FAMILY]), tmp_path / "ours", "heirloom", verify=False)
        source = root / "transformer" if format == "diffusers" else tmp_path / "ours"
        lit_jax.load(str(source)).save(tmp_path / format)
        copy = open_donor(tmp_path / format, [FAMILY])
        assert is_foreign(copy) and pipeline_of(copy) == root.resolve() and class_names(copy) == tuple(names.values())
    own = lit_jax.load(str(AUTOENCODER))
    own.save(tmp_path / "autoencoder")
    assert describe(tmp_path / "autoencoder")["first_format"] == "diffusers"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (dict(classes=6), "no class 6: this model has 0 to 4, and 5 for no class"),
        (dict(classes=[0], stps=3), "no setting 'stps'; did you mean 'steps'"),
        (dict(classes=[0], sampler="euler"), "no sampler 'euler'; choose ddpm, ddim, dpm"),
        (dict(classes=[0], guidance=float("inf")), "guidance is inf"),
        (dict(classes=[0], count=0), "count is 0: choose a whole number, 1 or more"),
        (dict(classes=[0], count=1.5), "count is 1.5: choose a whole number"),
        (dict(classes=[0], batch="2"), "batch is '2': choose a whole number"),
        (dict(classes=[]), "no class is given"),
        (dict(classes=1.7), "classes is '1.7': give the number of a class, or a list of numbers"),
        (dict(classes="cat"), "classes is 'cat': give the number"),
        (dict(classes=[[0, 1]]), r"classes is '\[\[0, 1\]\]': give the number"),
        (dict(classes=True), "classes is 'True': give the number"),
        (dict(classes=0, guidance="4"), "guidance is '4': give a number"),
        (dict(classes=0, steps=2.5), "--steps 2.5 with ddpm: choose between 1 and 1000"),
        (dict(classes=0, seed=1.5), "seed 1.5: choose a whole number from 0"),
    ],
)
def test_mistakes_are_one_line(loaded, how, words):
    with pytest.raises(InputError, match=words):
        loaded.sample(how.pop("classes"), **how)


def test_an_autoencoder_comes_through_the_same_door(one_device):
    loaded = lit_jax.load(str(AUTOENCODER))
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3)).astype(np.uint8)
    latents = loaded.encode(images)
    means = jax.jit(partial(loaded.model.apply, method="encode"))(
        loaded.params, images.astype(np.float32) / 127.5 - 1
    ).mean
    np.testing.assert_allclose(latents, means * loaded.cfg.scaling_factor, rtol=1e-6)
    decoded = loaded.decode(latents)
    pixels = jax.jit(partial(loaded.model.apply, method="decode"))(loaded.params, means)
    want = np.clip(127.5 * np.asarray(pixels) + 128, 0, 255).astype(int)
    assert decoded.shape == (2, 8, 12, 3) and np.abs(decoded - want).max() <= 1
    with pytest.raises(InputError, match=r"uint8 \[n, height, width, 3\], .* float32"):
        loaded.encode(images.astype(np.float32))
    with pytest.raises(InputError, match=r"\[n, row, col, 4\], .* \[2, 2, 3, 3\]"):
        loaded.decode(np.zeros((2, 2, 3, 3)))


def test_an_autoencoder_of_other_latents_is_refused(folder):
    with pytest.raises(InputError, match="has latents of 4 channels, the model 3"):
        lit_jax.load(str(folder), autoencoder=str(AUTOENCODER))


@pytest.mark.parametrize("flags", [("--negative", "a cat"), ("--size", "64"), ("--text", "resident")])
def test_flags_of_prompts_are_refused_where_classes_are_drawn(folder, capsys, flags):
    assert main(["sample", str(folder), *flags]) == 2
    assert f"draws classes, and {flags[0]} is for models that draw from text: leave it out" in capsys.readouterr().err


def test_classes_are_drawn_so_many_at_a_time(folder, tmp_path, monkeypatch):
    def drawn(*args):
        batches.append(args[5])
        return [np.zeros((1, 8, 8, 3), np.uint8)]

    batches, how = [], ["--class", "0", "--count", "1", "--out", str(tmp_path / "x.png")]
    monkeypatch.setattr(generate, "draw_batches", drawn)
    for flags in ([], ["--batch", "2"]):
        assert main(["sample", str(folder), *how, *flags]) == 0
    assert batches == [generate.BATCH, 2]


def test_pictures_of_classes_are_pil_images(folder):
    lit = lit_jax.load(str(folder))
    how = dict(count=2, steps=2, sampler="dpm", guidance=1.0)
    drawn = lit.draw([1, 0], **how)
    np.testing.assert_array_equal(np.stack([np.asarray(picture) for picture in drawn]), lit.sample([1, 0], **how))
