"""Gradients of bfloat16 models are summed in float32: operations, and whole steps split over devices."""

import re
from contextlib import contextmanager
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from heirloom.common import config
from heirloom.common.mesh import start
from heirloom.common.nn.functional import functional
from heirloom.common.nn.precision import add, convolve, lookup, product, widened
from heirloom.common.train.step import cast
from weightgen.generator.conditions import MlpSet
from weightgen.zoo.nets import SmallConv

CONV = dict(stride=2, padding=(1, 0))


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def exact(function, x, parameter, above):
    """Gradient in float32 throughout."""
    x, parameter, above = (a.astype(jnp.float32) for a in (x, parameter, above))
    return jax.vjp(lambda p: function(x, p), parameter)[1](above)[0]


@pytest.mark.parametrize(
    ("function", "x", "parameter", "above"),
    [
        (lambda x, w: product("abc,cde->abde", x, w), (64, 9, 6), (6, 2, 3), (64, 9, 2, 3)),
        (lambda x, w: product("bhdn,hde->bne", x, w), (64, 2, 3, 9), (2, 3, 6), (64, 9, 6)),
        (lambda x, w: convolve(x, w, **CONV), (64, 8, 8, 3), (3, 3, 3, 4), (64, 4, 4, 4)),
    ],
    ids=["dense", "feature-major", "convolution"],
)
def test_a_kernels_gradient_is_the_float32_sum_rounded_once(function, x, parameter, above):
    x, parameter, above = (drawn(*shape, seed=i) for i, shape in enumerate((x, parameter, above)))
    out, back = jax.vjp(function, x, parameter)
    assert out.dtype == jnp.bfloat16
    by_x, by_parameter = back(above)
    wanted = exact(function, x, parameter, above).astype(jnp.bfloat16)
    # Another order of the same float32 sum may fall on the other side of a rounding boundary.
    differ = np.asarray(by_parameter != wanted)
    assert differ.mean() < 0.02
    np.testing.assert_allclose(by_parameter.astype("float32"), wanted.astype("float32"), rtol=2**-7)
    plain = jax.vjp(lambda x: function(x.astype(jnp.float32), parameter.astype(jnp.float32)), x)[1](
        above.astype(jnp.float32)
    )[0]
    np.testing.assert_allclose(by_x.astype("float32"), plain.astype("float32"), rtol=2**-6, atol=2**-6)


def test_rows_of_a_table_that_are_looked_up_often_add_up_in_float32():
    """300 times 1: a bfloat16 sum would stop at 256."""
    table, index = drawn(4, 3), jnp.zeros(300, jnp.int32)
    gradient = jax.grad(lambda table: lookup(table, index).astype(jnp.float32).sum())(table)
    assert gradient[0].tolist() == [300.0] * 3 and not gradient[1:].any()


def test_a_bias_is_added_and_its_gradient_summed_in_float32():
    x, bias = jnp.zeros((300, 2), jnp.bfloat16), jnp.asarray([1.0, 2.0])
    out, back = jax.vjp(add, x, bias)
    assert out.dtype == jnp.bfloat16
    by_bias = back(jnp.full_like(out, 1.0))[1]
    assert by_bias.dtype == jnp.float32 and by_bias.tolist() == [300.0, 300.0]


def test_uses_of_one_parameter_add_up_in_float32():
    """300 turns of a scan, then 300 tiles, of a gradient of 1 each: a bfloat16 sum would stop at 256."""
    parameter = jnp.ones((), jnp.bfloat16)

    def turns(parameter):
        wide = widened(parameter)
        return jax.lax.scan(lambda x, _: (x + wide.astype(jnp.bfloat16).astype(jnp.float32), None), 0.0, length=300)[0]

    for uses in (turns, lambda parameter: jnp.tile(widened(parameter), 300).sum()):
        gradient = jax.grad(uses)(parameter)
        assert gradient.dtype == jnp.bfloat16 and float(gradient) == 300
    assert "custom_vjp" not in str(jax.make_jaxpr(widened)(1.0)), "float32 is left to JAX"


