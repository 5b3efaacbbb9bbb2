"""ViTs of transformers with other parts than a classifier's: goldens of transformers, both ways, without torch."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import learngene
from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.weights import open_safetensors
from heirloom.common.cli import main
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.errors import InputError, Remark
from heirloom.common.files import read_json
from heirloom.common.nn.functional import functional
from heirloom.common.vit.model import Vit, VitConfig
from learngene import relatives
from learngene.evaluate import evaluate_folder
from learngene.inputs import preprocess_of
from learngene.labels import labels_of
from learngene.zoo import FAMILY

GOLDEN = Path(__file__).parents[1] / "golden" / "hf_vit"
SIZES = VitConfig(size=12, patch=4, width=16, layers=2, heads=2, hidden=24, classes=0, eps=1e-3)
CLS = dict(tokens="cls", pool="cls")
DINO = dict(tokens="cls", layer_scale=1.0, gated=True, activation="silu", any_size=True)
CASES = {
    "vit": dict(**CLS, pooler=True),
    "dinov2": dict(**DINO, pool="cls", qkv_bias=False, resample="plain"),
    "dinov2_with_registers": dict(**DINO, pool="cls+mean", classes=5, registers=4, positions="cls"),
    "siglip": dict(pool="map", activation="gelu_tanh"),
    "clip": dict(**CLS, pre_norm=True, joint=12, activation="quick_gelu"),
    "vit_mae": CLS,
}
# The masked autoencoder's encoder comes back as a ViTModel, without a decoder.
BACK = {"vit_mae": "ViTModel"}
pytestmark = pytest.mark.filterwarnings("ignore::heirloom.common.errors.Remark")


@pytest.fixture
def read(tmp_path):
    """`read(name, drop, **fields)`: the config of a golden whose config.json has these fields, and lacks some."""

    def read(name, drop=(), **fields):
        copy = Path(shutil.copytree(GOLDEN / name, tmp_path / f"{len(list(tmp_path.iterdir()))}"))
        config = {key: value for key, value in read_json(copy / "config.json").items() if key not in drop}
        (copy / "config.json").write_text(json.dumps(config | fields))
        return open_donor(copy, [FAMILY]).cfg

    return read


def values(donor):
    return {path: np.asarray(view) for path, view in donor.source.values.items()}


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_transformers(name):
    donor, expected = open_donor(GOLDEN / name, [FAMILY]), np.load(GOLDEN / "expected.npz")
    assert donor.format == "hf" and donor.cfg == replace(SIZES, **CASES[name])
    ours = np.asarray(jax.jit(functional(Vit, donor.cfg).apply)(values(donor), expected["pictures"]))
    assert np.abs(ours - expected[name]).max() <= 1e-5 * np.abs(expected[name]).max()


@pytest.mark.parametrize("name", CASES)
def test_the_way_back_has_every_bit_every_key_and_every_field(name, tmp_path):
    convert(open_donor(GOLDEN / name, [FAMILY]), tmp_path / "ours", "heirloom", verify=False)
    convert(open_donor(tmp_path / "ours", [FAMILY]), tmp_path / "back", "hf", verify=False)
    there, back = (open_safetensors(folder / "model.safetensors") for folder in (GOLDEN / name, tmp_path / "back"))
    names = {key.removeprefix("vision_model." if name == "siglip" else ""): key for key in back}
    left_out = {key for key in there if key.startswith("decoder.") or key == "embeddings.mask_token"}
    there = {key.removeprefix("vit.") if name == "vit_mae" else key: there[key] for key in there.keys() - left_out}
    assert names.keys() == there.keys()
    for key, value in there.items():
        if "mask_token" not in key:
            np.testing.assert_array_equal(back[names[key]], value, err_msg=key)
    written, theirs = (read_json(folder / "config.json") for folder in (tmp_path / "back", GOLDEN / name))
    changed = {"architectures", "model_type"} if name in BACK else {"use_mask_token"}
    assert {key for key in written if written[key] != theirs.get(key)} <= changed
    assert written["architectures"] == [BACK.get(name) or theirs["architectures"][0]]
    assert open_donor(tmp_path / "back", [FAMILY]).cfg == open_donor(GOLDEN / name, [FAMILY]).cfg


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("vit", dict(pooler_act="gelu"), "pooler_act is 'gelu'"),
        ("vit", dict(pooler_output_size=8), r"pooler_output_size is 8 \(a pooler of another size than hidden_size\)"),
        ("vit", dict(architectures=["ViTForImageClassification"]), "architectures is .*ViTModel"),
        ("vit", dict(model_type="dinov2"), "model_type is 'dinov2', and the tensors are not"),
        ("vit", dict(model_type="siglip2"), "a SigLIP 2 for pictures of any aspect ratio"),
        ("vit", dict(qkv_bias=False), "qkv_bias is False, and the weights have True"),
        ("dinov2", dict(qkv_bias=True), "qkv_bias is True, and the weights have False"),
        ("dinov2", dict(use_swiglu_ffn=False), "tensor '.*mlp.fc1.bias' is missing"),
        ("dinov2", dict(mlp_ratio=3), "has shape"),
        ("dinov2", dict(layerscale_value=0), "layerscale_value is 0, and must be a finite number above 0"),
        ("dinov2", dict(image_size=[12, 16]), "only squares can be read"),
        ("dinov2", dict(interpolate_offset=0.1), "interpolate_offset is 0.1"),
        ("dinov2", dict(num_register_tokens=4), "the field 'num_register_tokens'"),
        ("dinov2", dict(architectures=["Dinov2Backbone"]), "architectures is .*Dinov2Model"),
        ("dinov2_with_registers", dict(num_register_tokens=3), "has shape"),
        ("dinov2_with_registers", dict(num_labels=4), "num_labels is 4, and the weights have 5"),
        ("siglip", dict(vision_use_head=False), r"vision_use_head is False \(an image tower without its pooling\)"),
        ("siglip", dict(hidden_act="relu"), "hidden_act is 'relu'"),
        ("siglip", dict(model_type="clip_vision_model"), "architectures is .*CLIPVisionModel"),
        ("clip", dict(model_type="clip"), "model_type is 'clip', and there is neither a text tower nor a classifier"),
        ("clip", dict(projection_dim=16), "has shape"),
        ("clip", dict(patch_size=6), "has shape"),
        ("clip", dict(architectures=["CLIPVisionModel"]), "architectures is .*CLIPVisionModelWithProjection"),
        ("vit_mae", dict(architectures=["ViTMAEModel"]), "architectures is .*ViTMAEForPreTraining"),
        ("vit_mae", dict(use_abs_pos=False), "the field 'use_abs_pos'"),
    ],
)
def test_a_field_is_read_or_refused(name, fields, message, read):
    with pytest.raises(InputError, match=message) as error:
        read(name, **fields)
    assert "\n" not in str(error.value)


def test_fields_that_shapes_cannot_tell_and_their_defaults(read):
    plain = {name: replace(SIZES, **fields) for name, fields in CASES.items()}
    assert read("vit", num_attention_heads=4, layer_norm_eps=1e-5).heads == 4
    defaults = ("layer_norm_eps", "hidden_act", "vision_use_head", "qkv_bias")
    assert read("siglip", defaults) == replace(plain["siglip"], eps=1e-6)
    assert read("clip", defaults) == replace(plain["clip"], eps=1e-5)
    assert read("vit", defaults) == replace(plain["vit"], eps=1e-12)
    assert read("dinov2_with_registers", defaults) == replace(plain["dinov2_with_registers"], eps=1e-6)
    assert read("dinov2", layerscale_value=1e-5, drop_path_rate=0.1) == replace(plain["dinov2"], layer_scale=1e-5)


def test_files_of_older_versions_are_read(tmp_path):
    """transformers 4 saved every image tower with a prefix and a buffer of positions."""
    shutil.copytree(GOLDEN / "siglip", tmp_path / "old")
    tensors = dict(open_safetensors(GOLDEN / "siglip" / "model.safetensors"))
    old = {f"vision_model.{key}": np.array(value) for key, value in tensors.items()}
    old["vision_model.embeddings.position_ids"] = np.arange(9)[None]
    save_file(old, tmp_path / "old" / "model.safetensors")
    there, here = (open_donor(folder, [FAMILY]) for folder in (tmp_path / "old", GOLDEN / "siglip"))
    assert there.cfg == here.cfg
    for path, value in values(here).items():
        np.testing.assert_array_equal(np.asarray(there.source.values[path]), value)


def test_what_is_guessed_and_left_out_is_said(tmp_path):
    with pytest.warns(Remark) as said:
        donor = open_donor(GOLDEN / "vit_mae", [FAMILY])
    texts = " ".join(str(remark.message) for remark in said)
    assert [guess.name for guess in donor.guesses] == ["pool"] and "pool = cls is a guess" in texts
    assert "the decoder of the masked autoencoder is left out" in texts
    assert open_donor(GOLDEN / "vit_mae", [FAMILY], pool="norm_mean").guesses == ()
    for name in CASES.keys() - {"vit_mae"}:
        assert open_donor(GOLDEN / name, [FAMILY]).guesses == ()


@pytest.mark.parametrize(
    ("fields", "to", "message"),
    [
        (dict(CASES["clip"], joint=0, classes=5), "hf", "classes is 5: .* CLIPVisionModel has none"),
        (dict(CASES["siglip"], registers=2), "hf", "registers is 2, which transformers' SiglipVisionModel"),
        (dict(CASES["vit"], classes=5), "hf", "a pooler and a head"),
        (dict(CASES["vit"], qk_norm=True), "hf", "qk_norm is True, which transformers' ViTModel does not hold"),
        (dict(CASES["dinov2"], hidden=20), "hf", "hidden is 20, and transformers' DINOv2 has two thirds"),
        (dict(CASES["dinov2"], resample="antialiased"), "hf", "any_size is True, which transformers' Dinov2Model"),
        (dict(CASES["dinov2_with_registers"], positions="patches"), "hf", "positions is 'patches'"),
        (CASES["vit"], "timm", "pooler is True, which timm's ViT does not have"),
        (CASES["clip"], "timm", "joint is 12, which timm's ViT does not have"),
        (CASES["dinov2"], "timm", "resample is 'plain', which timm's ViT does not have"),
        (CASES["dinov2_with_registers"] | dict(width=192, heads=3), "deit", "a file without a config does not hold"),
        (CASES["vit"], "google", "pooler is True"),
    ],
)
def test_what_a_format_does_not_hold_is_refused(fields, to, message, folder_of, tmp_path):
    ours = folder_of(replace(SIZES, **fields))
    with pytest.raises(InputError, match=message):
        convert(open_donor(ours, [FAMILY]), tmp_path / "out", to, verify=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["vit", "clip", "dinov2_with_registers"])
def test_a_classifier_inherits_from_it(name):
    """Of half the depth and another size, without pooler and projection; the head is fresh."""
    donor = open_donor(GOLDEN / name, [FAMILY])
    student = replace(donor.cfg, layers=1, size=16, classes=3, pool="cls", pooler=False, joint=0)
    plan = relatives.plan("every", donor.cfg, student)
    lines = plan.resolve(donor.source, functional(Vit, student).spec).lines
    fresh = {line.path for line in lines if line.fraction == 0}
    assert fresh == {"head/kernel", "head/bias"}


def test_a_head_reads_two_vectors_or_one():
    spec = functional(Vit, replace(SIZES, **CASES["dinov2_with_registers"])).spec
    assert str(spec["head/kernel"].axes) == "pooled embed -> class" and spec["head/kernel"].shape == (2, 16, 5)
    for fields, message in (
        (dict(CLS, joint=4, classes=3), "classes is 3 and joint 4"),
        (dict(tokens="cls", pool="cls+mean", pooler=True), "a pooler or projection takes one"),
        (dict(pool="cls+mean"), "pool 'cls\\+mean' needs its token"),
    ):
        with pytest.raises(InputError, match=message):
            replace(SIZES, **fields)


def test_preprocessing_of_a_dinov2_sets_the_size_of_its_pictures(tmp_path):
    """facebook/dinov2-base has positions for 518 pixels, and its file crops 224."""
    shutil.copytree(GOLDEN / "dinov2", tmp_path / "hf")
    about = dict(image_processor_type="BitImageProcessor", crop_size=dict(height=8, width=8), resample=3)
    about |= dict(size=dict(shortest_edge=10), image_mean=[0.5] * 3, image_std=[0.25] * 3, do_center_crop=True)
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(about))
    convert(open_donor(tmp_path / "hf", [FAMILY]), tmp_path / "ours", "heirloom", verify=False)
    donor = open_donor(tmp_path / "ours", [FAMILY])
    pre = preprocess_of(donor).pre
    assert (pre.size, pre.resize, pre.mode, donor.cfg.size) == (8, 10, "shortest", 12)
    assert labels_of(donor) is None
    features = donor.model.apply(values(donor), np.zeros((1, 8, 8, 3), np.float32))
    assert features.shape == (1, 16) and np.isfinite(np.asarray(features)).all()


@pytest.mark.parametrize(
    ("name", "mean", "interpolation"),
    [
        ("siglip", 0.5, "bicubic"),
        ("clip", 0.48145466, "bicubic"),
        ("dinov2", 0.485, "bicubic"),
        ("vit", 0.5, "bilinear"),
    ],
)
def test_without_a_file_the_published_models_preprocessing_is_assumed(name, mean, interpolation):
    found = preprocess_of(open_donor(GOLDEN / name, [FAMILY]))
    assert (found.pre.mean[0], found.pre.interpolation, found.pre.size) == (mean, interpolation, 12) and found.note


def test_features_have_no_accuracy():
    with pytest.raises(InputError, match="has no head, and accuracy needs one"):
        evaluate_folder(open_donor(GOLDEN / "clip", [FAMILY]), type("Args", (), dict(flags=[], data=None))())


def test_a_descendant_of_a_model_of_any_size_sees_the_pictures_of_its_donor(tmp_path, one_device):
    donor = tmp_path / "dino"
    shutil.copytree(GOLDEN / "dinov2_with_registers", donor)
    Preprocess(8, resize=10).save(donor)  # its positions are for 12 px
    command = ["expand", str(donor), str(tmp_path / "same"), "--depth", "2"]
    assert main(command) == 0 and Preprocess.load(tmp_path / "same") == Preprocess(8, resize=10)
    command[2] = str(tmp_path / "larger")
    assert main([*command, "--size", "12"]) == 0 and Preprocess.load(tmp_path / "larger") == Preprocess(12, resize=15)
    assert learngene.expand(str(donor), 2).pre.size == 8 and learngene.expand(str(donor), 2, size=16).pre.size == 16
