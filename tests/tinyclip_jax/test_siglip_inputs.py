"""A SigLIP with its own tokenizer: loaded, evaluated, stored as a teacher of a CLIP, inherited from."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_tokenizers import metaclip2, siglip, siglip2

import tinyclip_jax
from heirloom.common import config
from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.convert import convert
from heirloom.common.cli import main
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.data.text import Tokenizer
from heirloom.common.data.tokenizer_files import load_tokenizer
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from tinyclip_jax.inputs import HALF, check_tokenizer, preprocess_of, read_inputs, tokenizer_of
from tinyclip_jax.model import Clip, ClipConfig, ImageConfig, TextConfig
from tinyclip_jax.vit import VitImageConfig
from tinyclip_jax.zoo import open_clip_model

SIZES = dict(width=32, layers=1, heads=2, hidden=40, activation="gelu_tanh")
IMAGE = VitImageConfig(size=16, patch=8, tokens="none", pool="map", projection="none", **SIZES)
TEXT = TextConfig(context=12, vocab=60, pool="last", causal=False, projection="affine", **SIZES)
SIGLIP = ClipConfig(IMAGE, TEXT, joint=32, logit_bias=True)
STUDENT = ClipConfig(
    ImageConfig(size=16, patch=8, width=16, layers=1, heads=2, hidden=16),
    TextConfig(context=16, vocab=600, width=16, layers=1, heads=2, hidden=16),
    joint=16,
)


@pytest.fixture(scope="module")
def folder(draw, tmp_path_factory):
    """A folder of transformers with a SigLIP's weights and its spiece.model."""
    root = tmp_path_factory.mktemp("siglip")
    (root / "ours").mkdir()
    spec = functional(Clip, SIGLIP).spec
    weights.write_params(root / "ours", draw(spec), spec=spec)
    weights.write_config(root / "ours", "tinyclip", SIGLIP)
    convert(open_clip_model(str(root / "ours")), root / "hf", "hf", verify=False)
    return siglip(root / "hf")


@pytest.fixture(scope="module")
def recipe(folder, one_device, tmp_path_factory):
    """A CLIP that learns from the SigLIP, with its own tokenizer."""
    words = tmp_path_factory.mktemp("words")
    Tokenizer.train(["a red apple", "a hot air balloon"], 540).save(words)
    cfg = config.load("tinyclip/emoji")
    small = dict(data=SourceConfig("emoji:noto", split="test"), held_out=SourceConfig(), augment="none", steps=2)
    small |= dict(log_every=1, optim=replace(cfg.optim, warmup=1), pipeline=replace(cfg.pipeline, batch=16))
    return replace(cfg, student=STUDENT, donor="", teacher=str(folder), tokenizer=str(words), **small)


def test_siglips_preprocessing_is_assumed_for_timms_tower_alone(folder, draw, tmp_path):
    """A CLIP that open_clip trains with the sigmoid loss has a bias too, and CLIP's mean."""
    found = preprocess_of(open_clip_model(str(folder.parent / "ours")))
    assert found.pre == Preprocess(16, mean=HALF, std=HALF, mode="squash")
    cfg = replace(STUDENT, logit_bias=True)
    (tmp_path / "ours").mkdir()
    spec = functional(Clip, cfg).spec
    weights.write_params(tmp_path / "ours", draw(spec), spec=spec)
    weights.write_config(tmp_path / "ours", "tinyclip", cfg)
    assert preprocess_of(open_clip_model(str(tmp_path / "ours"))).pre == Preprocess(16)


def test_it_is_loaded_with_its_tokenizer_and_saved_with_the_same_ids(folder, one_device, tmp_path, remarks):
    clip = tinyclip_jax.load(folder)
    assert not [line for line in remarks() if line.startswith("tokenizer")]
    assert (clip.tokenizer.pad, clip.tokenizer.eot) == (1, 1)
    texts = ["A Photo: a CAT!", "a photo a cat", "a dog", ""]
    features = np.asarray(clip.encode_text(texts))
    np.testing.assert_array_equal(features[0], features[1])  # capitals and punctuation are not seen
    assert np.abs(features[0] - features[2]).max() > 1e-3
    clip.save(tmp_path / "saved")
    np.testing.assert_array_equal(tinyclip_jax.load(tmp_path / "saved").encode_text(texts), features)
    convert(open_clip_model(str(tmp_path / "saved")), tmp_path / "back", "hf", verify=False)
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())["pad_token"] == "</s>"
    np.testing.assert_array_equal(tinyclip_jax.load(tmp_path / "back").encode_text(texts), features)


