"""Files of timm, DeiT, transformers, SWS, TLEG and google-research, both ways."""

import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.unwrap import open_tensors
from heirloom.common.checkpoint.weights import open_safetensors
from heirloom.common.errors import InputError
from heirloom.common.files import read_json, write_json
from heirloom.common.nn.functional import functional
from heirloom.common.vit.layouts import google, sws, tleg
from heirloom.common.vit.model import Vit, VitConfig
from learngene.inputs import preprocess_of
from learngene.zoo import FAMILY, open_classifier

GOLDENS = {
    "timm_cls": ("timm", dict(tokens="cls", pool="cls")),
    "timm_mean_norm": ("timm", dict(pool="mean_norm")),
    "timm_norm_mean": ("timm", dict(pool="norm_mean")),
    "timm_distilled": ("timm", dict(tokens="cls+dist", pool="cls+dist")),
    "hf_vit": ("hf", dict(tokens="cls", pool="cls", eps=1e-3)),
    "hf_deit": ("hf", dict(tokens="cls+dist", pool="cls", eps=1e-3)),
    "hf_deit_teacher": ("hf", dict(tokens="cls+dist", pool="cls+dist", eps=1e-3)),
}
SIZES = VitConfig(size=8, patch=4, width=16, layers=2, heads=2, hidden=32, classes=5)


def values(donor):
    return {path: np.asarray(view) for path, view in donor.source.values.items()}


@pytest.mark.parametrize("name", GOLDENS)
def test_logits_are_those_of_the_library_that_wrote_the_file(golden, name):
    folder, expected = golden
    donor, (format, fields) = open_donor(folder / name, [FAMILY]), GOLDENS[name]
    assert donor.format == format and donor.cfg == replace(SIZES, **fields)
    logits = np.asarray(jax.jit(functional(Vit, donor.cfg).apply)(values(donor), expected["pictures"]))
    assert np.abs(logits - expected[name]).max() <= 1e-4 * np.abs(expected[name]).max()


