"""The bridge: total, exact about shapes, and the same bits however much of a tree is made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.nn.attention import softmax
from common.nn.block import Block, BlockInit, scan, stack
from common.nn.dense import Dense, normal, param, uniform_fan_in, xavier_uniform
from common.nn.functional import functional
from common.nn.mlp import ACTIVATIONS
from common.nn.norm import LayerNorm

SIZES = dict(embed=8, head=2, head_dim=4, hidden=16)


class Tower(nnx.Module):
    def __init__(self, cfg, *, rngs):
        self.blocks = stack(
            lambda rngs: Block(SIZES, attend=softmax(), activation="gelu", eps=1e-5, init=BlockInit(), rngs=rngs), cfg["layers"], rngs
        )
        self.norm = LayerNorm(SIZES, eps=1e-5, rngs=rngs)
        self.remat = cfg.get("remat", "none")

    def __call__(self, x):
        return self.norm(scan(self.blocks, x, remat=self.remat))


def inputs():
    return jax.random.normal(jax.random.key(1), (2, 5, 8))


def test_spec_has_paths_axes_and_shapes():
    spec = functional(Tower, {"layers": 3}).spec
    assert str(spec["blocks/attn/query/kernel"]) == "layer=3 embed=8 -> head=2 head_dim=4"
    assert str(spec["blocks/mlp/down/bias"]) == "layer=3 -> embed=8"
    assert str(spec["norm/scale"]) == "embed=8"
    assert len(spec) == 18


def test_scan_equals_the_blocks_one_by_one():
    # Eleven layers: unrolled blocks with string keys would be permuted ("10" < "2").
    model = functional(Tower, {"layers": 11})
    params = model.init(jax.random.key(0))
    single = functional(lambda cfg, rngs: Block(SIZES, attend=softmax(), activation="gelu", eps=1e-5, init=BlockInit(), rngs=rngs), None)
    x = inputs()
    for i in range(11):
        x = single.apply({p.removeprefix("blocks/"): v[i] for p, v in params.items() if p.startswith("blocks/")}, x)
    x = np.asarray(x)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(model.apply(params, inputs()), x, atol=1e-5)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_memory_and_not_gradients(remat):
    plain, saved = functional(Tower, {"layers": 3}), functional(Tower, {"layers": 3, "remat": remat})
    params = plain.init(jax.random.key(0))

    def gradient(model):
        return jax.jit(jax.grad(lambda p: jnp.square(model.apply(p, inputs())).sum()))(params)

    for a, b in zip(jax.tree.leaves(gradient(plain)), jax.tree.leaves(gradient(saved)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_trap_merge_would_take_any_tree():
    model = functional(Tower, {"layers": 2})
    params = model.init(jax.random.key(0))
    with pytest.raises(ValueError, match="missing parameter 'norm/bias'"):
        model.apply({p: v for p, v in params.items() if p != "norm/bias"}, inputs())
    with pytest.raises(ValueError, match="unknown parameter 'norm/bais'; did you mean 'norm/bias'"):
        model.apply(params | {"norm/bais": params["norm/bias"]}, inputs())
    with pytest.raises(ValueError, match=r"norm/bias: shape \(9,\), the model has embed=8"):
        model.apply(params | {"norm/bias": jnp.zeros(9)}, inputs())
    shuffled = dict(reversed(params.items()))
    np.testing.assert_array_equal(model.apply(shuffled, inputs()), model.apply(params, inputs()))


def test_trap_a_part_of_the_tree_has_the_bits_of_the_whole():
    model = functional(Tower, {"layers": 3})
    whole = model.init(jax.random.key(3))
    part = model.init(jax.random.key(3), ["blocks/attn/out/kernel", "norm/scale", "blocks/mlp/up/bias"])
    assert set(part) == {"blocks/attn/out/kernel", "norm/scale", "blocks/mlp/up/bias"}
    for path, value in part.items():
        np.testing.assert_array_equal(value, whole[path])
    assert not np.array_equal(whole["blocks/attn/out/kernel"][0], whole["blocks/attn/out/kernel"][1])  # each layer its own draw


def test_a_population_runs_under_vmap():
    model = functional(Tower, {"layers": 2})
    params = [model.init(jax.random.key(i)) for i in range(3)]
    together = jax.vmap(model.apply, in_axes=(0, None))(jax.tree.map(lambda *x: jnp.stack(x), *params), inputs())
    for i, p in enumerate(params):
        np.testing.assert_allclose(together[i], model.apply(p, inputs()), atol=1e-5)


def test_bf16_kernels_stay_near_f32():
    model = functional(Tower, {"layers": 2})
    params = model.init(jax.random.key(0))
    half = {p: v.astype(jnp.bfloat16) if p.endswith("kernel") else v for p, v in params.items()}
    exact, rough = model.apply(params, inputs()), model.apply(half, inputs())
    assert float(jnp.abs(exact - rough).max()) < 0.05
    assert float(jnp.abs(exact - rough).max()) > 0  # it did compute in bf16


def test_initialisers_have_their_documented_spread():
    key = jax.random.key(0)
    x = np.asarray(uniform_fan_in(key, (400, 300), 400, 300))
    assert abs(x.max() - 400**-0.5) < 1e-4 and abs(x.std() - 400**-0.5 / 3**0.5) < 1e-3
    x = np.asarray(xavier_uniform(3)(key, (400, 300), 400, 300))
    assert abs(x.max() - (6 / 1300) ** 0.5) < 1e-4
    assert abs(np.asarray(normal(0.02)(key, (400, 300), 1, 1)).std() - 0.02) < 1e-4
    sizes = dict(embed=100, hidden=7)
    bias = param("-> hidden", sizes, uniform_fan_in, nnx.Rngs(0), fan_in=100)
    assert float(jnp.abs(bias[...]).max()) <= 0.1 and bias.get_metadata()["axes"] == "-> hidden"


def test_dense_over_several_axes():
    layer = Dense("head head_dim -> embed", SIZES, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32)
    np.testing.assert_allclose(layer(x), np.einsum("nhd,hde->ne", x, layer.kernel[...]), atol=1e-5)


@pytest.mark.parametrize(("name", "at_one", "at_minus_two"), [("gelu", 0.8413447, -0.0455003), ("quick_gelu", 0.8457957, -0.0643419)])
def test_both_gelus(name, at_one, at_minus_two):
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.array([1.0, -2.0])), [at_one, at_minus_two], atol=1e-6)
