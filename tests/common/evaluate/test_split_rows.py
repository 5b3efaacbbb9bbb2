"""Evaluation is shared out over the devices, not repeated on each, and gives the numbers of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from heirloom.common.data.preprocess import Preprocess
from heirloom.common.evaluate.features import embedder
from heirloom.common.mesh import shardings, split_rows
from heirloom.common.nn.functional import functional
from heirloom.common.vit.model import VitConfig
from learngene.evaluate import counter, scorer
from learngene.zoo import FAMILY
from lit_jax.dit import Dit, DitConfig
from lit_jax.progress import noise_errors

VIT = VitConfig(size=8, patch=4, width=32, layers=1, heads=2, hidden=64, classes=5)
PRE = Preprocess(8, (0.5,) * 3, (0.5,) * 3)
DIT = DitConfig(8, 3, 4, 32, 1, 2, 64, 4)


def mesh_of(data, fsdp=1):
    names = ("data", "fsdp", "tensor")
    return jax.make_mesh((data, fsdp, 1), names, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[: data * fsdp])


ONE, EIGHT = mesh_of(1), mesh_of(4, 2)


def flops(jitted, mesh, params, *arrays):
    """Of one device."""
    with jax.set_mesh(mesh):
        compiled = jitted.lower(params, *(split_rows(x, mesh) for x in arrays)).compile()
    return compiled.cost_analysis()["flops"]


def placed(spec, draw, mesh):
    return jax.device_put(draw(spec), shardings(spec, mesh))


def test_rows_are_filled_up_and_split():
    found = split_rows(np.arange(11, dtype=np.int32), EIGHT, fill=-1)
    assert found.tolist() == [*range(11), -1, -1, -1, -1, -1]
    assert {shard.data.shape for shard in found.addressable_shards} == {(2,)}
    assert len({str(shard.index) for shard in found.addressable_shards}) == 8


def test_accuracy_on_eight_devices_is_that_of_one_for_an_eighth_of_the_work(draw):
    """27 pictures in batches of 10: the mesh divides neither, and the last batch is short."""
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (30, 8, 8, 3)).astype(np.uint8), rng.integers(0, 5, 30).astype(np.int32)
    label[27:] = -1

    class HeldOut:
        name = "pictures"

        def __len__(self):
            return 27

        def __iter__(self):
            return ({"image": image[i : i + 10], "label": label[i : i + 10]} for i in (0, 10, 20))

    spec = functional(FAMILY.module, VIT).spec
    one, eight = (scorer(FAMILY, VIT, HeldOut(), PRE, mesh)(placed(spec, draw, mesh)).metrics for mesh in (ONE, EIGHT))
    assert one["top1"] * 27 == pytest.approx(round(one["top1"] * 27)) and 0 < one["top1"] < one["top5"] == 1
    assert eight == pytest.approx(one, rel=1e-6)
    rows = image[:16], label[:16]
    work = [
        flops(counter(FAMILY.module, VIT, PRE, mesh), mesh, placed(spec, draw, mesh), *rows) for mesh in (ONE, EIGHT)
    ]
    assert work[1] < 0.15 * work[0]


def test_a_held_out_loss_is_an_eighth_of_the_work(draw):
    student, rng = functional(Dit, DIT), np.random.default_rng(0)
    noisy, noise = (rng.standard_normal((16, 8, 8, 3)).astype(np.float32) for _ in range(2))
    rows = noisy, np.arange(16, dtype=np.int32), noise, np.arange(16, dtype=np.int32) % 5
    found, work = [], []
    for mesh in (ONE, EIGHT):
        errors, params = noise_errors(student, mesh), placed(student.spec, draw, mesh)
        with jax.set_mesh(mesh):
            found.append(np.asarray(errors(params, *(split_rows(x[:13], mesh) for x in rows)))[:13])
        work.append(flops(errors, mesh, params, *rows))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    assert work[1] < 0.15 * work[0]


def test_embeddings_are_split_over_the_devices():
    seen = []

    def function(params, x):
        y = jnp.tanh(x @ params["w"])
        jax.debug.inspect_array_sharding(y, callback=lambda sharding: seen.append(sharding.shard_shape(y.shape)))
        return y

    params = {"w": np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)}
    batch = np.random.default_rng(1).standard_normal((10, 4)).astype(np.float32)
    found = [embedder(function, mesh, 13)(params, batch) for mesh in (ONE, EIGHT)]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)
    assert found[1].shape == (10, 3) and seen == [(13, 3), (2, 3)]
