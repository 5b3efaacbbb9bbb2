"""DiT and LiT: published sizes, initialisation, formulas, and that modulations can be computed ahead."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from heirloom.common.nn.position import sincos
from lit_jax.attention import Depthwise, LinearAttention
from lit_jax.dit import Dit, DitConfig, macs, parameters, time_features
from lit_jax.zoo import dit, lit

COUNTS = {
    ("s", 2): 32_865_056, ("s", 4): 32_920_448, ("s", 8): 33_142_016,
    ("b", 2): 130_315_808, ("b", 4): 130_426_496, ("b", 8): 130_869_248,
    ("l", 2): 457_840_672, ("l", 4): 457_988_224, ("l", 8): 458_578_432,
    ("xl", 2): 674_834_720, ("xl", 4): 675_000_704, ("xl", 8): 675_664_640,
}  # fmt: skip
LIT = {"s": 32_924_960, "b": 130_395_680, "l": 458_000_416, "xl": 675_044_384}


@pytest.mark.parametrize(("size", "patch"), COUNTS)
def test_published_counts(size, patch):
    assert parameters(functional(Dit, dit(size, patch)).spec)["total"] == COUNTS[size, patch]


def test_the_heads_that_share_a_bank_add_their_gradients_in_float32():
    sizes = {"head": 300, "head_dim": 2, "filter_row": 3, "filter_col": 3}
    graph, state = nnx.split(Depthwise(sizes, "shared", rngs=nnx.Rngs(0)))

    def total(state):
        return sum(bank.astype(jnp.float32).sum() for bank in nnx.merge(graph, state).banks(300))

    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state)
    gradient = jax.jit(jax.grad(total)).trace(half)
    sums = re.findall(r":(\w+)\[[^=]*= reduce_sum", str(gradient.jaxpr))
    assert len(sums) >= 2 and set(sums) == {"f32"}
    assert all((leaf == 300).all() and leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(jax.grad(total)(half)))


@pytest.mark.parametrize("size", LIT)
def test_counts_of_lit_with_a_shared_bank(size):
    assert parameters(functional(Dit, lit(size)).spec)["total"] == LIT[size]


@pytest.mark.parametrize(
    ("cfg", "giga"),
    [
        (dit("s"), 6.04),
        (lit("s"), 5.92),
        (dit("b"), 23.0),
        (dit("xl", pixels=512), 524),
        (lit("xl", pixels=512), 477),
        (lit("xl"), 119.1),
    ],
    ids=["s", "lit-s", "b", "xl-512", "lit-xl-512", "lit-xl"],
)
def test_multiply_accumulates(cfg, giga):
    """The spec's table has the blocks alone; embedding, modulation and the last layer are half a percent more."""
    total = macs(cfg, functional(Dit, cfg).spec) / 1e9
    assert giga * 0.998 < total < giga * 1.006


def test_initial_values(lit):
    model = functional(Dit, replace(lit, width=64, hidden=256, layers=4))
    params = model.init(jax.random.key(0))
    zero = {path for path, value in params.items() if not np.asarray(value).any()}
    biases = {path for path in params if path.endswith("/bias") and "depthwise" not in path}
    assert zero == biases | {"modulation/kernel", "final_modulation/kernel", "final/kernel"}

    def bound(path):
        return float(jnp.abs(params[path]).max())

    for path, expected in {
        "blocks/attn/query/kernel": (6 / (64 + 64)) ** 0.5,
        "blocks/attn/key/kernel": (6 / (64 + 128)) ** 0.5,
        "blocks/attn/out/kernel": (6 / (64 + 64)) ** 0.5,
        "blocks/mlp/up/kernel": (6 / (64 + 256)) ** 0.5,
        "patch/project/kernel": (6 / (12 + 64)) ** 0.5,
        "blocks/attn/depthwise/kernel": 0.2,
        "blocks/attn/depthwise/bias": 0.2,
    }.items():
        assert 0.95 * expected < bound(path) <= expected, path
    for path in ("time/up/kernel", "time/down/kernel", "label/table"):
        assert 0.017 < float(params[path].std()) < 0.023, path
    softmax = functional(Dit, replace(lit, attention="softmax", width=64)).init(
        jax.random.key(0), paths=["blocks/attn/query/kernel"]
    )
    assert 0.95 < float(jnp.abs(softmax["blocks/attn/query/kernel"]).max()) / (6 / (64 + 3 * 64)) ** 0.5 <= 1


