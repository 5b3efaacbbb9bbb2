"""diffusers' DiT in and out, bit for bit, and what its class computes differently."""

import json
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from heirloom.common.checkpoint.convert import convert, first_format, open_donor
from heirloom.common.checkpoint.weights import create_safetensors, open_safetensors
from heirloom.common.errors import InputError
from heirloom.common.files import read_json
from heirloom.common.mesh import start
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.layout import Tensor
from lit_jax import dit
from lit_jax.autoencoder import AutoencoderConfig
from lit_jax.components import other_scale, pipeline_of
from lit_jax.decode import no_pictures, pictures_of
from lit_jax.origin import Origin, write_origin
from lit_jax.verify import AsDiffusers
from lit_jax.zoo import FAMILY

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def params(golden):
    return {path: np.asarray(view) for path, view in open_donor(golden[0], [FAMILY]).source.values.items()}


def predict(module, cfg, params, inputs):
    return np.asarray(functional(module, cfg).apply(params, inputs["x"], inputs["t"], inputs["labels"]))


def test_with_the_two_deviations_of_diffusers_ours_is_its_prediction(golden, params):
    """Exponents over 127, and an eps of its own before the MLP: everything else agrees, so these are all the
    differences.
    """
    folder, inputs = golden
    cfg = open_donor(folder, [FAMILY]).cfg

    def error(name, module):
        theirs = inputs[name]
        return np.abs(predict(module, cfg, params, inputs) - theirs).max() / np.abs(theirs).max()

    assert error("prediction", dit.Dit) > 1e-2
    assert error("prediction_eps", partial(AsDiffusers, eps=1e-5)) > 1e-3
    assert error("prediction_eps", partial(AsDiffusers, eps=0.1)) < 1e-5
    assert error("prediction", partial(AsDiffusers, eps=1e-5)) < 5e-6


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
    assert read_json(tmp_path / "ours" / "provenance.json")["parameters"]["blocks/attn/key/kernel"]["source"].endswith(
        "attn1.to_k.weight"
    )


def test_what_was_converted_is_foreign_still_and_keeps_its_pipeline(golden, tmp_path, remarks):
    """Nothing in it says whose latents, or whether pixels, it draws."""
    root, ours = tmp_path / "pipeline", tmp_path / "ours"
    shutil.copytree(golden[0], root / "transformer")
    (root / "model_index.json").write_text("{}")
    convert(open_donor(root / "transformer", [FAMILY]), ours, "heirloom", verify=False)
    donor = open_donor(ours, [FAMILY])
    assert pipeline_of(donor) == root and first_format(donor) == "diffusers"
    assert "cache has latents with scaling_factor 0.5, and published models" in other_scale(donor, 0.5, "cache")
    pixels, mesh = replace(donor, cfg=replace(donor.cfg, channels=3)), start()
    remarks()
    assert pictures_of(pixels, "", mesh) is not None and "its 3 channels are taken for pixels" in remarks()[0]
    record = read_json(ours / "provenance.json")
    (ours / "provenance.json").write_text(json.dumps(record | {"format": "heirloom"}))  # converted once more
    assert first_format(donor) == "diffusers"
    write_origin(ours, Origin(AutoencoderConfig()))
    assert other_scale(donor, 0.5, "cache") == ""


def test_embedders_that_differ_between_blocks_are_refused(golden, tmp_path):
    folder, _ = golden
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    tensors = {key: np.array(value) for key, value in open_safetensors(folder / FILE).items()}
    tensors["transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.weight"][0, 0] += 1
    with create_safetensors(broken / FILE, {key: Tensor(x.shape, x.dtype) for key, x in tensors.items()}) as out:
        for key, x in tensors.items():
            out[key][...] = x
    with pytest.raises(
        InputError, match=r"differs from layer to layer.*only DiTs that were converted to diffusers are read"
    ):
        open_donor(broken, [FAMILY])


