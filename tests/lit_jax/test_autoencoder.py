"""The autoencoder: what diffusers computed from a small one, and the way back bit for bit."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.weights import create_safetensors, open_safetensors
from heirloom.common.errors import InputError
from heirloom.common.files import read_json
from heirloom.common.nn.conv import Conv
from heirloom.common.nn.functional import functional
from heirloom.common.nn.norm import GroupNorm
from heirloom.common.surgery.layout import Tensor
from lit_jax.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    Moments,
    macs,
    parameters,
    sample_latents,
    scale_latents,
    unscale_latents,
)
from lit_jax.autoencoder_layouts import DIFFUSERS, FAMILY

GOLDEN = Path(__file__).parents[1] / "golden" / "autoencoder"
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def donor():
    return open_donor(GOLDEN, [FAMILY])


@pytest.fixture(scope="module")
def params(donor):
    return {path: np.asarray(view) for path, view in donor.source.values.items()}


@pytest.fixture(scope="module")
def expected():
    """Inputs as f32, and what diffusers made of them."""
    arrays = dict(np.load(GOLDEN / "expected.npz"))
    return arrays | {name: arrays[name].astype(np.float32) / 64 for name in ("images", "latents")}


@pytest.fixture(scope="module")
def decode(donor, params):
    return partial(jax.jit(partial(donor.model.apply, method="decode")), params)


def relative(got, expected):
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


def test_moments_of_odd_pictures_are_diffusers(donor, params, expected):
    """41 x 55: every step down leaves a row or a column over, which the padding on one side decides about."""
    got = jax.jit(partial(donor.model.apply, method="encode"))(params, expected["images"])
    assert got.mean.shape == (2, 10, 13, 4) and got.mean.dtype == got.logvar.dtype == jnp.float32
    # Sums in another order: 1e-4 is the bound for whole models, 1e-5 what is reached.
    assert relative(got.mean, expected["mean"]) < 1e-5
    assert relative(got.logvar, expected["logvar"]) < 1e-5
    assert (expected["logvar"].min(), expected["logvar"].max()) == (-30, 20)  # so the clipping was seen too


def test_decoded_latents_are_diffusers(decode, expected):
    got = decode(expected["latents"])
    assert got.shape == (2, 28, 20, 3)
    assert relative(got, expected["decoded"]) < 1e-5


@pytest.mark.parametrize("change", [dict(groups=4), dict(groups=1)])
def test_the_golden_tells_wrong_groups(change, donor, params, expected):
    model = functional(Autoencoder, replace(donor.cfg, **change))
    assert (
        relative(jax.jit(partial(model.apply, method="decode"))(params, expected["latents"]), expected["decoded"])
        > 1e-2
    )


def test_parameters_are_the_published_ones():
    """Spec 7.4: 83,653,863; the halves by hand, from nine times in times out."""
    found = parameters(functional(Autoencoder, AutoencoderConfig()).spec)
    assert found == {"encoder": 34_163_592 + 72, "decoder": 49_490_179 + 20, "total": 83_653_863}


def test_macs_are_the_formulas():
    cfg = AutoencoderConfig(channels=(4, 8, 8), resnets=2, groups=2, size=16)
    middle = 16 * (4 * 9 * 8 * 8 + 4 * 8 * 8) + 2 * 16**2 * 8
    down = (
        256 * 4 * 9 * 4 * 4
        + 64 * 9 * 4 * 4
        + 64 * (9 * 4 * 8 + 4 * 8 + 3 * 9 * 8 * 8)
        + 16 * 9 * 8 * 8
        + 16 * 4 * 9 * 8 * 8
    )
    up = (
        16 * 6 * 9 * 8 * 8
        + 64 * 9 * 8 * 8
        + 64 * 6 * 9 * 8 * 8
        + 256 * 9 * 8 * 8
        + 256 * (9 * 8 * 4 + 8 * 4 + 5 * 9 * 4 * 4)
    )
    ends = 256 * 9 * 3 * 4 + 16 * (9 * 8 * 8 + 8 * 8) + 16 * (4 * 4 + 9 * 4 * 8) + 256 * 9 * 4 * 3
    assert macs(cfg, functional(Autoencoder, cfg).spec) == 2 * middle + down + up + ends


def test_latents_are_scaled_once():
    cfg = AutoencoderConfig(scaling_factor=0.13025)
    moments = Moments(jnp.full((1, 2, 2, 4), 3.0, jnp.float16), jnp.full((1, 2, 2, 4), -30.0, jnp.float16))
    latents = sample_latents(cfg, moments, jax.random.key(0))
    assert latents.dtype == jnp.float32
    np.testing.assert_allclose(latents, 3 * 0.13025, rtol=1e-6)
    np.testing.assert_allclose(unscale_latents(cfg, latents), 3, rtol=1e-6)
    np.testing.assert_allclose(scale_latents(cfg, jnp.float32(2)), 0.2605, rtol=1e-6)


def test_samples_have_the_moments():
    cfg, shape = AutoencoderConfig(), (64, 8, 8, 4)
    moments = Moments(jnp.full(shape, 2.0), jnp.full(shape, 2 * np.log(3.0)))
    latents = sample_latents(cfg, moments, jax.random.key(0)) / cfg.scaling_factor
    # 16,384 draws: the standard errors are 0.023 and 0.017.
    assert abs(float(latents.mean()) - 2) < 0.1 and abs(float(latents.std()) - 3) < 0.07


def test_group_norm_is_the_formula():
    norm = GroupNorm(6, groups=3, eps=0.5, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = jnp.arange(1.0, 7), jnp.arange(6.0)
    x = np.random.default_rng(0).normal(3, 2, (2, 3, 5, 6)).astype(np.float32)
    groups = x.astype(np.float64).reshape(2, 15, 3, 2)
    mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    want = ((groups - mean) / np.sqrt(variance + 0.5)).reshape(x.shape) * np.arange(1, 7) + np.arange(6)
    np.testing.assert_allclose(norm(x), want, atol=1e-5)
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 1, None), (3, 2, (0, 1)), (1, 1, None), (2, 1, None)])
def test_convolution_is_a_sum_over_shifts(size, stride, padding):
    conv = Conv(3, 4, size=size, stride=stride, padding=padding, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 7, 6, 3)).astype(np.float32)
    pad = padding or (size // 2, (size - 1) // 2)
    padded, kernel = np.pad(x, ((0, 0), pad, pad, (0, 0))), np.asarray(conv.kernel[...])
    height, width = ((n + sum(pad) - size) // stride + 1 for n in (7, 6))
    want = sum(
        padded[:, r : r + stride * (height - 1) + 1 : stride, c : c + stride * (width - 1) + 1 : stride] @ kernel[r, c]
        for r in range(size)
        for c in range(size)
    )
    np.testing.assert_allclose(conv(x), want + np.asarray(conv.bias[...]), atol=1e-5)
    assert abs(conv.bias[...]).max() <= (3 * size**2) ** -0.5


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(InputError, match="32 groups do not divide 48 channels"):
        AutoencoderConfig(channels=(32, 48))


def test_the_way_there_and_back_keeps_every_bit(donor, tmp_path):
    check = convert(donor, tmp_path / "ours", "heirloom", verify=False)
    assert check.passed
    ours = open_donor(tmp_path / "ours", [FAMILY])
    assert ours.cfg == donor.cfg and ours.format == "heirloom"
    convert(ours, tmp_path / "back", "diffusers", verify=False)
    original, returned = (open_safetensors(folder / FILE) for folder in (GOLDEN, tmp_path / "back"))
    assert returned.keys() == original.keys()
    for key, value in original.items():
        assert value.tobytes() == returned[key].tobytes() and value.shape == returned[key].shape, key
    record = read_json(tmp_path / "ours" / "provenance.json")["parameters"]["decoder/up/1/resnets/0/conv1/kernel"]
    assert record["source"] == f"{FILE}:decoder.up_blocks.1.resnets.0.conv1.weight"
    theirs, written = read_json(GOLDEN / "config.json"), read_json(tmp_path / "back" / "config.json")
    assert {name: theirs[name] for name in written} == written


def test_a_full_size_file_has_248_tensors():
    """Encoder 106, decoder 138, two each of the 1x1 convolutions."""
    assert len(DIFFUSERS.foreign(functional(Autoencoder, AutoencoderConfig()).spec)) == 106 + 138 + 4


@pytest.mark.parametrize("shape", ["linear", "conv"])
def test_older_names_of_the_attention_are_read(shape, donor, tmp_path):
    """query, key, value and proj_attn, as matrices or as 1x1 convolutions; current names are written."""
    names = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}

    def old(key):
        for new, before in names.items():
            key = key.replace(new, before)
        return key

    tensors = {old(key): np.array(value) for key, value in open_safetensors(GOLDEN / FILE).items()}
    attention = [key for key in tensors if any(name in key for name in names.values()) and key.endswith("weight")]
    assert len(attention) == 8
    if shape == "conv":
        tensors |= {key: tensors[key][:, :, None, None] for key in attention}
    folder = tmp_path / "old"
    folder.mkdir()
    shutil.copy(GOLDEN / "config.json", folder)
    rewrite(folder / FILE, tensors)
    opened = open_donor(folder, [FAMILY])
    for path, value in donor.source.values.items():
        np.testing.assert_array_equal(np.asarray(opened.source.values[path]), np.asarray(value), err_msg=path)
    convert(opened, tmp_path / "ours", "heirloom", verify=False)
    convert(open_donor(tmp_path / "ours", [FAMILY]), tmp_path / "new", "diffusers", verify=False)
    assert open_safetensors(tmp_path / "new" / FILE)["encoder.mid_block.attentions.0.to_q.weight"].shape == (8, 8)


def rewrite(file, tensors):
    with create_safetensors(file, {key: Tensor(value.shape, value.dtype) for key, value in tensors.items()}) as out:
        for key, value in tensors.items():
            out[key][...] = value


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(act_fn="relu"), "act_fn is 'relu'; only models where it is 'silu' or 'swish'"),
        (dict(shift_factor=0.1), "shift_factor is 0.1, and must be None: the autoencoder of Stable Diffusion 3, FLUX"),
        (
            dict(use_quant_conv=False),
            "use_quant_conv is False, and must be True: the autoencoder of Stable Diffusion 3, FLUX",
        ),
        (dict(latents_mean=[0.1] * 4), r"latents_mean is \[0.1, 0.1, 0.1, 0.1\]"),
        (dict(mid_block_add_attention=False), "mid_block_add_attention is False"),
        (dict(_class_name="AsymmetricAutoencoderKL"), "_class_name is 'AsymmetricAutoencoderKL'"),
        (dict(scaling_factor=0), "scaling_factor is 0, and must be a finite number"),
        (dict(scaling_factor="0.18215"), "scaling_factor is '0.18215', and must be a number"),
        (dict(in_channels=1), "in_channels is 1"),
        (dict(quantization_config={}), "the field 'quantization_config' .{}. is not known here"),
        (dict(down_block_types=["AttnDownEncoderBlock2D"]), r"down_block_types is \['AttnDownEncoderBlock2D'\]"),
        (dict(norm_num_groups=3), "3 groups do not divide 4 channels"),
        (
            dict(block_out_channels=[4, 8]),
            r"down_block_types is .* only models where it is \['DownEncoderBlock2D', 'DownEncoderBlock2D'\]",
        ),
        (dict(layers_per_block=1), r"resnets\..* is not part of this diffusers model"),
    ],
)
def test_another_kind_of_autoencoder_is_refused(fields, message, tmp_path):
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "other"))
    (folder / "config.json").write_text(json.dumps(read_json(GOLDEN / "config.json") | fields))
    with pytest.raises(InputError, match=message) as error:
        open_donor(folder, [FAMILY])
    assert "\n" not in str(error.value)


def test_weights_without_config_and_with_flags_of_others_are_refused(tmp_path):
    shutil.copy(GOLDEN / FILE, tmp_path)
    with pytest.raises(InputError, match=r"needs its config\.json next to the weights"):
        open_donor(tmp_path, [FAMILY])
    with pytest.raises(InputError, match="'activation' cannot be set for this model"):
        open_donor(GOLDEN, [FAMILY], activation="gelu")
    with pytest.raises(InputError, match="there is no field"):
        FAMILY.config({"channels": [32], "widths": 3})


def test_neighbours_are_refused_by_name(tmp_path):
    tensor = np.zeros(1, np.float32)
    for key, words in (
        ("first_stage_model.encoder.down.0.block.0.norm1.weight", "CompVis' names: .*from_single_file"),
        ("encoder.down.0.block.0.norm1.weight", "CompVis' names.*for SDXL's, .*config='stabilityai/sdxl-vae'"),
        ("decoder.up_blocks.0.resnets.0.norm1.weight", "half an AutoencoderKL, without its encoder"),
    ):
        rewrite(tmp_path / "other.safetensors", {key: tensor})
        with pytest.raises(InputError, match=words):
            open_donor(tmp_path / "other.safetensors", [FAMILY])


@pytest.mark.parametrize("kind", ["AutoencoderKLTemporalDecoder", "ConsistencyDecoderVAE", "AutoencoderDC", "VQModel"])
def test_other_classes_of_autoencoders_are_named(kind, tmp_path):
    rewrite(tmp_path / FILE, {"decoder.up_blocks.0.resnets.0.norm1.weight": np.zeros(1, np.float32)})
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(InputError, match=f"_class_name is '{kind}'; only models where it is 'AutoencoderKL' or"):
        open_donor(tmp_path, [FAMILY])


def test_settings_that_change_nothing_are_read(donor, tmp_path):
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "same"))
    side = donor.cfg.size
    same = dict(force_upcast=False, sample_size=[side, side], act_fn="swish", shift_factor=None, _name_or_path="x")
    (folder / "config.json").write_text(json.dumps(read_json(GOLDEN / "config.json") | same))
    assert open_donor(folder, [FAMILY]).cfg == donor.cfg


def test_without_torch_the_check_says_what_it_did_not_do(donor, monkeypatch):
    monkeypatch.setattr("heirloom.common.checkpoint.verify.importable", lambda *names: False)
    check = FAMILY.verify(donor.cfg, donor.source.values, donor.file, "diffusers")
    assert check.passed and check.reference is None and "structure and finiteness only" in check.note
    values = {path: np.array(view) for path, view in donor.source.values.items()}
    values["decoder/output/bias"][0] = np.nan
    check = FAMILY.verify(donor.cfg, values, donor.file, "heirloom")
    assert not check.passed and check.note == "latents or pictures are not finite"
