"""Folders with int8 kernels: written from any dtype, read by anybody, refused when damaged."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from qwix import QArray
from safetensors.numpy import load_file, save_file

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.checkpoint.quantization import quantize_folder
from heirloom.common.checkpoint.quantized import QuantizedView, stored_layer
from heirloom.common.checkpoint.weights import write_config, write_params
from heirloom.common.cli import main
from heirloom.common.errors import InputError, VerificationError
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.graft import graft
from heirloom.common.surgery.plan import Plan
from heirloom.common.train.parameters import finite, load_params, save_params
from heirloom.common.vit.model import Vit, VitConfig
from learngene.zoo import FAMILY

CFG = VitConfig(size=8, patch=4, width=64, heads=4, hidden=64, layers=2, classes=5)
MATMULS = ("attn/key", "attn/out", "attn/query", "attn/value", "mlp/down", "mlp/up")
KERNELS = [f"blocks/{name}/kernel" for name in MATMULS]
UP = "blocks/mlp/up/kernel"


@pytest.fixture(scope="module")
def params(draw):
    return draw(functional(Vit, CFG).spec)


@pytest.fixture(scope="module")
def write(params, tmp_path_factory):
    """`write(dtype, **other)`: a weights folder of ours with these parameters, and others in place of some."""

    def write(dtype=np.float32, **other):
        folder = tmp_path_factory.mktemp("vit")
        write_params(folder, params | other, dtype)
        write_config(folder, FAMILY.name, CFG)
        return folder

    return write


@pytest.fixture(scope="module")
def small(write, tmp_path_factory):
    made = tmp_path_factory.mktemp("quantised") / "small"
    assert quantize_folder(open_donor(write(), [FAMILY]), made).passed
    return made


def test_any_reader_gets_the_weights_as_a_product(small, params):
    tensors = load_file(small / "model.safetensors")
    assert json.loads((small / "config.json").read_text())["quantized"] == "int8"
    assert sorted(key for key, value in tensors.items() if value.dtype == np.int8) == KERNELS
    assert {key for key in tensors if key.endswith(".scale")} == {f"{key}.scale" for key in KERNELS}
    for path, value in params.items():
        if path not in KERNELS:
            np.testing.assert_array_equal(tensors[path], value, err_msg=path)
            continue
        scale = tensors[f"{path}.scale"]
        assert np.abs(tensors[path] * scale - value).max() <= scale.max() / 2 * 1.0001
    assert tensors[f"{UP}.scale"].shape == (2, 1, 64)


def test_a_bfloat16_source_keeps_its_other_leaves_and_has_the_scales_of_its_values(write, params, tmp_path):
    quantize_folder(open_donor(write(ml_dtypes.bfloat16), [FAMILY]), tmp_path / "small", verify=False)
    donor = open_donor(tmp_path / "small", [FAMILY])
    rounded = params[UP].astype(ml_dtypes.bfloat16).astype(np.float32)
    view = donor.source.values[UP]
    np.testing.assert_allclose(view.parts.scales, np.abs(rounded).max(1, keepdims=True) / 127.5, rtol=1e-6)
    assert (np.abs(np.asarray(view) - rounded) <= view.parts.scales / 2 * 1.00002).all()
    assert donor.source.values["norm/scale"].dtype == ml_dtypes.bfloat16 and donor.source.spec[UP].dtype == np.float32


def test_views_are_read_dequantised_whole_by_layer_and_by_graft(small):
    donor = open_donor(small, [FAMILY])
    tensors = load_file(small / "model.safetensors")
    wide = tensors[UP] * tensors[f"{UP}.scale"]
    view = donor.source.values[UP]
    assert isinstance(view, QuantizedView) and view.dtype == np.float32 and donor.quantized == "int8"
    np.testing.assert_array_equal(np.asarray(view), wide)
    np.testing.assert_array_equal(view.layer(1), wide[1])
    np.testing.assert_array_equal(np.stack(list(view.parts)), wide)
    layer = stored_layer(view, 1)
    assert isinstance(layer, QArray) and layer.qvalue.dtype == np.int8
    np.testing.assert_array_equal(layer.qvalue * layer.scale, wide[1])
    norm = donor.source.values["blocks/mlp_norm/scale"]
    np.testing.assert_array_equal(stored_layer(norm, 1), tensors["blocks/mlp_norm/scale"][1])
    inherited = graft(Plan((("**", {}),)), donor.source, donor.model.spec, None, lambda **_: {})
    np.testing.assert_array_equal(inherited[UP], wide)


def test_outputs_of_the_loaded_int8_kernels_are_those_of_the_dequantised(small, write):
    donor = open_donor(small, [FAMILY])
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=jax.devices()[:1])
    loaded = load_params(donor, mesh)
    assert [path for path, value in loaded.items() if isinstance(value, QArray)] == KERNELS
    assert list(loaded) == list(donor.model.spec) and loaded[UP].qvalue.dtype == np.int8
    wide = {path: np.asarray(value) for path, value in donor.source.values.items()}
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    found, expected = (jax.jit(donor.model.apply)(values, x) for values in (loaded, wide))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    record = json.loads((small / "verify.json").read_text())
    assert record["reference"] == "the unquantised weights" and 1e-4 < record["max_error"] < 0.03
    assert record["cosine"] > 0.999 and record["quantized"]["bytes"] < 0.45 * record["quantized"]["source_bytes"]


def test_scales_are_split_over_devices_as_the_outputs_of_their_kernels(small, monkeypatch):
    from heirloom.common import mesh as meshes

    monkeypatch.setattr(meshes, "REPLICATE_BELOW", 1024)
    donor = open_donor(small, [FAMILY])
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    one = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=jax.devices()[:1])
    split, whole = load_params(donor, mesh), load_params(donor, one)
    assert tuple(split[UP].qvalue.sharding.spec) == (None, "fsdp", "tensor")
    assert tuple(split[UP].scale.sharding.spec) == (None, None, "tensor")
    down = split["blocks/mlp/down/kernel"]
    assert tuple(down.qvalue.sharding.spec) == (None, "tensor", "fsdp") and tuple(down.scale.sharding.spec)[2] == "fsdp"
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    with jax.set_mesh(mesh):
        found = jax.jit(donor.model.apply)(split, x)
    np.testing.assert_allclose(found, jax.jit(donor.model.apply)(whole, x), rtol=1e-5, atol=1e-5)


def test_what_is_loaded_can_be_saved_and_is_the_same_file(small, tmp_path):
    donor = open_donor(small, [FAMILY])
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=jax.devices()[:1])
    save_params(tmp_path / "again", FAMILY.name, CFG, load_params(donor, mesh), lambda folder: None)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantized"] == "int8"
    before, after = (load_file(folder / "model.safetensors") for folder in (small, tmp_path / "again"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value, err_msg=key)


@pytest.mark.parametrize(
    ("role", "said"),
    [("teacher", "and computes with its rounded kernels"), ("donor", "and gives its rounded kernels as float32")],
)
def test_a_quantised_teacher_or_donor_is_remarked(small, remarks, role, said):
    finite(open_donor(small, [FAMILY]), role)
    assert remarks() == [f"{small}: the {role} is quantised (int8), {said}"]


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_kernel_that_is_not_finite_is_refused_and_nothing_is_written(write, params, tmp_path, value):
    broken = params[UP].copy()
    broken[1, 3, 7] = value
    source = write(**{UP: broken})
    with pytest.raises(InputError, match=rf"^{source}: {UP} holds NaN or infinity, which int8 cannot express"):
        quantize_folder(open_donor(source, [FAMILY]), tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_differ_too_much_are_not_written(write, params, tmp_path):
    """One outlier per channel leaves a step larger than all other values: what they computed is lost."""
    other = {path: params[path].copy() for path in KERNELS}
    for kernel in other.values():
        kernel.reshape(2, 64, 64)[:, 0] = 1e4
    other |= {"blocks/attn_norm/scale": params["blocks/attn_norm/scale"] * (np.arange(64) > 0)}
    source = open_donor(write(**other), [FAMILY])
    said = r"was not written: compared .*, cosine 0\.[0-8].*; --no-verify writes it all the same"
    with pytest.raises(VerificationError, match=said):
        quantize_folder(source, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []
    quantize_folder(source, tmp_path / "small", verify=False)
    assert json.loads((tmp_path / "small" / "verify.json").read_text())["note"] == "not asked for"


DAMAGE = {
    "scales that are missing": ({f"{UP}.scale": None}, rf"tensor '{UP}.scale' is missing: '{UP}' has integers"),
    "scales of zero": ({f"{UP}.scale": np.zeros((2, 1, 64), np.float32)}, "scales that are not positive numbers"),
    "scales of another shape": (
        {f"{UP}.scale": np.ones((2, 64), np.float32)},
        r"is int8 with scales float32 \[2, 64\]; a quantised kernel is int8 with scales float32 \[2, 1, 64\]",
    ),
    "values of another dtype": ({UP: np.ones((2, 64, 64), np.int16)}, f"'{UP}' is int16 with scales float32"),
    "scales of a bias": ({"head/bias.scale": np.ones(5, np.float32)}, "'head/bias' is not the kernel of a matmul"),
    "another tensor": ({"more": np.ones(5, np.float32)}, "tensor 'more' is not part of this heirloom model"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(small, tmp_path, case, capsys):
    changes, message = DAMAGE[case]
    tensors = {k: v for k, v in (load_file(small / "model.safetensors") | changes).items() if v is not None}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((small / "config.json").read_text())
    with pytest.raises(InputError, match=message):
        open_donor(tmp_path, [FAMILY])
    assert main(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_another_kind_of_kernels_is_named(small, tmp_path):
    config = json.loads((small / "config.json").read_text()) | {"quantized": "int3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json: quantized is 'int3', known is 'int8'"):
        open_donor(tmp_path, [FAMILY])


REFUSED = {
    "twice": (["--quantize", "int8"], "is quantised already (int8); give the weights it was made from"),
    "to another format": (["--to", "hf"], "is quantised (int8); convert the weights it was made from"),
    "both": (["--to", "hf", "--quantize", "int8"], "--quantize int8 writes a folder of heirloom; leave out --to hf"),
    "another width": (["--quantize", "int4"], "argument --quantize: invalid choice: 'int4' (choose from"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_said_in_one_line(small, tmp_path, case, capsys):
    flags, message = REFUSED[case]
    assert main(["convert", str(small), str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_a_model_without_large_kernels_is_refused(draw, tmp_path):
    cfg = VitConfig(size=8, patch=4, width=16, heads=4, hidden=16, layers=1, classes=5)
    write_params(tmp_path, draw(functional(Vit, cfg).spec))
    write_config(tmp_path, FAMILY.name, cfg)
    with pytest.raises(InputError, match="this model has no kernel that int8 would help"):
        quantize_folder(open_donor(tmp_path, [FAMILY]), tmp_path / "small")