def with_config(golden, folder, **fields):
    """The golden model with another config."""
    shutil.copytree(golden[0], folder)
    config = {k: v for k, v in (read_json(golden[0] / "config.json") | fields).items() if v != "left out"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(norm_type="layer_norm"), "norm_type is 'layer_norm'; only models where it is 'ada_norm_zero'"),
        (dict(attention_bias=False), "attention_bias is False"),
        (dict(attention_bias=1), "attention_bias is 1"),
        (dict(out_channels=4), r"out_channels is 4; only DiTs that predict noise and variance \(8\)"),
        (dict(out_channels="left out"), "out_channels is 4"),
        (dict(norm_eps=1e-3), "norm_eps is 0.001"),
        (dict(activation_fn="geglu"), "activation_fn is 'geglu'"),
        (dict(_class_name="PixArtTransformer2DModel"), "_class_name is 'PixArt"),
        (dict(sample_size=[8, 16]), r"sample_size is \[8, 16\]; only squares"),
        (dict(num_layers="2"), "num_layers is '2', and must be a whole number"),
        (dict(cross_attention_dim=1152), "cross_attention_dim is 1152"),
        (dict(rope=True), "the field 'rope' .True. is not known here"),
        (dict(num_attention_heads=4), "has shape"),
        (dict(num_embeds_ada_norm=7), "has shape"),
    ],
)
def test_other_transformers_are_refused_by_name(golden, tmp_path, fields, words):
    with pytest.raises(InputError, match=words) as error:
        open_donor(with_config(golden, tmp_path / "other", **fields), [FAMILY])
    assert "\n" not in str(error.value)


def test_an_average_of_diffusers_own_says_how_it_was_made(golden, tmp_path):
    ema = dict(decay=0.9999, min_decay=0.0, inv_gamma=1.0, power=2 / 3, optimization_step=500, update_after_step=0)
    folder = with_config(golden, tmp_path / "transformer_ema", **ema, use_ema_warmup=False)
    assert open_donor(folder, [FAMILY]).cfg == open_donor(golden[0], [FAMILY]).cfg


def test_a_model_of_one_channel_is_not_told_to_take_an_autoencoder_for_latents(tmp_path):
    one, four = (SimpleNamespace(path="x", folder=tmp_path, cfg=dit.DitConfig(channels=n)) for n in (1, 4))
    assert "x outputs 1 channel, and pictures have 3" in str(no_pictures(one))
    assert "this model outputs latents: decode them with --autoencoder SOURCE" in str(no_pictures(four))


def test_what_older_configs_say_is_read(golden, tmp_path):
    """The published ones are of the class that had many kinds of transformers; a size may be a list."""
    unused = dict(
        num_vector_embeds=None, cross_attention_dim=None, only_cross_attention=False, use_linear_projection=False
    )
    old = dict(_class_name="Transformer2DModel", sample_size=[8, 8], norm_eps="left out", **unused)
    assert open_donor(with_config(golden, tmp_path / "old", **old), [FAMILY]).cfg == open_donor(golden[0], [FAMILY]).cfg


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (dict(_class_name="DDIMScheduler", prediction_type="epsilon", beta_schedule="linear"), None),
        (dict(_class_name="DDIMScheduler", prediction_type="v_prediction"), "prediction_type is 'v_prediction'"),
        (dict(_class_name="DDIMScheduler", prediction_type="sample"), "prediction_type is 'sample'"),
        (dict(_class_name="DDPMScheduler", beta_schedule="squaredcos_cap_v2"), "beta_schedule is"),
        (dict(_class_name="DPMSolverMultistepScheduler", use_flow_sigmas=True), "use_flow_sigmas is True"),
        (dict(_class_name="LCMScheduler"), "LCMScheduler samples models of another kind"),
        (
            dict(_class_name="FlowMatchEulerDiscreteScheduler"),
            "FlowMatchEulerDiscreteScheduler samples models of another kind",
        ),
    ],
)
@pytest.mark.parametrize("place", [".", "../scheduler"])
def test_the_scheduler_next_door_says_what_is_predicted(golden, tmp_path, scheduler, words, place):
    folder = with_config(golden, tmp_path / "transformer")
    assert [guess.name for guess in open_donor(folder, [FAMILY]).guesses] == ["prediction"]
    (folder / place).mkdir(exist_ok=True)
    (folder / place / "scheduler_config.json").write_text(json.dumps(scheduler))
    if words is None:
        assert open_donor(folder, [FAMILY]).guesses == ()
    else:
        with pytest.raises(InputError, match=words):
            open_donor(folder, [FAMILY])


def test_linear_attention_has_no_place_in_diffusers(lit, draw, tmp_path):
    from heirloom.common.checkpoint import weights

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
