"""PixArt-Sigma and its LiT against diffusers and against PixArt's formulas in torch; the files there and back."""

from dataclasses import replace
from math import sqrt

import jax
import numpy as np
import pytest

from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.verify import OWN
from heirloom.common.checkpoint.weights import open_safetensors
from heirloom.common.errors import Remark
from heirloom.common.files import read_json, write_json
from heirloom.common.nn.functional import functional
from lit_jax.pixart import PixArt, PixArtConfig
from lit_jax.pixart_verify import FILE, Inputs, formulas
from lit_jax.zoo import FAMILIES

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

SMALL = PixArtConfig(
    size=16, width=64, layers=2, heads=4, cross_heads=4, hidden=256, text_width=32, text_tokens=12, interpolation=0.5
)
LIT = replace(SMALL, attention="linear", heads=2)


def drawn(spec, seed=0):
    """Numbers far from zero for every leaf, tables too."""
    rng = np.random.default_rng(seed)
    scale = {p: leaf.extent("read") ** -0.5 if p.endswith("kernel") else 0.3 for p, leaf in spec.items()}
    return {p: (scale[p] * rng.standard_normal(leaf.shape)).astype(np.float32) for p, leaf in spec.items()}


def folder_of(cfg, path, seed=0):
    path.mkdir()
    weights.write_params(path, drawn(functional(PixArt, cfg).spec, seed))
    weights.write_config(path, "pixart", cfg)
    return path


def theirs_of(path, *, seed=0, **config):
    """A PixArt of diffusers with random weights, saved with its config, and the class's own instance."""
    usual = dict(num_attention_heads=4, attention_head_dim=16, num_layers=2, cross_attention_dim=64, sample_size=16)
    usual |= dict(caption_channels=32, interpolation_scale=1, use_additional_conditions=False)
    torch.manual_seed(seed)
    model = diffusers.PixArtTransformer2DModel(**usual | config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3 if parameter.ndim == 1 else 1 / sqrt(parameter[0].numel()))
    model.save_pretrained(path)
    return model


def batch_of(rows, cols, *, tokens=12, text_width=32, lengths=(3, 12, 1), seed=0):
    rng = np.random.default_rng(seed)
    n = len(lengths)
    return Inputs(
        rng.standard_normal((n, rows, cols, 4)).astype(np.float32),
        np.array([0.0, 17.25, 998.5], np.float32)[:n],
        rng.standard_normal((n, tokens, text_width)).astype(np.float32),
        np.arange(tokens) < np.array(lengths)[:, None],
    )


def predicted(model, batch):
    x, t, text, mask = map(torch.from_numpy, batch)
    with torch.no_grad():
        out = model(x.permute(0, 3, 1, 2), encoder_hidden_states=text, timestep=t, encoder_attention_mask=mask.long())
    return out.sample.permute(0, 2, 3, 1).numpy()


def opened(path, **overrides):
    return open_donor(path, FAMILIES, **overrides)


def ours(donor, batch):
    params = {path: np.asarray(view) for path, view in donor.source.values.items()}
    with jax.default_matmul_precision("highest"):
        return np.asarray(donor.model.apply(params, *batch))


