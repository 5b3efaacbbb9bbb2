"""diffusers' DiT in and out, bit for bit, and what its class computes differently."""

import shutil

import jax
import numpy as np
import pytest

from common.checkpoint.convert import convert, open_donor
from common.checkpoint.weights import create_safetensors, open_safetensors, read_json
from common.errors import InputError
from common.nn.functional import functional
from common.surgery.layout import Tensor
from lit_jax import dit
from lit_jax.zoo import FAMILY

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def params(golden):
    return {path: np.asarray(view) for path, view in open_donor(golden[0], [FAMILY]).source.values.items()}


def predict(cfg, params, inputs):
    return np.asarray(functional(dit.Dit, cfg).apply(params, inputs["x"], inputs["t"], inputs["labels"]))


def test_with_the_two_deviations_of_diffusers_ours_is_its_prediction(golden, params, monkeypatch):
    """Exponents over 127, and an eps of its own before the MLP: everything else agrees, so these are all the differences."""
    folder, inputs = golden
    cfg = open_donor(folder, [FAMILY]).cfg

    def error(name):
        theirs = inputs[name]
        return np.abs(predict(cfg, params, inputs) - theirs).max() / np.abs(theirs).max()

    def features(t):
        angle = np.asarray(t, np.float32)[:, None] * np.exp(-np.log(10000) * np.arange(128) / 127).astype(np.float32)
        return np.concatenate([np.cos(angle), np.sin(angle)], axis=1)

    class WithEps(dit.Block):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.mlp_norm.eps = eps

    assert error("prediction") > 1e-2
    monkeypatch.setattr(dit, "time_features", features)
    assert error("prediction") < 1e-5 and error("prediction_eps") > 1e-3
    monkeypatch.setattr(dit, "Block", WithEps)
    eps = 0.1
    assert error("prediction_eps") < 1e-5
    eps = 1e-5
    assert error("prediction") < 5e-6


def test_round_trip_keeps_every_bit(golden, tmp_path):
    folder, _ = golden
    convert(open_donor(folder, [FAMILY]), tmp_path / "ours", "heirloom")
    convert(open_donor(tmp_path / "ours", [FAMILY]), tmp_path / "back", "diffusers")
    there, back = open_safetensors(folder / FILE), open_safetensors(tmp_path / "back" / FILE)
    assert there.keys() == back.keys()
    for key, value in there.items():
        assert value.tobytes() == back[key].tobytes(), key
    ours, theirs = read_json(tmp_path / "back" / "config.json"), read_json(folder / "config.json")
    assert {k: v for k, v in theirs.items() if not k.startswith("_diffusers")} == ours
    assert read_json(tmp_path / "ours" / "provenance.json")["parameters"]["blocks/attn/key/kernel"]["source"].endswith("attn1.to_k.weight")


def test_embedders_that_differ_between_blocks_are_refused(golden, tmp_path):
    folder, _ = golden
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    tensors = {key: np.array(value) for key, value in open_safetensors(folder / FILE).items()}
    tensors["transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.weight"][0, 0] += 1
    with create_safetensors(broken / FILE, {key: Tensor(x.shape, x.dtype) for key, x in tensors.items()}) as out:
        for key, x in tensors.items():
            out[key][...] = x
    with pytest.raises(InputError, match="differs from layer to layer"):
        open_donor(broken, [FAMILY])


@pytest.mark.parametrize(("field", "value"), [("norm_type", "layer_norm"), ("attention_bias", False), ("out_channels", 4)])
def test_other_transformers_are_refused_by_name(golden, tmp_path, field, value):
    import json

    folder, _ = golden
    shutil.copytree(folder, tmp_path / "other")
    config = read_json(folder / "config.json") | {field: value}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=field):
        open_donor(tmp_path / "other", [FAMILY])


def test_linear_attention_has_no_place_in_diffusers(lit, draw, tmp_path):
    from common.checkpoint import weights

    params = draw(functional(dit.Dit, lit).spec)
    (tmp_path / "lit").mkdir()
    weights.write_params(tmp_path / "lit", params)
    weights.write_config(tmp_path / "lit", "lit", lit)
    with pytest.raises(InputError, match="no linear attention"):
        convert(open_donor(tmp_path / "lit", [FAMILY]), tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()
    loaded = open_donor(tmp_path / "lit", [FAMILY])
    assert loaded.cfg == lit
    np.testing.assert_array_equal(jax.tree.leaves(dict(loaded.source.values))[0], jax.tree.leaves(params)[0])
