"""Automatically pruned models on disk: ragged files, padded memory, and the layouts of others by shape inference."""

from dataclasses import replace

import numpy as np
import pytest

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.weights import create_safetensors, open_safetensors
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.text import Tokenizer
from heirloom.common.errors import InputError
from heirloom.common.files import read_json
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.layout import Tensor
from tinyclip_jax.cost import parameters, total_macs
from tinyclip_jax.model import Clip, ClipConfig, ImageConfig, TextConfig
from tinyclip_jax.pretrained import Pretrained

# Widths that are no multiple of the heads, a layer without heads, one without hidden units.
CFG = ClipConfig(
    ImageConfig(size=16, patch=8, width=23, layers=3, heads=(2, 0, 1), hidden=(7, 3, 0), head_dim=64),
    TextConfig(context=8, vocab=520, width=19, layers=2, heads=1, hidden=(5, 9), head_dim=64),
    joint=12,
)


@pytest.fixture(scope="module")
def folder(draw, tmp_path_factory):
    model, folder = functional(Clip, CFG), tmp_path_factory.mktemp("pruned") / "ours"
    params = {
        path: np.where(leaf.filled(), value, 0).astype(np.float32) if leaf.ragged else value
        for (path, leaf), value in zip(model.spec.items(), draw(model.spec).values(), strict=True)
    }
    Pretrained(CFG, model, params, Preprocess(16), Tokenizer.train(["a cat"], 520)).save(folder)
    return folder


def test_files_are_ragged_and_come_back_padded(folder, families):
    tensors = open_safetensors(folder / "model.safetensors")
    assert tensors["image/blocks/attn/query/kernel/0"].shape == (23, 2, 64)
    assert tensors["image/blocks/attn/query/kernel/1"].size == 0
    assert tensors["text/blocks/mlp/up/kernel/1"].shape == (19, 9)
    donor = open_donor(folder, families)
    assert donor.cfg == CFG
    kernel = np.asarray(donor.source.values["image/blocks/attn/query/kernel"])
    assert (
        kernel.shape == (3, 23, 2, 64) and not kernel[1].any() and not kernel[2, :, 1].any() and kernel[2, :, 0].all()
    )
    assert parameters(donor.source.spec)["total"] == sum(t.size for t in tensors.values())


def test_macs_are_of_what_is_left(folder, families):
    donor = open_donor(folder, families)
    blocks = sum(
        5 * (4 * 23 * 64 * h + 2 * 23 * f) + 2 * 5**2 * 64 * h for h, f in zip((2, 0, 1), (7, 3, 0), strict=True)
    )
    text = sum(8 * (4 * 19 * 64 + 2 * 19 * f) + 2 * 8**2 * 64 for f in (5, 9))
    assert total_macs(CFG, donor.source.spec) == 4 * 3 * 64 * 23 + blocks + 23 * 12 + text + 19 * 12


def test_to_open_clips_names_and_back_bit_for_bit(folder, families, tmp_path):
    convert(open_donor(folder, families), tmp_path / "open", "open_clip", verify=False)
    tensors = open_safetensors(tmp_path / "open" / "open_clip_model.safetensors")
    assert tensors["visual.transformer.resblocks.0.attn.in_proj_weight"].shape == (3 * 2 * 64, 23)
    assert "visual.transformer.resblocks.1.attn.in_proj_weight" not in tensors
    assert "visual.transformer.resblocks.2.mlp.c_fc.weight" not in tensors
    assert read_json(tmp_path / "open" / "open_clip_config.json")["model_cfg"]["vision_cfg"]["heads"] == [2, 0, 1]
    again = open_donor(tmp_path / "open", families)
    assert again.cfg == CFG
    convert(again, tmp_path / "again", "heirloom", verify=False)
    ours, theirs = (open_safetensors(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key], err_msg=key)


def test_a_file_as_the_release_prunes_it_is_read(folder, families, tmp_path):
    """No attention at all where no head is left, and wrappers around the keys."""
    convert(open_donor(folder, families), tmp_path / "open", "open_clip", verify=False)
    tensors = open_safetensors(tmp_path / "open" / "open_clip_model.safetensors")
    gone = ("resblocks.1.attn", "resblocks.1.ln_1")
    names = {
        ("image_encoder_without_ddp.module." if key.startswith("visual") else "text_encoder_without_ddp.module.")
        + key: key
        for key in tensors
        if key != "logit_scale" and not (key.startswith("visual") and any(part in key for part in gone))
    } | {"_logit_scale.logit_scale": "logit_scale"}
    shapes = {theirs: Tensor(tensors[key].shape, tensors[key].dtype) for theirs, key in names.items()}
    shapes["image_encoder_without_ddp.l0_module.hidden_loga"] = Tensor((3,), np.dtype(np.float32))
    with create_safetensors(tmp_path / "release.safetensors", shapes) as out:
        for theirs, key in names.items():
            out[theirs][...] = tensors[key]
    found = open_donor(tmp_path / "release.safetensors", families)
    assert found.cfg == CFG
    bias = np.asarray(found.source.values["image/blocks/attn/out/bias"])
    assert not bias[1].any() and bias[0].all() and bias[2].all()
    ours = np.asarray(open_donor(folder, families).source.values["image/blocks/mlp/up/kernel"])
    np.testing.assert_array_equal(np.asarray(found.source.values["image/blocks/mlp/up/kernel"]), ours)


def test_a_pruned_model_is_none_of_hugging_faces(folder, families, tmp_path):
    with pytest.raises(InputError, match=r"this model is pruned.*write it as original"):
        convert(open_donor(folder, families), tmp_path / "hf", "hf")
    assert not (tmp_path / "hf").exists()


def test_layers_of_different_sizes_need_a_number_each():
    with pytest.raises(InputError, match="heads has 2 numbers and the tower 3 layers"):
        functional(Clip, replace(CFG, image=replace(CFG.image, heads=(1, 2))))
    with pytest.raises(InputError, match="needs a head_dim"):
        functional(Clip, replace(CFG, image=replace(CFG.image, head_dim=None)))
