"""The auxiliary net is its own expansion, and its sizes are the published ones."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.plan import Source, apply
from heirloom.common.train.step import cast
from heirloom.common.vit.model import Vit, VitConfig, macs, parameters, stochastic_depth
from learngene.cost import count, forward_macs, ratios
from learngene.expand import expansion
from learngene.zoo import auxiliary, vit


@pytest.fixture(scope="module")
def aux(gene, draw):
    model = functional(Vit, gene)
    return model, draw(model.spec)


@pytest.fixture(scope="module")
def descendant(gene, aux):
    model = functional(Vit, gene.of_depth(5))
    return model, apply(expansion(gene, gene.of_depth(5)), Source(aux[0].spec, aux[1]), model.spec)


def test_published_sizes_to_the_unit():
    totals = {size: parameters(functional(Vit, auxiliary(size)).spec) for size in ("ti", "s", "b")}
    assert {size: n["total"] for size, n in totals.items()} == {"ti": 2_602_984, "s": 9_628_648, "b": 36_951_016}
    assert {size: n["blocks"] for size, n in totals.items()} == {
        "ti": 5 * 444_864,
        "s": 5 * 1_774_464,
        "b": 5 * 7_087_872,
    }
    assert [parameters(functional(Vit, vit(size)).spec)["total"] for size in ("ti", "s", "b")] == [
        5_717_032,
        22_049_896,
        86_566_120,
    ]


def test_an_auxiliary_net_costs_what_its_layers_cost():
    aux = functional(Vit, auxiliary("s")).spec
    assert macs(auxiliary("s"), aux) == forward_macs(auxiliary("s")) == forward_macs(vit("s", 16))
    assert count(auxiliary("s")) == parameters(aux)["total"]
    # 12 layers at 196 tokens: 12 D^2 multiply-accumulates a token, and two products of the attention.
    inside = 12 * (196 * 12 * 384**2 + 2 * 196**2 * 384)
    assert forward_macs(vit("s")) == inside + 196 * 768 * 384 + 384 * 1000


def test_cost_ratios_are_the_published_ones():
    s, b = ratios("s", range(6, 16)), ratios("b", range(6, 16))
    assert round(s["storage"], 1) == 20.1 and round(b["storage"], 1) == 20.5
    assert s["pre_training"] == b["pre_training"] == 10
    assert (
        round(s["total_training"], 2) == 6.67
        and s["total_training_released"] == 4.0
        and b["total_training_released"] == 5.0
    )


def test_the_auxiliary_net_is_its_expansion_to_the_bit(aux, descendant, images):
    (model, params), (plain, copied) = aux, descendant
    np.testing.assert_array_equal(jax.jit(model.apply)(params, images), jax.jit(plain.apply)(copied, images))


def test_tied_gradients_are_sums_of_untied_ones(gene, aux, descendant, images):
    (model, params), (plain, copied) = aux, descendant
    weights = np.random.default_rng(2).standard_normal((3, 5)).astype(np.float32)
    tied = jax.jit(jax.grad(lambda p: (model.apply(p, images) * weights).sum()))(params)
    untied = jax.jit(jax.grad(lambda p: (plain.apply(p, images) * weights).sum()))(copied)
    for path, value in tied.items():
        expected = untied[path]
        if path.startswith("blocks/"):
            expected = np.stack([expected[:2].sum(0), expected[2:].sum(0)])
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg=path)
    # Untied they differ from copy to copy: one step takes the layers apart.
    assert np.abs(untied["blocks/mlp/up/kernel"][0] - untied["blocks/mlp/up/kernel"][1]).max() > 1e-3


def test_gather_and_loop_agree_and_drop_the_same_branches(gene, aux, images):
    dropping = replace(gene, drop_path=0.5)
    gather, loop = (
        jax.jit(functional(Vit, cfg).apply) for cfg in (dropping, replace(dropping, tying="loop", remat="full"))
    )
    dropped = gather(aux[1], images, jax.random.key(3))
    np.testing.assert_allclose(loop(aux[1], images, jax.random.key(3)), dropped, rtol=1e-5, atol=1e-5)
    whole = jax.jit(aux[0].apply)(aux[1], images, jax.random.key(3))  # a rate of 0: training is evaluation
    np.testing.assert_array_equal(whole, jax.jit(aux[0].apply)(aux[1], images))
    assert np.abs(whole - dropped).max() > 1e-2


def test_a_looped_blocks_gradient_is_the_float32_sum_of_its_turns(gene, draw, images):
    """As gathered blocks have it: 24 rounded gradients, added in bfloat16, would mostly be off by a rounding."""
    deep = replace(gene, layout=(1, 24))

    def gradient(cfg):
        model = functional(Vit, cfg)
        params = cast(draw(model.spec), "bfloat16")
        return jax.jit(jax.grad(lambda params: jnp.square(model.apply(params, images)).sum()))(params)

    gather, loop = gradient(deep), gradient(replace(deep, tying="loop"))
    for path in ("blocks/mlp/up/kernel", "blocks/attn/value/kernel"):
        assert loop[path].dtype == jnp.bfloat16
        assert np.mean(loop[path] != gather[path]) < 0.05, path


def test_stochastic_depth_keeps_the_mean_and_rises_linearly(gene):
    keep = np.asarray(
        jax.jit(lambda key: stochastic_depth(replace(gene, drop_path=0.4), key, 20_000)[0])(jax.random.key(0))
    )
    assert keep.shape == (5, 2, 20_000)
    np.testing.assert_allclose(keep.mean(2), 1, atol=0.03)
    np.testing.assert_allclose((keep == 0).mean(2), np.linspace(0, 0.4, 5)[:, None] * np.ones((1, 2)), atol=0.015)


def test_fresh_values_are_the_released_ones():
    params = functional(Vit, VitConfig(width=96, heads=2, hidden=384, layers=2, classes=10)).init(jax.random.key(0))
    assert abs(float(params["blocks/mlp/up/kernel"].std()) - 0.02) < 5e-4
    assert abs(float(params["position"].std()) - 0.02) < 5e-4
    bound = (3 * 16 * 16) ** -0.5
    assert 0.99 * bound < float(jnp.abs(params["patch/project/kernel"]).max()) <= bound
    assert not np.any(params["blocks/attn/query/bias"]) and np.all(params["norm/scale"] == 1)


def test_tleg_starts_with_a_norm_of_scale_one_and_lies_on_a_line(gene, draw, images):
    cfg = replace(gene, gene="tleg", layout=(5,))
    model, plain = functional(Vit, cfg), functional(Vit, cfg.of_depth(5))
    fresh = model.init(jax.random.key(0))
    np.testing.assert_array_equal(fresh["blocks/attn_norm/scale"], np.stack([np.ones(16), np.zeros(16)]))
    params = draw(model.spec)
    expanded = apply(expansion(cfg, cfg.of_depth(5)), Source(model.spec, params), plain.spec)
    base, slope = params["blocks/mlp/down/kernel"]
    np.testing.assert_array_equal(expanded["blocks/mlp/down/kernel"][0], base)
    np.testing.assert_allclose(expanded["blocks/mlp/down/kernel"][4], base + 4 / 5 * slope, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        jax.jit(plain.apply)(expanded, images), jax.jit(model.apply)(params, images), rtol=1e-4, atol=1e-4
    )
    assert macs(cfg, model.spec) == macs(cfg.of_depth(5), plain.spec)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(layout=(2,)), "a gene of 2 blocks needs 2 counts"),
        (dict(gene="none"), "only a gene has one: set gene"),
        (dict(gene="tleg"), r"layout \(2, 3\): a TLEG gene needs layers 2 and a layout of one number"),
        (dict(pool="cls"), "pool 'cls' needs its token, set tokens to 'cls'"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(gene, change, complaint):
    with pytest.raises(InputError, match=complaint):
        replace(gene, **change)
