"""Files of PixArt-Sigma and its LiT: what tensors and configs tell, what is guessed and said, and what is refused by
name.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.family import Found
from heirloom.common.checkpoint.weights import open_safetensors
from heirloom.common.errors import InputError, Remark
from heirloom.common.files import read_json, write_json
from heirloom.common.nn.functional import functional
from heirloom.common.nn.position import sincos
from lit_jax import pixart_formats, pixart_layouts
from lit_jax.pixart import PixArt, PixArtConfig
from lit_jax.zoo import FAMILIES, PIXART, open_pixart

CFG = PixArtConfig(
    size=8, width=32, layers=2, heads=4, cross_heads=4, hidden=128, text_width=16, text_tokens=300, interpolation=2.0
)
LIT = replace(CFG, attention="linear", heads=2)
GOLDEN = Path(__file__).parents[1] / "golden" / "pixart"
FILE = "diffusion_pytorch_model.safetensors"
NULL, CAPTION = "y_embedder.y_embedding", "y_embedder.y_proj.fc1.weight"


def drawn(spec, seed=0):
    rng = np.random.default_rng(seed)
    scale = {p: leaf.extent("read") ** -0.5 if p.endswith("kernel") else 0.3 for p, leaf in spec.items()}
    return {p: (scale[p] * rng.standard_normal(leaf.shape)).astype(np.float32) for p, leaf in spec.items()}


def folder_of(cfg, path, seed=0):
    path.mkdir()
    weights.write_params(path, drawn(functional(PixArt, cfg).spec, seed))
    weights.write_config(path, "pixart", cfg)
    return path


def tensors_of(cfg=CFG, seed=0):
    """Random tensors of a .pth file."""
    layout, spec = pixart_layouts.released(cfg), functional(PixArt, cfg).spec
    rng = np.random.default_rng(seed)
    drawn = {k: (0.1 * rng.standard_normal(t.shape)).astype(np.float32) for k, t in layout.foreign(spec).items()}
    return drawn | {key: np.asarray(value) for key, value in layout.constant.items()}


def opened(tensors, tmp_path, **overrides):
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, tmp_path / "pixart.safetensors")
    return open_donor(tmp_path / "pixart.safetensors", FAMILIES, **overrides)


def said(donor):
    return {guess.name: guess.value for guess in donor.guesses}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A diffusers folder."""
    root = tmp_path_factory.mktemp("theirs")
    donor = open_donor(folder_of(CFG, root / "ours"), FAMILIES)
    convert(donor, root / "diffusers", "diffusers", verify=False)
    return root / "diffusers"


def changed(theirs, tmp_path, **config):
    folder = tmp_path / "changed"
    shutil.copytree(theirs, folder)
    write_json(folder / "config.json", read_json(folder / "config.json") | config)
    return folder


def test_predictions_are_those_of_diffusers():
    donor, saved = open_donor(GOLDEN, FAMILIES), dict(np.load(GOLDEN / "outputs.npz"))
    params = {path: np.asarray(view) for path, view in donor.source.values.items()}
    with jax.default_matmul_precision("highest"):
        ours = donor.model.apply(params, *(saved[name] for name in ("x", "t", "text", "mask")))
    assert np.abs(ours - saved["prediction"]).max() / np.abs(saved["prediction"]).max() < 1e-5


def test_a_pth_file_says_its_size_by_its_positions(tmp_path):
    donor = opened(tensors_of(replace(CFG, null_text=True)), tmp_path, heads=4)
    assert donor.family is PIXART and donor.cfg == replace(CFG, null_text=True)
    assert said(donor) == {"prediction": "noise"}
    odd = replace(CFG, interpolation=1.3)
    assert opened(tensors_of(odd), tmp_path, heads=4).cfg == odd
    half = {key: value.astype(np.float16) for key, value in tensors_of(odd).items()}
    assert opened(half, tmp_path, heads=4).cfg == odd


def test_another_prediction_or_chain_in_the_trainers_arguments_is_refused(tmp_path):
    for arguments in ({"config": {"prediction_type": "v_prediction"}}, {"args": {"beta_schedule": "scaled_linear"}}):
        with pytest.raises(InputError, match=r"trained with (prediction_type v_pred|beta_schedule scaled)"):
            pixart_formats.FORMATS[0].read_config(Found(tensors_of(), tmp_path, arguments))
    assert pixart_formats.FORMATS[0].read_config(Found(tensors_of(), tmp_path, {"config": {"beta_schedule": "linear"}}))


