"""`heirloom compile` on toy recipes: what it says of memory, communication and work."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from heirloom.common import config
from heirloom.common.cli import main
from heirloom.common.compile import Topology, compile_for, describe, mesh_on
from heirloom.common.errors import InputError
from heirloom.common.hlo import collectives
from heirloom.common.mesh import MeshConfig


def test_a_step_of_lit_on_a_pod_uses_the_kernels_and_says_what_it_takes(tmp_path):
    flags = [
        "--student.implementation",
        "mosaic_tpu",
        "--step.compute",
        "bfloat16",
        "--student.width",
        "64",
        "--student.heads",
        "2",
    ]
    result = compile_for(config.load("lit/smoke", flags), Topology.parse("v5e:2x2"))
    assert result["fits"] and result["devices"] == 4
    assert 0 < result["bytes_per_device"] < result["hbm"] == 15.75 * 2**30
    assert result["collectives"]["all-reduce"]["bytes"] > 0, "gradients of rows on four chips are summed"
    assert result["summed"].keys() == {"f32"}, "whatever the step computes in"
    assert result["step_seconds"] == max(result["parts"].values()) > 0


def test_collectives_of_scanned_layers_are_counted_once_a_layer():
    """A layer's weights are gathered forward and backward, gradients summed once; one of them is asynchronous."""
    layers, size = 5, 512
    mesh = Mesh(np.array(describe(Topology.parse("v5e:2x2")).devices), ("fsdp",), axis_types=(AxisType.Auto,))
    weights = jax.ShapeDtypeStruct((layers, size, size), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "fsdp")))
    x = jax.ShapeDtypeStruct((512, size), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp")))

    def loss(weights, x):
        return jnp.square(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].astype(jnp.float32)).sum()

    text = jax.jit(jax.grad(loss), out_shardings=weights.sharding).lower(weights, x).compile().as_text()
    assert "AsyncCollectiveStart" in text and "known_trip_count" not in text
    matrix = size * size * 2
    wanted = {"all-gather": 2 * layers, "all-reduce": layers}
    assert collectives(text) == {kind: {"count": n, "bytes": n * matrix} for kind, n in wanted.items()}


def test_a_step_of_a_gene_with_its_published_teacher_is_outlined_not_fetched():
    flags = ["--student.layers", "1", "--student.layout", "2", "--student.size", "224", "--pipeline.batch", "4"]
    recipe = config.load("learngene/aux_ti", flags)
    result = compile_for(recipe, Topology.parse("v5e:2x2"))
    teacher = 17.5e9  # DeiT-B's multiply-accumulates
    assert result["fits"] and result["flops"] > 4 * recipe.augment.views * 2 * teacher


def test_what_does_not_fit_is_told_with_advice():
    flags = ["--pipeline.batch", "262144", "--student.width", "256", "--student.heads", "4", "--student.hidden", "1024"]
    result = compile_for(config.load("lit/smoke", flags), Topology.parse("v5e:2x2"))
    assert not result["fits"] and result["bytes_per_device"] > result["hbm"] > 15 * 2**30
    assert "--student.remat full" in result["advice"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--topology", "v5e"],
        ["--topology", "v5litepod:4x4"],
        ["--topology", "v5e:3x5"],
        ["--topology", "v5e:4x4", "--pipeline.batch", "6"],
        ["--topology", "v5e:2x2", "--student.implementation", "mosaic_gpu", "--step.compute", "bfloat16"],
    ],
    ids=lambda flags: " ".join(flags[1:4]),
)
def test_what_cannot_be_compiled_is_one_line(flags, capsys):
    assert main(["compile", "lit/smoke", *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("topology", "devices"), [("v4:2x2x2", 16), ("v5p:2x2x2", 8), ("tpu7x:2x2x1", 8)])
def test_every_device_of_a_slice_has_its_place_in_the_mesh(topology, devices):
    mesh = mesh_on(Topology.parse(topology), MeshConfig(fsdp=4))
    assert dict(mesh.shape) == {"data": devices // 4, "fsdp": 4, "tensor": 1}
    assert len({device.id for device in mesh.devices.flat}) == devices


def test_topologies_are_parsed():
    assert str(Topology.parse("v5p:4x4x8")) == "v5p:4x4x8"
    with pytest.raises(InputError, match="did you mean 'v6e'"):
        Topology.parse("v6:4x4")


def test_a_generator_of_weights_compiles_for_a_pod(tmp_path, capsys):
    net = ["--net.features", "6", "--net.classes", "3", "--backend", "pixels"]
    assert main(["train", "weightgen/smoke", "--run", str(tmp_path), *net, "--members", "16", "--chunk", "16"]) == 0
    flags = ["--zoo", str(tmp_path / "zoo"), "--latent", "3", "--json", str(tmp_path / "out.json")]
    assert main(["compile", "weightgen/generator", "--topology", "v5e:2x4", *flags]) == 0
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["fits"] and out["batch"] == 128 and out["flops"] > 0 and "all-reduce" in out["collectives"]