def error(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize(
    ("size", "interpolation"), [(16, 1), (8, 0.5), (32, 2), (64, None), (160, None)], ids=str
)
def test_predictions_are_those_of_diffusers(size, interpolation, tmp_path):
    model = theirs_of(tmp_path / "theirs", sample_size=size, interpolation_scale=interpolation)
    donor = opened(tmp_path / "theirs")
    assert donor.cfg.interpolation == (interpolation or max(size // 64, 1))
    for rows, cols in ((16, 16), (8, 12), (12, 4), (size, size) if size < 64 else (10, 10)):
        batch = batch_of(rows, cols)
        assert error(ours(donor, batch), predicted(model, batch)) < 2e-5, (rows, cols)


def test_padding_has_no_effect_and_a_mask_does(tmp_path):
    donor = opened(folder_of(SMALL, tmp_path / "ours"))
    batch = batch_of(8, 12)
    padded = batch.text + 1e6 * ~batch.mask[:, :, None]
    np.testing.assert_array_equal(ours(donor, batch), ours(donor, batch._replace(text=padded.astype(np.float32))))
    assert error(ours(donor, batch._replace(mask=np.ones_like(batch.mask))), ours(donor, batch)) > 1e-2


@pytest.mark.parametrize(
    "cfg",
    [
        SMALL,
        replace(SMALL, null_text=True),
        replace(LIT, null_text=True),
        replace(LIT, filters="channel", window=3),
        replace(LIT, features="focused", interpolation=1.3),
        replace(LIT, filters="none"),
    ],
    ids=["pixart", "with the empty prompt", "lit", "per channel", "focused", "no filters"],
)
def test_pth_there_and_back_and_the_same_function(cfg, tmp_path):
    ours = folder_of(cfg, tmp_path / "ours")
    there = convert(opened(ours), tmp_path / "pth", "pixart")
    back = convert(opened(tmp_path / "pth"), tmp_path / "back", "heirloom")
    for check in (there, back):
        assert check.reference == OWN and 0 < check.max_error < 5e-5 and check.cosine > 0.99999
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()
    assert read_json(tmp_path / "back" / "config.json") == read_json(ours / "config.json")
    state = torch.load(tmp_path / "pth" / "pixart.pth", weights_only=True)["state_dict"]
    assert ("y_embedder.y_embedding" in state) == cfg.null_text
    names = {"q.weight", "q.bias", "kv.weight", "kv.bias"} if cfg.attention == "linear" else {"qkv.weight", "qkv.bias"}
    names |= {"proj.weight", "proj.bias"}
    names |= {"dwc.weight", "dwc.bias"} if cfg.attention == "linear" and cfg.filters != "none" else set()
    names |= {"scale"} if cfg.features == "focused" else set()
    assert {key.removeprefix("blocks.1.attn.") for key in state if key.startswith("blocks.1.attn.")} == names


def test_diffusers_there_and_back(tmp_path):
    theirs_of(tmp_path / "theirs", interpolation_scale=0.5)
    check = convert(opened(tmp_path / "theirs"), tmp_path / "ours", "heirloom")
    assert check.reference == "diffusers" and 0 < check.max_error < 2e-5
    again = convert(opened(tmp_path / "ours"), tmp_path / "back", "diffusers")
    assert again.reference == "diffusers" and 0 < again.max_error < 2e-5
    there, back = open_safetensors(tmp_path / "theirs" / FILE), open_safetensors(tmp_path / "back" / FILE)
    assert there.keys() == back.keys()
    assert all(there[key].tobytes() == back[key].tobytes() for key in there)
    said, written = read_json(tmp_path / "theirs" / "config.json"), read_json(tmp_path / "back" / "config.json")
    assert {key: value for key, value in said.items() if not key.startswith("_diffusers")} == written


def test_pth_to_diffusers_leaves_out_the_empty_prompt_and_says_so(tmp_path):
    cfg = replace(SMALL, null_text=True)
    convert(opened(folder_of(cfg, tmp_path / "ours")), tmp_path / "pth", "pixart", verify=False)
    with pytest.warns(Remark, match="null_text is left out: files of the diffusers format do not hold it"):
        check = convert(opened(tmp_path / "pth"), tmp_path / "diffusers", "diffusers")
    assert check.reference == "diffusers" and check.max_error < 2e-5
    donor = opened(tmp_path / "diffusers", text_tokens=12)
    assert donor.cfg == replace(cfg, null_text=False)
    with pytest.warns(Remark, match="'y_embedder.y_embedding', .* is not written, because this model does not contain"):
        convert(donor, tmp_path / "again", "pixart", verify=False)
    first, second = (torch.load(tmp_path / name / "pixart.pth")["state_dict"] for name in ("pth", "again"))
    assert first.keys() - second.keys() == {"y_embedder.y_embedding"} and not second.keys() - first.keys()
    assert all(torch.equal(first[key], second[key]) for key in second)


def test_an_average_is_preferred_and_older_class_names_are_read(tmp_path):
    convert(opened(folder_of(SMALL, tmp_path / "ours")), tmp_path / "pth", "pixart", verify=False)
    state = torch.load(tmp_path / "pth" / "pixart.pth")["state_dict"]
    average = {key: value + 1 for key, value in state.items() if key != "pos_embed"}
    torch.save({"state_dict": state, "state_dict_ema": average, "epoch": 3}, tmp_path / "both.pth")
    donor = opened(tmp_path / "both.pth", heads=4, size=16, text_tokens=12, interpolation="0.5")
    assert donor.cfg == SMALL
    bias = np.asarray(donor.source.values["final/bias"]).ravel()
    np.testing.assert_array_equal(bias, state["final_layer.linear.bias"].numpy() + 1)

    theirs_of(tmp_path / "theirs")
    config = read_json(tmp_path / "theirs" / "config.json")
    older = dict(num_vector_embeds=None, only_cross_attention=False, use_linear_projection=False)
    older |= dict(double_self_attention=False, _class_name="Transformer2DModel")
    write_json(tmp_path / "theirs" / "config.json", config | older)
    assert convert(opened(tmp_path / "theirs"), tmp_path / "older", "heirloom").reference == "diffusers"


def test_formulas_are_those_of_diffusers(tmp_path):
    """So that a check of a .pth file against our own formulas means something."""
    convert(opened(folder_of(SMALL, tmp_path / "ours")), tmp_path / "theirs", "diffusers", verify=False)
    convert(opened(tmp_path / "ours"), tmp_path / "pth", "pixart", verify=False)
    model = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "theirs")
    state = torch.load(tmp_path / "pth" / "pixart.pth")["state_dict"]
    for rows, cols in ((16, 16), (8, 12)):
        batch = batch_of(rows, cols)
        own = formulas(SMALL, {key: value.numpy() for key, value in state.items()}, batch)
        assert error(own, predicted(model, batch)) < 2e-5
