"""The functions for CPUs against the plain forms: values, forward and reverse mode, and which programs use them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from heirloom.common.nn import attention, for_cpus, norm
from heirloom.common.nn.attention import softmax
from heirloom.common.nn.block import rematerialised
from heirloom.common.nn.blockwise import plain
from heirloom.common.nn.mlp import ACTIVATIONS
from heirloom.common.nn.norm import LayerNorm

GELU = partial(jax.nn.gelu, approximate=False)


def drawn(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def derivatives(function, *given):
    """The result, its gradients along a fixed direction, its tangent along another, and second derivatives."""

    def run(*given):
        out, back = jax.vjp(function, *given)
        above = drawn(*out.shape, seed=7, dtype=out.dtype)
        towards = tuple(drawn(*x.shape, seed=8 + i, dtype=x.dtype) for i, x in enumerate(given))
        tangent = jax.jvp(function, given, towards)[1]
        slope = jax.grad(lambda *x: jnp.vdot(function(*x), above))
        return out, *back(above), tangent, jax.jvp(slope, given, towards)[1]

    return jax.jit(run)(*given)


def agree(found, wanted, tolerance):
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        assert np.abs(x - y).max() <= tolerance * max(1, np.abs(y).max())


def inputs(queries, keys, dtype=jnp.float32):
    shapes = [(2, tokens, 3, 8) for tokens in (queries, keys, keys)]
    return [drawn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def mask_of(keys):
    """The first example sees every third key; the second one sees none."""
    return jnp.stack([jnp.arange(keys) % 3 == 0, jnp.zeros(keys, bool)])


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "masked"),
    [(20, 20, False, False), (13, 29, False, True), (17, 17, True, False), (17, 23, True, True)],
)
def test_attention_agrees_with_the_plain_form(queries, keys, causal, masked):
    given, mask = inputs(queries, keys), mask_of(keys) if masked else None
    found = derivatives(lambda *x: softmax(causal=causal)(*x, mask), *given)
    agree(found, derivatives(lambda *x: plain(*x, mask, causal), *given), 1e-5)


def test_masked_keys_have_no_weight():
    query, key, value = inputs(13, 29)
    mask = jnp.broadcast_to(jnp.arange(29) < 11, (2, 29))
    changed = [jnp.where(mask[..., None, None], x, 1e4) for x in (key, value)]
    np.testing.assert_array_equal(softmax()(query, key, value, mask), softmax()(query, *changed, mask))
    by_key, by_value = jax.grad(lambda *x: softmax()(query, *x, mask).sum(), (0, 1))(key, value)
    assert not by_key[:, 11:].any() and not by_value[:, 11:].any()


def test_scores_too_large_for_exponentials_are_right():
    query, key, value = inputs(13, 29)
    query = 1000 * query
    out = softmax()(query, key, value)
    wide = [np.asarray(x, np.float64) for x in (query, key, value)]
    scores = np.einsum("bqhd,bkhd->bhqk", *wide[:2]) * 8**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    assert scores.max() > 2000
    wanted = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), wide[2])
    np.testing.assert_allclose(out, wanted, atol=2e-3)  # scores of f32 have errors of 1e-4


def test_sums_of_bfloat16_are_float32():
    given = inputs(13, 2000, jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in given]
    out, back = jax.vjp(softmax(), *given)
    assert out.dtype == jnp.bfloat16
    assert (out != plain(*wide, None, False).astype(jnp.bfloat16)).mean() < 0.01, "another order of the same sum"
    above = drawn(*out.shape, seed=7, dtype=jnp.bfloat16)
    wanted = jax.vjp(lambda *x: plain(*x, None, False), *wide)[1](above.astype(jnp.float32))
    for x, y in zip(back(above), wanted, strict=True):
        assert x.dtype == jnp.bfloat16
        # The result is kept in bfloat16: its rounding enters the gradients of queries and keys.
        np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=2**-7, atol=2**-8 * np.abs(y).max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-6)])
def test_gelu_agrees_with_jax(dtype, tolerance):
    x = jnp.linspace(-9, 9, 301, dtype=dtype)
    agree(derivatives(ACTIVATIONS["gelu"], x), derivatives(GELU, x), tolerance)


@pytest.mark.parametrize("case", ["embed", "no affine", "kept", "head head_dim", "bfloat16"])
def test_layer_norm_agrees_with_autodiff(case, monkeypatch):
    sizes = {"embed": 24, "head": 3, "head_dim": 8}
    axes = "head head_dim" if case.startswith("head") else "embed"
    x = 3 + 2 * drawn(4, 5, *(sizes[axis] for axis in axes.split()))
    layer = LayerNorm(sizes, eps=1e-5, affine=case != "no affine", axes=axes, rngs=nnx.Rngs(0))
    if case != "no affine":
        layer.scale[...], layer.bias[...] = (drawn(*x.shape[2:], seed=seed) for seed in (1, 2))
    graph, state = nnx.split(layer)
    keep = jnp.arange(24) % 3 > 0 if case == "kept" else None
    low = case == "bfloat16"
    given = [x.astype(jnp.bfloat16) if low else x, *jax.tree.leaves(state)]

    def run(x, *leaves):
        return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))(x, keep)

    found = derivatives(run, *given)
    monkeypatch.setattr(norm, "normalised", norm.plain)
    agree(found, derivatives(run, *given), 2**-6 if low else 2e-5)


def everything(x):
    """All three functions, one after the other."""
    layer = LayerNorm({"embed": x.shape[-1]}, eps=1e-6, rngs=nnx.Rngs(0))
    return ACTIVATIONS["gelu"](softmax()(*[layer(x)] * 3)).sum()


def lowered(platform, *given):
    return jax.jit(jax.grad(everything)).trace(*given).lower(lowering_platforms=(platform,)).as_text()


def text_of_plain(monkeypatch, platform, *given):
    with monkeypatch.context() as patched:
        patched.setattr(jax, "default_backend", lambda: platform)
        return lowered(platform, *given)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_keep_their_program(platform, monkeypatch):
    x = drawn(2, 5, 2, 8)
    theirs = text_of_plain(monkeypatch, platform, x)
    assert "chlo.erfc" in theirs and "chlo.erf " not in theirs
    # Lowered on a CPU: the operations that compute something are the same, in number.
    here, count = lowered(platform, x), lambda text, name: text.count(f"{name} ")
    for name in ("stablehlo.dot_general", "stablehlo.exponential", "stablehlo.rsqrt", "chlo.erfc", "chlo.erf"):
        assert count(here, name) == count(theirs, name), name
    assert count(lowered("cpu", x), "chlo.erf") > 0


def test_the_mesh_decides_for_which_devices_a_program_is():
    x = drawn(2, 5, 2, 8)
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert for_cpus.platform() == ("tpu", True)
        assert str(jax.make_jaxpr(everything)(x)).count("erfc") == 1
    with jax.set_mesh(jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert for_cpus.platform() == ("cpu", True)
        assert "platform_index" not in str(jax.make_jaxpr(everything)(x))


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_no_weights_are_kept_for_the_backward_pass(remat, monkeypatch):
    monkeypatch.setattr(attention, "LONG", 2**30)

    def loss(x):
        body = rematerialised(lambda x, _: (jnp.tanh(softmax()(x, x, x)), None), remat)
        return jax.lax.scan(body, x, None, length=8)[0].sum()

    shape = jax.ShapeDtypeStruct((1, 512, 1, 16), jnp.float32)
    with jax.set_mesh(jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))):
        used = jax.jit(jax.grad(loss)).lower(shape).compile().memory_analysis().temp_size_in_bytes
    weights = 512**2 * 4
    assert used < 5 * weights, "those of one layer and their gradients, not of eight"


def test_populations_are_batched():
    given = [drawn(3, *x.shape, seed=i) for i, x in enumerate(inputs(13, 29))]
    mask = jnp.stack([mask_of(29), ~mask_of(29), mask_of(29)])
    found = jax.grad(lambda *x: jnp.square(jax.vmap(softmax())(*x, mask)).sum(), (0, 1, 2))(*given)
    wanted = jax.grad(lambda *x: jnp.square(jax.vmap(lambda *x: plain(*x, False))(*x, mask)).sum(), (0, 1, 2))(*given)
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