@pytest.mark.parametrize("name", GOLDENS)
def test_round_trip_keeps_every_bit_and_every_key(golden, tmp_path, name):
    folder, format = golden[0] / name, GOLDENS[name][0]
    convert(open_donor(folder, [FAMILY]), tmp_path / "ours", "heirloom", verify=False)
    convert(open_donor(tmp_path / "ours", [FAMILY]), tmp_path / "back", format, verify=False)
    there, back = (open_safetensors(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert there.keys() == back.keys()
    for key, value in there.items():
        assert value.shape == back[key].shape and value.tobytes() == back[key].tobytes(), key
    assert open_donor(tmp_path / "back", [FAMILY]).cfg == open_donor(folder, [FAMILY]).cfg
    written, theirs = read_json(tmp_path / "back" / "config.json"), read_json(folder / "config.json")
    if format == "hf":
        assert {key: theirs[key] for key in written} == written
    else:
        assert (
            written["architecture"] == theirs["architecture"]
            and written["model_args"].items() >= theirs["model_args"].items()
        )


@pytest.fixture
def released(gene):
    """What the two releases can say in a file: 12 heads or those of the width, eps 1e-5, their layouts."""
    shared = dict(eps=1e-5, size=8, patch=4, hidden=384)
    return {
        "sws": VitConfig(**shared, width=96, heads=12, layers=5, classes=3, gene="sws", layout=(3, 3, 4, 3, 3)),
        "tleg": VitConfig(**shared, width=192, heads=3, layers=2, classes=3, gene="tleg", layout=(12,)),
        "google": VitConfig(size=8, patch=4, width=16, layers=2, heads=2, hidden=32, classes=5, activation="gelu_tanh"),
    }


def test_keys_of_genes_are_the_released_ones(released):
    keys = sws(released["sws"]).foreign(functional(Vit, released["sws"]).spec)
    assert keys["blocks.block.attn.qkv.instances.4.weight"].shape == (288, 96) and keys["pos_embed"].shape == (1, 4, 96)
    modules = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    instances = {
        f"blocks.block.{m}.instances.{s}.{leaf}" for m in modules for s in range(5) for leaf in ("weight", "bias")
    }
    stem = {
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "pos_embed",
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }
    assert keys.keys() == instances | stem
    keys = tleg(released["tleg"]).foreign(functional(Vit, released["tleg"]).spec)
    parts = {
        f"blocks.block.{m}.instances.0.{leaf}_{p}"
        for m in modules
        for leaf in ("weight", "bias")
        for p in ("base", "ilayer")
    }
    assert keys.keys() == parts | stem


def test_google_archives_come_back_and_big_visions_names_are_read(released, folder_of, tmp_path):
    ours = folder_of(released["google"])
    convert(open_donor(ours, [FAMILY]), tmp_path / "npz", "google", verify=False)
    file = tmp_path / "npz" / "vit.npz"
    written = open_tensors(file)
    assert written["Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel"].shape == (16, 2, 8)
    assert written["Transformer/posembed_input/pos_embedding"].shape == (1, 4, 16)
    assert written.keys() == google(released["google"]).foreign(functional(Vit, released["google"]).spec).keys()
    other = {"Transformer/posembed_input/pos_embedding": "pos_embedding"}
    names = {
        key: (
            "params/"
            + other.get(
                key,
                key.replace("Norm_2", "Norm_1")
                .replace("MlpBlock_3", "MlpBlock_0")
                .replace("Attention_1", "Attention_0"),
            )
        )
        for key in written
    }
    np.savez(tmp_path / "big_vision.npz", **{names[key]: value for key, value in written.items()})
    for source in (file, tmp_path / "big_vision.npz"):
        donor = open_donor(source, [FAMILY])
        assert donor.format == "google" and donor.cfg == released["google"]
        for path, value in values(open_donor(ours, [FAMILY])).items():
            np.testing.assert_array_equal(np.asarray(donor.source.values[path]), value, err_msg=path)


@pytest.mark.parametrize(
    ("change", "to", "complaint"),
    [
        (dict(), "hf", "puts a class token in front"),
        (dict(pool="mean_norm"), "hf", "Write --to timm"),
        (dict(gene="sws", layout=(1, 1)), "timm", "expand it first"),
        (dict(gene="sws", layout=(1, 1)), "hf", "expand it first"),
        (dict(eps=1e-12), "timm", "an eps of 1e-6 or 1e-5, this model has 1e-12: convert with --set eps=1e-6"),
        (dict(activation="gelu_tanh", width=192, heads=3), "deit", "exact GELU, this model gelu_tanh; write --to timm"),
        (dict(), "deit", "cannot store 2 heads"),
        (dict(), "sws", "--to sws needs a gene of SWS"),
        (dict(gene="sws", layout=(2, 2)), "sws", "cannot store layout"),
        (dict(), "google", "has activation gelu_tanh, this model gelu: convert with --set activation=gelu_tanh"),
        (
            dict(activation="gelu_tanh", eps=1e-5),
            "google",
            "has eps 1e-06, this model 1e-05: convert with --set eps=1e-06",
        ),
        (dict(pool="mean_norm"), "google", "this model has tokens 'none' and pool 'mean_norm'"),
        (
            dict(tokens="cls+dist", pool="mean_norm", width=192, heads=3),
            "deit",
            "are pooled as 'mean_norm'; keep the heirloom format",
        ),
    ],
)
def test_what_a_format_cannot_say_is_refused_and_nothing_written(folder_of, tmp_path, change, to, complaint):
    ours = folder_of(replace(SIZES, **change))
    with pytest.raises(InputError, match=complaint):
        convert(open_donor(ours, [FAMILY]), tmp_path / "out", to, verify=False)
    assert not (tmp_path / "out").exists()


def test_settings_of_a_folder_of_ours_may_be_set_and_are_never_ignored(folder_of):
    ours = folder_of(replace(SIZES, eps=1e-12))
    assert open_donor(ours, [FAMILY], eps="1e-6", activation="quick_gelu").cfg == replace(
        SIZES, eps=1e-6, activation="quick_gelu"
    )
    with pytest.raises(InputError, match="'head' cannot be set for this model; did you mean 'heads'"):
        open_donor(ours, [FAMILY], head=4)


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("hf_vit", {"qkv_bias": False}, "qkv_bias is False"),
        ("hf_vit", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("timm_cls", {"model_args": {"num_heads": 2, "global_pool": "max"}}, "global_pool is 'max'"),
        ("timm_cls", {"model_args": {}}, "embed_dim is 192, and the weights have 16"),
    ],
)
def test_other_models_are_refused_by_name(golden, tmp_path, name, change, complaint):
    shutil.copytree(golden[0] / name, tmp_path / "other")
    write_json(tmp_path / "other" / "config.json", read_json(tmp_path / "other" / "config.json") | change)
    with pytest.raises(InputError, match=complaint):
        open_donor(tmp_path / "other", [FAMILY])


def test_preprocessing_travels(golden, tmp_path):
    shutil.copytree(golden[0] / "hf_vit", tmp_path / "hf")
    write_json(
        tmp_path / "hf" / "preprocessor_config.json", dict(image_mean=[0.5] * 3, image_std=[0.25] * 3, resample=2)
    )
    convert(open_donor(tmp_path / "hf", [FAMILY]), tmp_path / "ours", "heirloom", verify=False)
    pre = preprocess_of(open_donor(tmp_path / "ours", [FAMILY])).pre
    assert (pre.mean, pre.std, pre.interpolation, pre.size) == ((0.5,) * 3, (0.25,) * 3, "bilinear", 8)
    assert (pre.mode, pre.resize) == ("squash", 8)  # transformers' ViT crops nothing


def test_of_a_run_its_model_is_opened(folder_of, tmp_path):
    run = tmp_path / "run"
    for folder in (run, run / "stage_1", run / "stage_2"):
        folder.mkdir()
    (run / "metrics.jsonl").touch()
    with pytest.raises(InputError, match="run has no model yet: it is written at the end; the same heirloom train"):
        open_classifier(str(run))
    folder_of(SIZES, "run/model")
    assert open_classifier(str(run)).path == run / "model"
    shutil.move(run / "model", run / "stage_1" / "model")
    shutil.move(run / "metrics.jsonl", run / "stage_1" / "metrics.jsonl")
    (run / "stage_2" / "metrics.jsonl").touch()
    with pytest.raises(InputError, match=r"is a run in stages: give its last one, .*/stage_1$"):
        open_classifier(str(run))
    assert open_classifier(str(run / "stage_1")).path == run / "stage_1" / "model"
    shutil.rmtree(run / "stage_1" / "model")
    with pytest.raises(InputError, match="is a run in stages: none has a model yet"):
        open_classifier(str(run))
    (run / "stage_2" / "zoo").mkdir()
    with pytest.raises(InputError, match="stage_2 is a run that made a zoo, not a model"):
        open_classifier(str(run / "stage_2"))