@pytest.mark.parametrize("way", [product, lookup])
def test_float32_is_left_to_jax(way):
    """The same operations as without this module, so that nothing of float32 runs has changed."""
    table = jnp.ones((4, 3))
    if way is product:
        ours, plain = (
            (lambda w: product("ab,bc->ac", jnp.ones((5, 4)), w)),
            (lambda w: jnp.tensordot(jnp.ones((5, 4)), w, axes=1)),
        )
    else:
        ours, plain = (lambda t: lookup(t, jnp.arange(2))), (lambda t: t[jnp.arange(2)])
    assert str(jax.make_jaxpr(ours)(table)).count("dot_general") == str(jax.make_jaxpr(plain)(table)).count(
        "dot_general"
    )
    assert "custom_vjp" not in str(jax.make_jaxpr(ours)(table))


def test_devices_add_what_they_have_not_rounded():
    """Seven parts of 256.96 and one of 274: 2072.7, in bfloat16 2080; rounded first 2066, in bfloat16 2064."""
    mesh = start()
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x = np.ones((16, 1), np.float32)
    x[0::2, 0], x[1::2, 0] = 256.0, 0.9609375
    x[0, 0], x[1, 0] = 274.0, 0.0
    gradient = jax.jit(jax.grad(lambda w, x: product("ab,bc->ac", x, w).astype(jnp.float32).sum()))
    found = gradient(jnp.ones((1, 1), jnp.bfloat16), jax.device_put(x.astype(jnp.bfloat16), rows))
    assert float(found[0, 0]) == 2080.0


@contextmanager
def uncached():
    """What the cache has is not compiled, and so not written down. JAX remembers that it has one until reset."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


def partitioned(abstract, folder):
    """The module as XLA split it over the devices: later, the compiler for CPUs widens all sums."""
    options = {"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partitioning", "xla_dump_hlo_as_text": True}
    with uncached():
        abstract.step.lower(abstract.state, abstract.batch).compile(options | {"xla_backend_optimization_level": 0})
    (file,) = folder.glob("*jit_step*.after_spmd-partitioning*.txt")
    return file.read_text()


SUM = re.compile(r"= \(?(\w+)\[([\d,]*)\].* (?:all-reduce|reduce-scatter)\(")


def sums(text):
    """(dtype, shape) of what devices add up."""
    return [(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in SUM.findall(text)]


SMALL = ["--step.compute", "bfloat16", "--pipeline.batch", "16"]


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("lit/smoke", ["--mesh.fsdp", "4", "--step.accumulate", "2", "--student.width", "256", "--student.heads", "4"]),
        ("tinyclip/smoke", []),
        ("learngene/smoke", []),
        ("learngene/smoke", ["--student.tying", "loop"]),
    ],
    ids=["lit-fsdp-accumulated", "tinyclip", "learngene", "learngene-loop"],
)
def test_every_gradient_of_a_bfloat16_step_is_reduced_in_float32(recipe, flags, tmp_path):
    cfg = config.load(recipe, [*SMALL, *flags])
    mesh = start(cfg.mesh)
    text = partitioned(cfg.abstract(mesh), tmp_path)
    found = sums(text)
    assert len([shape for dtype, shape in found if dtype == "f32" and len(shape) > 1]) > 10
    # With fsdp, XLA may split a product's inner axis: what it then sums are activations, [row, token, ...].
    rows = 16 // (mesh.shape["data"] * mesh.shape["fsdp"] * cfg.step.accumulate)
    assert [
        shape for dtype, shape in found if dtype == "bf16" and not (cfg.mesh.fsdp > 1 and shape[0] % rows == 0)
    ] == []


@pytest.mark.parametrize(
    ("make", "x", "kernel"),
    [
        (lambda _, rngs: SmallConv("in", "out", {"in": 3, "out": 4}, 2, rngs=rngs), (16, 5, 5, 3), (4, 3, 4)),
        (lambda _, rngs: MlpSet(6, 10, 7, rngs=rngs), (16, 3, 3, 6), (9, 4)),  # nine slots of ten
    ],
    ids=["convolution-of-zoos", "set-of-pictures"],
)
def test_a_bfloat16_kernel_of_weightgen_is_reduced_in_float32(make, x, kernel, tmp_path):
    model, rows = functional(make, None), NamedSharding(start(), PartitionSpec("data"))

    def step(params, x):
        return jax.grad(lambda params: model.apply(cast(params, "bfloat16"), x).astype(jnp.float32).sum())(params)

    params = model.init(jax.random.key(0))
    batch = jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=rows)
    found = sums(partitioned(SimpleNamespace(step=jax.jit(step), state=params, batch=batch), tmp_path))
    assert sorted(kernel) in [sorted(shape) for _, shape in found] and {dtype for dtype, _ in found} == {"f32"}