def test_without_positions_the_size_must_be_given_and_the_rest_is_guessed(tmp_path):
    tensors = {key: value for key, value in tensors_of().items() if key != "pos_embed"}
    words = "without a position table the side of its latents is not known .* give --set size=VALUE"
    with pytest.raises(InputError, match=words):
        opened(tensors, tmp_path, heads=4)
    donor = opened(tensors, tmp_path, heads=4, size=128)
    assert donor.cfg == replace(CFG, size=128, interpolation=2.0)
    assert said(donor) == {"text_tokens": 300, "interpolation": "size / 64", "prediction": "noise"}
    donor = opened(tensors, tmp_path, heads=4, size=8, interpolation="2", text_tokens=300, prediction="noise")
    assert donor.cfg == CFG and not donor.guesses


def test_heads_of_the_published_width_are_a_guess(tmp_path):
    wide = replace(CFG, width=1152, heads=16, cross_heads=16, hidden=8, layers=1)
    donor = opened(tensors_of(wide), tmp_path)
    assert donor.cfg == wide and said(donor)["heads"] == 16
    with pytest.raises(InputError, match=r"the shapes do not show the heads, .* give --set heads=VALUE"):
        opened(tensors_of(), tmp_path)
    lit = opened(tensors_of(LIT), tmp_path, cross_heads=4)
    assert lit.cfg == LIT and said(lit) == {"text_tokens": 300, "features": "relu", "prediction": "noise"}
    with pytest.raises(InputError, match="the shapes do not show the cross_heads"):
        opened(tensors_of(LIT), tmp_path)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("csize_embedder.mlp.0.weight", "a PixArt-alpha with embedders of resolution and aspect ratio"),
        ("ar_embedder.mlp.0.weight", "a PixArt-alpha with embedders of resolution and aspect ratio"),
        ("blocks.1.attn.sr.weight", r"a PixArt-Sigma with compressed keys and values \(kv_compress\)"),
        ("blocks.1.attn.q_norm.weight", r"a PixArt with normalised queries and keys \(qk_norm\)"),
        ("controlnet.0.after_proj.weight", "a ControlNet of PixArt"),
        ("attention_y_norm.weight", "a Sana: of the models that draw from text only PixArt-Sigma and its LiT are read"),
        ("blocks.0.norm3.weight", "tensor 'blocks.0.norm3.weight' is not part of this pixart model"),
    ],
)
def test_relatives_are_refused_by_name(extra, words, tmp_path):
    with pytest.raises(InputError, match=words):
        opened(tensors_of() | {extra: np.zeros(1, np.float32)}, tmp_path, heads=4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({NULL: np.zeros((120, 16), np.float32)}, "a PixArt-alpha, for prompts of 120 tokens: only PixArt-Sigma"),
        ({NULL: np.zeros((), np.float32)}, r"tensor 'y_embedder.y_embedding' has shape \(1,\)"),
        ({NULL: np.zeros((300, 8), np.float32)}, r"tensor 'y_embedder.y_embedding' has shape \(300, 8\)"),
        ({CAPTION: np.zeros(32, np.float32)}, "its tensor 'y_embedder.y_proj.fc1.weight' is missing or no matrix"),
        ({"pos_embed": np.full((1, 16, 32), np.nan, np.float32)}, "its position table, of 16 places, is not PixArt's"),
        ({"pos_embed": np.zeros((), np.float32)}, "its position table, of 0 places, is not PixArt's"),
        ({"pos_embed": np.ones((1, 16, 32), np.float32)}, "its position table, of 16 places, is not PixArt's fixed"),
        ({"pos_embed": sincos(2, 8, 32)[None].reshape(1, 16, 32)}, "its position table, of 16 places, is not PixArt's"),
        ({"x_embedder.proj.weight": np.zeros((32, 4, 1, 2, 2), np.float32)}, "looks like a DiT or PixArt, but its"),
        ({"final_layer.linear.weight": np.zeros((16, 32), np.float32)}, "it predicts no variance"),
    ],
)
def test_other_tensors_are_refused(change, words, tmp_path):
    with pytest.raises(InputError, match=words):
        opened(tensors_of() | change, tmp_path, heads=4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(interpolation="none"), "interpolation=none: give a number above 0, such as 2"),
        (dict(interpolation=0), "interpolation=0: give a number above 0"),
        (dict(interpolation=1), "tensor 'pos_embed' is fixed in pixart models, but has other values here"),
        (dict(size=16), "tensor 'pos_embed' has shape"),
        (dict(heads=5), "heads: 5 heads do not divide a width of 32"),
        (dict(cross_heads=5), "cross_heads: 5 heads do not divide a width of 32"),
        (dict(features="gelu"), "features=gelu: kernel of linear attention; softmax attention has none"),
        (dict(prediction="velocity"), "prediction=velocity: only models that predict the noise"),
    ],
)
def test_wrong_settings_are_refused(settings, words, tmp_path):
    with pytest.raises(InputError, match=words):
        opened(tensors_of(), tmp_path, **(dict(heads=4) | settings))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dict(use_additional_conditions=True), "use_additional_conditions is True; a PixArt-alpha with embedders"),
        (dict(use_additional_conditions=None, sample_size=128), "use_additional_conditions is None; a PixArt-alpha"),
        (dict(norm_type="ada_norm_zero"), "norm_type is 'ada_norm_zero'; only models where it is 'ada_norm_single'"),
        (dict(cross_attention_dim=48), r"cross_attention_dim is 48; only models where it is the width \(32\) are read"),
        (dict(activation_fn="geglu"), "activation_fn is 'geglu'"),
        (dict(attention_type="gated"), "attention_type is 'gated'"),
        (dict(attention_bias=False), "attention_bias is False"),
        (dict(norm_eps=1e-5), "norm_eps is 1e-05"),
        (dict(caption_channels=None), "caption_channels is None; only models that project the text features"),
        (dict(out_channels=4), r"out_channels is 4; only models that predict noise and variance \(8\) are read"),
        (dict(sample_size=[8, 16]), "sample_size is .8, 16.; only squares can be read"),
        (dict(interpolation_scale=0), "interpolation_scale is 0, and must be a finite number above 0"),
        (dict(_class_name="SanaTransformer2DModel"), "_class_name is 'SanaTransformer2DModel'"),
        (dict(guidance_embeds=True), "the field 'guidance_embeds' .True. is not known here"),
    ],
)
def test_other_configs_are_refused(theirs, config, words, tmp_path):
    with pytest.raises(InputError, match=words):
        open_donor(changed(theirs, tmp_path, **config), FAMILIES)