def test_it_is_evaluated(folder, one_device, tmp_path, capsys):
    assert main(["eval", str(folder), "--data", "emoji:noto", "--json", str(tmp_path / "scores.json")]) == 0
    said = capsys.readouterr()
    assert "r1" in said.out and "tokenizer" not in said.err


def test_a_clip_learns_from_its_stored_embeddings(recipe, folder, tmp_path, remarks):
    with pytest.raises(InputError, match=r"a different tokenizer from the student's: store its embeddings"):
        read_inputs(recipe, None, open_clip_model(str(folder)))
    recipe.cache(tmp_path / "cache")
    theirs = tinyclip_jax.load(folder)
    source = [record["text"] for record in map(open_source(recipe.data).__getitem__, range(3))]
    first = [text if isinstance(text, str) else text[0] for text in source]
    stored = np.load(tmp_path / "cache" / "teacher_text.npy")
    np.testing.assert_allclose(stored[:3], theirs.encode_text(first), atol=1e-5)
    remarks()
    replace(recipe, teacher=f"cache:{tmp_path / 'cache'}").train(tmp_path / "run")
    assert any("another preprocessing or tokenizer than the student (tokenizer)" in line for line in remarks())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and np.isfinite(losses).all()


def test_a_student_takes_the_tokenizer_of_its_donor(recipe, folder):
    cfg = replace(recipe, student=SIGLIP, donor=str(folder), tokenizer="")
    donor = open_clip_model(str(folder))
    assert read_inputs(cfg, donor, donor).tokenizer.pad == 1  # the teacher has the same
    with pytest.raises(InputError, match=r"^student\.text: the tokenizer has 52 ids, text\.vocab is 40"):
        read_inputs(replace(cfg, student=replace(SIGLIP, text=replace(TEXT, vocab=40))), donor, None)


def test_a_live_teacher_that_normalises_otherwise_is_refused(recipe, folder, tmp_path):
    cfg, other = replace(recipe, student=SIGLIP, donor=str(folder), tokenizer=""), tmp_path / "other"
    shutil.copytree(folder, other)
    Preprocess(16).save(other)  # CLIP's mean, and the donor's pictures have SigLIP's
    with pytest.raises(InputError, match=r"the teacher .*other normalises pictures otherwise .*: store its embeddings"):
        read_inputs(cfg, open_clip_model(str(folder)), open_clip_model(str(other)))
    Preprocess(16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.501)).save(other)
    read_inputs(cfg, open_clip_model(str(folder)), open_clip_model(str(other)))


def test_the_tower_must_have_every_id_and_pool_at_the_end(tmp_path):
    tokenizer = load_tokenizer(metaclip2(tmp_path))
    check_tokenizer(tokenizer, replace(TEXT, pool="eot", eot=2), "here")
    with pytest.raises(InputError, match=r"^here: the tokenizer ends captions with id 2, text\.eot is 3"):
        check_tokenizer(tokenizer, replace(TEXT, pool="eot", eot=3), "here")
    with pytest.raises(InputError, match=r"this text tower pools at the largest id: set text\.eot to 2"):
        check_tokenizer(tokenizer, replace(TEXT, pool="eot"), "here")


def test_another_tokenizer_in_the_folder_is_checked(folder, tmp_path, remarks):
    def other(write) -> Path:
        place = tmp_path / write.__name__
        place.mkdir()
        for name in ("config.json", "model.safetensors"):
            (place / name).write_bytes((folder / name).read_bytes())
        return write(place)

    with pytest.raises(InputError, match=r"siglip2: the tokenizer has \d+ ids, text\.vocab is 60"):
        tokenizer_of(open_clip_model(str(other(siglip2))))
    clip = other(lambda place: Tokenizer.train(["a cat"], 520).save(place).parent)
    assert tokenizer_of(open_clip_model(str(clip))) is None
    assert "no file says how captions are padded, and this text tower, which pools the last position" in remarks()[-1]