@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_a_fresh_model_predicts_zero(cfg, batch, attention):
    model = functional(Dit, replace(cfg, attention=attention))
    prediction = model.apply(model.init(jax.random.key(0)), *batch)
    assert prediction.shape == (3, 8, 8, 6) and prediction.dtype == jnp.float32
    assert not np.asarray(prediction).any()


def test_time_features_are_cosines_then_sines():
    features = np.asarray(time_features(jnp.array([0.0, 2.5])))
    np.testing.assert_array_equal(features[0], [1.0] * 128 + [0.0] * 128)
    i = np.arange(128)
    np.testing.assert_allclose(features[1, :128], np.cos(2.5 * 10000 ** (-i / 128)), atol=1e-6)
    np.testing.assert_allclose(features[1, 128:], np.sin(2.5 * 10000 ** (-i / 128)), atol=1e-6)


def test_position_table_says_the_column_first():
    table = sincos(3, 4, 16)
    np.testing.assert_array_equal(table[0, 0], [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4)
    omega = 10000 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(table[2, 3, :8], [*np.sin(3 * omega), *np.cos(3 * omega)], atol=1e-7)
    np.testing.assert_allclose(table[2, 3, 8:], [*np.sin(2 * omega), *np.cos(2 * omega)], atol=1e-7)
    np.testing.assert_allclose(sincos(6, 8, 16, span=4)[3, 4], sincos(3, 4, 16)[2, 2], atol=1e-7)


def test_output_patches_are_row_column_channel(cfg, draw):
    """With the last layer's bias alone, each output pixel shows its place in the patch and its channel."""
    model = functional(Dit, cfg)
    params = {path: np.zeros_like(value) for path, value in draw(model.spec).items()}
    params["final/bias"] = np.arange(2 * 2 * 6, dtype=np.float32).reshape(2, 2, 6)
    out = np.asarray(model.apply(params, np.zeros((1, 8, 8, 3), np.float32), np.zeros(1), np.zeros(1, np.int32)))[0]
    for row in range(8):
        for col in range(8):
            np.testing.assert_array_equal(out[row, col], (row % 2) * 12 + (col % 2) * 6 + np.arange(6))


def test_input_pixels_reach_their_own_patch(cfg, draw, batch):
    """Without mixing between tokens, a change of one pixel changes one patch of the output: the right one."""
    model = functional(Dit, cfg)
    params = draw(model.spec) | {
        "blocks/attn/out/kernel": np.zeros(model.spec["blocks/attn/out/kernel"].shape, np.float32)
    }
    x, t, labels = batch
    other = x.copy()
    other[0, 5, 2, 1] += 1
    changed = np.abs(np.asarray(model.apply(params, other, t, labels) - model.apply(params, x, t, labels))).max(-1)
    assert changed[0, 4:6, 2:4].min() > 1e-4
    changed[0, 4:6, 2:4] = 0
    assert changed.max() == 0


@pytest.mark.parametrize("attention", ["softmax", "linear"])
def test_modulations_computed_ahead_are_the_same_prediction(cfg, batch, draw, attention):
    model = functional(Dit, replace(cfg, attention=attention))
    params, (x, t, labels) = draw(model.spec), batch
    ahead = model.apply(params, t, labels, method="modulations")
    assert ahead.blocks.shape == (3, 6, 3, 32) and ahead.final.shape == (2, 3, 32)
    np.testing.assert_array_equal(model.apply(params, x, ahead, method="denoise"), model.apply(params, x, t, labels))


def test_remat_changes_nothing(lit, batch, draw):
    def grads(remat):
        model = functional(Dit, replace(lit, remat=remat))
        return jax.jit(jax.grad(lambda p: jnp.square(model.apply(p, *batch)).mean()))(draw(model.spec))

    plain = grads("none")
    for remat in ("full", "dots"):
        for path, value in grads(remat).items():
            np.testing.assert_allclose(value, plain[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_half_precision_stays_near(lit, batch, draw):
    model = functional(Dit, lit)
    params = draw(model.spec)
    low = {
        path: jnp.asarray(value, jnp.bfloat16) if path.endswith(("kernel", "table")) else value
        for path, value in params.items()
    }
    full, half = (np.asarray(model.apply(p, *batch)) for p in (params, low))
    assert 1e-5 < np.abs(full - half).max() / np.abs(full).max() < 0.06


def attention(features="relu", filters="shared", heads=2, width=16, grid=4):
    sizes = dict(embed=width, head=heads, head_dim=width // heads, filter_row=5, filter_col=5)
    model = functional(lambda cfg, rngs: LinearAttention(sizes, features=features, filters=filters, rngs=rngs), None)
    x = np.random.default_rng(3).standard_normal((2, grid**2, width)).astype(np.float32)
    return model, x


@pytest.mark.parametrize("features", ["relu", "gelu", "focused", "focused_gelu"])
@pytest.mark.parametrize("filters", ["shared", "channel", "none"])
def test_attention_is_its_definition(features, filters, draw):
    """Against the quadratic form in float64, features and depthwise sums written out."""
    model, x = attention(features, filters)
    params = draw(model.spec)
    p = {path: value.astype(np.float64) for path, value in params.items()}

    def project(name):
        return np.einsum("bne,ehd->bnhd", x, p[f"{name}/kernel"]) + p[f"{name}/bias"]

    q, k, v = project("query"), project("key"), project("value")

    def phi(z):
        # GELU by its tanh form, as JAX has it by default.
        gelu = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
        y = (np.maximum(z, 0) if features in ("relu", "focused") else gelu) + 1e-6
        if not features.startswith("focused"):
            return y
        y = y / np.log1p(np.exp(p["scale"]))
        norm = np.linalg.norm(y.reshape(*y.shape[:2], -1), axis=-1)[..., None, None]
        sharp = y**3
        return sharp / (np.linalg.norm(sharp.reshape(*y.shape[:2], -1), axis=-1)[..., None, None] + 1e-6) * norm

    q, k = phi(q), phi(k)
    weights = np.einsum("bnhd,bmhd->bhnm", q, k) / 16
    out = np.einsum("bhnm,bmhd->bnhd", weights / (weights.sum(-1, keepdims=True) + 1e-6), v)
    if filters != "none":
        kernel, bias = p["depthwise/kernel"].reshape(5, 5, -1), p["depthwise/bias"].reshape(-1)
        kernel, bias = np.tile(kernel, (1, 1, 16 // kernel.shape[2])), np.tile(bias, 16 // len(bias))
        image = np.pad(v.reshape(2, 4, 4, 16), ((0, 0), (2, 2), (2, 2), (0, 0)))
        conv = sum(image[:, i : i + 4, j : j + 4] * kernel[i, j] for i in range(5) for j in range(5)) + bias
        out = out + conv.reshape(2, 16, 2, 8)
    expected = np.einsum("bnhd,hde->bne", out, p["out/kernel"]) + p["out/bias"]
    got = np.asarray(model.apply(params, x))
    # GELU's features may be negative, and a normaliser near zero: the comparison is relative to the largest value.
    assert np.abs(got - expected).max() / np.abs(expected).max() < (1e-5 if "gelu" not in features else 1e-3)


def test_a_shared_bank_collects_the_gradients_of_all_heads(draw):
    """Its gradient is the sum over heads of that of a filter per channel with the same values."""
    shared, x = attention(filters="shared")
    channel, _ = attention(filters="channel")
    params = draw(shared.spec)
    tiled = params | {
        "depthwise/kernel": np.repeat(params["depthwise/kernel"][:, :, None], 2, axis=2),
        "depthwise/bias": np.repeat(params["depthwise/bias"][None], 2, axis=0),
    }

    def grads(model, params):
        return jax.grad(lambda p: jnp.sin(model.apply(p, x)).sum())(params)

    one, two = grads(shared, params), grads(channel, tiled)
    np.testing.assert_allclose(one["depthwise/kernel"], two["depthwise/kernel"].sum(2), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(one["depthwise/bias"], two["depthwise/bias"].sum(0), rtol=1e-4, atol=1e-4)


def test_without_filters_tokens_have_no_order(draw):
    model, x = attention(filters="none")
    params, order = draw(model.spec), np.random.default_rng(0).permutation(16)
    np.testing.assert_allclose(
        model.apply(params, x[:, order]), np.asarray(model.apply(params, x))[:, order], atol=1e-5
    )


def test_impossible_sizes_are_one_line(cfg):
    with pytest.raises(InputError, match="patches of 3 do not fill inputs of 8"):
        functional(Dit, replace(cfg, patch=3)).init(jax.random.key(0)) and replace(cfg, patch=3).grid
    with pytest.raises(InputError, match="5 heads do not divide a width of 32"):
        functional(Dit, replace(cfg, heads=5))


def test_modules_are_also_objects(cfg, batch):
    module = Dit(cfg, rngs=nnx.Rngs(0))
    assert module(*map(jnp.asarray, batch)).shape == (3, 8, 8, 6)


def test_defaults_are_the_largest_published_model():
    assert dit("xl") == DitConfig()
