"""A DiT with int8 kernels: its error, its memory, and the commands that read it."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import lit_jax
from heirloom.common import config
from heirloom.common.checkpoint.quantized import QuantizedView
from heirloom.common.cli import main
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from heirloom.common.nn.quantized import QArray, quantizable, scale_shape
from lit_jax.dit import Dit, DitConfig
from lit_jax.zoo import open_dit

FAST = dict(sampler="ddim", steps=2)


@pytest.fixture(scope="module")
def digits(one_device, tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "int8"
    assert main(["convert", "embedded:digits_dit", str(folder), "--quantize", "int8"]) == 0
    return folder


def test_the_error_of_the_digits_is_measured_and_small(digits, tmp_path, capsys):
    record = json.loads((digits / "verify.json").read_text())
    assert record["max_error"] < 5e-3 and record["cosine"] > 0.99999
    capsys.readouterr()
    assert main(["inspect", str(digits), "--json", str(tmp_path / "about.json")]) == 0
    assert (
        "0.8 MB on disk, kernels in int8 (before: 1.5 MB); outputs against the unquantised: largest relative error"
        f" {record['max_error']:.1e}, cosine {record['cosine']:.6f}"
    ) in capsys.readouterr().out.splitlines()
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["file"]["bytes"] == (digits / "model.safetensors").stat().st_size
    assert about["file"]["max_error"] == record["max_error"] and about["parameters"]["total"] == 726_552


def test_the_command_and_the_notebook_draw_the_digits(digits, tmp_path):
    out = tmp_path / "grid.png"
    how = ["--steps", "2", "--sampler", "ddim", "--count", "1", "--class", "3"]
    assert main(["sample", str(digits), *how, "--out", str(out)]) == 0 and out.is_file()
    loaded = lit_jax.load(str(digits))
    assert isinstance(loaded.params["blocks/mlp/up/kernel"], QArray)
    drawn, full = (model.sample(3, **FAST).astype(int) for model in (loaded, lit_jax.load("embedded:digits_dit")))
    assert np.abs(drawn - full).mean() < 1 and np.ptp(full) > 100
    loaded.save(tmp_path / "again")
    again = lit_jax.load(str(tmp_path / "again")).params
    for path, value in loaded.params.items():
        jax.tree.map(np.testing.assert_array_equal, again[path], value)


def test_the_kernels_of_all_matmuls_are_quantised(digits):
    donor = open_dit(str(digits))
    left = [path for path, value in donor.source.values.items() if not isinstance(value, QuantizedView)]
    kernels = [path for path in left if path.endswith("kernel")]
    assert kernels == ["final/kernel", "patch/project/kernel"]


def test_compiling_with_a_quantised_teacher_is_refused(digits):
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=jax.devices()[:1])
    with pytest.raises(InputError, match=f"^{digits} is quantised: name the weights it was made from to compile"):
        config.load("lit/digits", ["--teacher", str(digits)]).abstract(mesh)


def abstract(path, leaf, kind):
    """A parameter as shapes: float32, or an int8 kernel."""
    if kind == "f32" or not quantizable(path, leaf):
        return jax.ShapeDtypeStruct(leaf.shape, np.float32)
    values, scales = ((leaf.shape, np.int8), (scale_shape(leaf), np.float32))
    return QArray(jax.ShapeDtypeStruct(*values), jax.ShapeDtypeStruct(*scales))


def test_one_layer_is_wide_at_a_time():
    """Arguments and temporaries of a forward pass of 12 layers, as the compiler counts them, in int8 and float32."""
    dit = DitConfig(size=8, channels=4, patch=2, width=256, layers=12, heads=4, hidden=1024, classes=10)
    for cfg in (dit, replace(dit, attention="linear")):
        model, used = functional(Dit, cfg), {}
        for kind in ("f32", "int8"):
            params = {path: abstract(path, leaf, kind) for path, leaf in model.spec.items()}
            given = [jax.ShapeDtypeStruct(s, d) for s, d in (((1, 8, 8, 4), "f4"), ((1,), "f4"), ((1,), "i4"))]
            memory = jax.jit(model.apply).lower(params, *given).compile().memory_analysis()
            used[kind] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        layer = 4 * sum(leaf.extent("read", "write") for path, leaf in model.spec.items() if path.startswith("blocks"))
        assert used["int8"] < used["f32"] / 4 + layer