def test_a_null_interpolation_is_that_of_diffusers(theirs, tmp_path):
    folder = changed(theirs, tmp_path, interpolation_scale=None, sample_size=160)
    assert open_donor(folder, FAMILIES).cfg == replace(CFG, size=160, interpolation=2.0)


def test_a_pipeline_says_which_pixart_it_is(theirs, tmp_path):
    shutil.copytree(theirs, tmp_path / "pipeline" / "transformer")
    (tmp_path / "pipeline" / "scheduler").mkdir()
    schedule = dict(_class_name="DPMSolverMultistepScheduler", prediction_type="epsilon", beta_schedule="linear")
    write_json(tmp_path / "pipeline" / "scheduler" / "scheduler_config.json", schedule)
    index = tmp_path / "pipeline" / "model_index.json"
    write_json(index, {"_class_name": "PixArtSigmaPipeline"})
    donor = open_pixart(str(tmp_path / "pipeline"))
    assert donor.cfg == CFG and not donor.guesses
    write_json(index, {"_class_name": "PixArtAlphaPipeline"})
    with pytest.raises(InputError, match="a PixArt-alpha, for prompts of 120 tokens"):
        open_pixart(str(tmp_path / "pipeline"))
    write_json(index, {"_class_name": "PixArtSigmaPipeline"})
    path = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    write_json(path, schedule | {"prediction_type": "v_prediction"})
    with pytest.raises(InputError, match="prediction_type is 'v_prediction'"):
        open_pixart(str(tmp_path / "pipeline"))


def test_diffusers_there_and_back_keeps_every_bit(theirs, tmp_path):
    convert(open_donor(theirs, FAMILIES), tmp_path / "ours", "heirloom", verify=False)
    convert(open_donor(tmp_path / "ours", FAMILIES), tmp_path / "back", "diffusers", verify=False)
    there, back = open_safetensors(theirs / FILE), open_safetensors(tmp_path / "back" / FILE)
    assert there.keys() == back.keys() and all(there[key].tobytes() == back[key].tobytes() for key in there)
    assert json.loads((theirs / "config.json").read_text()) == json.loads((tmp_path / "back/config.json").read_text())


@pytest.mark.parametrize(
    ("cfg", "to", "words"),
    [
        (LIT, "diffusers", "diffusers has no linear attention for PixArt"),
        (replace(CFG, hidden=64), "diffusers", "diffusers' PixArt has MLPs of four widths, this model has 64 units"),
        (replace(CFG, cross_heads=2), "diffusers", "diffusers' PixArt has as many heads in both attentions"),
        (replace(CFG, cross_heads=2), "pixart", "PixArt has as many heads in both attentions, this model has 4 and 2"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(cfg, to, words, tmp_path):
    with pytest.raises(InputError, match=words):
        convert(open_donor(folder_of(cfg, tmp_path / "ours"), FAMILIES), tmp_path / "out", to, verify=False)
    assert not (tmp_path / "out").exists()


def test_diffusers_files_leave_out_the_empty_prompt_and_say_so(tmp_path):
    donor = open_donor(folder_of(replace(CFG, null_text=True), tmp_path / "ours"), FAMILIES)
    with pytest.warns(Remark, match="null_text is left out: files of the diffusers format do not hold it"):
        convert(donor, tmp_path / "out", "diffusers", verify=False)
    assert open_donor(tmp_path / "out", FAMILIES).cfg == CFG
