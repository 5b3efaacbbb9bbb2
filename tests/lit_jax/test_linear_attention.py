"""Linear attention against its definition in float64: forward, gradient, both orders, low precision, and the branch of
the values.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_jax.linear_attention import depthwise, linear_attention

BARS = {"bfloat16": (2.5e-3, 3.5e-3), "float32": (2e-6, 2e-6), "float64": (1e-14, 5e-13)}
"""Relative Frobenius error of the output and of each gradient."""


def inputs(shape, dtype, mean=0.0, seed=0):
    """q, k, v and the gradient of the output; the values have a mean of so many standard deviations."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape) + (mean if name == "v" else 0), dtype) for name in "qkvg"]


def error(ours, exact):
    ours, exact = np.asarray(ours, np.float64), np.asarray(exact, np.float64)
    return np.linalg.norm(ours - exact) / np.linalg.norm(exact)


def errors(arrays, **kwargs):
    """Errors of output, dq, dk, dv against the reference in float64 on the same rounded inputs."""
    q, k, v, g = arrays
    out, back = jax.vjp(lambda *x: linear_attention(*x, **kwargs), q, k, v)
    wide = [x.astype(jnp.float64) for x in arrays]
    exact, exact_back = jax.vjp(lambda *x: linear_attention(*x, **kwargs | {"implementation": "reference"}), *wide[:3])
    assert out.dtype == q.dtype
    return error(out, exact), *map(error, back(g), exact_back(wide[3]))


@pytest.mark.parametrize("mean", [0, 1, 3])
@pytest.mark.parametrize("order", ["linear", "quadratic"])
@pytest.mark.parametrize("dtype", BARS)
def test_both_orders_meet_the_bars_whatever_the_mean_of_the_values(dtype, order, mean):
    with jax.enable_x64(True):
        out, *gradients = errors(inputs((2, 256, 2, 64), dtype, mean), order=order)
        assert out <= BARS[dtype][0] and max(gradients) <= BARS[dtype][1], (out, gradients)


@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim"), [(64, 4, 32), (1000, 1, 192), (1024, 2, 288), (64, 1, 576), (4096, 1, 64)]
)
def test_sizes_in_low_precision(tokens, heads, head_dim):
    with jax.enable_x64(True):
        out, *gradients = errors(inputs((1, tokens, heads, head_dim), "bfloat16", 1))
        assert out <= BARS["bfloat16"][0] and max(gradients) <= BARS["bfloat16"][1], (out, gradients)


@pytest.mark.parametrize("order", ["linear", "quadratic"])
@pytest.mark.parametrize(("eps", "offset"), [(1e-6, 0.0), (1.0, 1e-6), (1e-2, 1e-2), (1.0, 1.0)])
def test_eps_and_offset_of_any_size(order, eps, offset):
    with jax.enable_x64(True):
        assert max(errors(inputs((2, 36, 3, 16), "float64", 2), order=order, eps=eps, feature_offset=offset)) < 1e-12


@pytest.mark.parametrize("order", ["linear", "quadratic"])
def test_features_may_come_ready_made(order):
    with jax.enable_x64(True):
        q, k, v, g = inputs((1, 49, 2, 16), "float64")
        ready = [jax.nn.gelu(q) + 0.5, jax.nn.gelu(k) + 0.5, v, g]
        assert max(errors(ready, order=order, feature_map="none", feature_offset=0.0)) < 1e-12
        np.testing.assert_allclose(
            linear_attention(jax.nn.relu(q), jax.nn.relu(k), v, order=order, feature_map="none"),
            linear_attention(q, k, v, order=order),
            rtol=1e-12,
        )


@pytest.mark.parametrize("order", ["linear", "quadratic"])
def test_dead_queries_and_keys_stay_finite(order):
    q, k, v, g = inputs((1, 64, 2, 16), "float32")
    for dead_q, dead_k in ((-jnp.ones_like(q), k), (q, -jnp.ones_like(k)), (-jnp.ones_like(q), -jnp.ones_like(k))):
        out, back = jax.vjp(lambda *x: linear_attention(*x, order=order), dead_q, dead_k, v)
        assert all(np.isfinite(x).all() for x in (out, *back(g)))


def test_each_head_is_its_own_and_tokens_have_no_order():
    q, k, v, _ = inputs((2, 100, 4, 8), "float32")
    out = linear_attention(q, k, v)
    alone = [linear_attention(*(x[:, :, i : i + 1] for x in (q, k, v))) for i in range(4)]
    np.testing.assert_allclose(out, jnp.concatenate(alone, axis=2), atol=1e-6)
    order = np.random.default_rng(1).permutation(100)
    np.testing.assert_allclose(linear_attention(*(x[:, order] for x in (q, k, v))), out[:, order], atol=1e-6)


def test_means_not_sums():
    """Twice the tokens change nothing. At the usual eps sums would pass too; at 1 only means do."""
    q, k, v, _ = inputs((1, 64, 2, 16), "float32")
    twice = linear_attention(*(jnp.concatenate([x, x], axis=1) for x in (q, k, v)), eps=1.0)
    np.testing.assert_allclose(twice[:, :64], linear_attention(q, k, v, eps=1.0), atol=1e-6)


def test_feature_major_is_the_same_function():
    q, k, v, _ = inputs((2, 64, 2, 16), "float32")
    weight, bias = jnp.ones((5, 5, 32)) / 25, jnp.arange(32.0)
    turned = linear_attention(
        *(x.transpose(0, 2, 3, 1) for x in (q, k, v)), layout="bhdn", conv_weight=weight, conv_bias=bias
    )
    np.testing.assert_allclose(
        turned.transpose(0, 3, 1, 2), linear_attention(q, k, v, conv_weight=weight, conv_bias=bias), atol=1e-6
    )


def test_vmap_jit_and_remat():
    arrays = [
        jnp.stack(x)
        for x in zip(inputs((2, 49, 2, 8), "float32"), inputs((2, 49, 2, 8), "float32", seed=1), strict=True)
    ]
    out, back = jax.vjp(jax.vmap(linear_attention), *arrays[:3])
    for i in range(2):
        one, one_back = jax.vjp(linear_attention, *(x[i] for x in arrays[:3]))
        np.testing.assert_allclose(out[i], one, atol=1e-6)
        for a, b in zip(back(arrays[3]), one_back(arrays[3][i]), strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-6)
    shared = jax.vmap(linear_attention, in_axes=(0, None, 0))(arrays[0], arrays[1][0], arrays[2])
    np.testing.assert_allclose(shared[1], linear_attention(arrays[0][1], arrays[1][0], arrays[2][1]), atol=1e-6)

    def loss(policy, *x):
        return jnp.square(jax.checkpoint(linear_attention, policy=policy)(*x)).sum()

    saving = jax.checkpoint_policies.save_only_these_names("lin_attn_state")
    plain = jax.grad(lambda *x: jnp.square(linear_attention(*x)).sum(), (0, 1, 2))(*(x[0] for x in arrays[:3]))
    for policy in (None, saving):
        for a, b in zip(
            jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)(policy, *(x[0] for x in arrays[:3])),
            plain,
            strict=True,
        ):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_value_branch_is_a_depthwise_convolution_with_shared_filters():
    rng = np.random.default_rng(0)
    v, bank, bias = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 42, 3, 8), (5, 5, 8), (8,)))

    def per_head(bank, bias):
        images = jnp.moveaxis(v, 2, 1).reshape(6, 6, 7, 8)
        out = jax.lax.conv_general_dilated(
            images, bank[:, :, None], (1, 1), ((2, 2), (2, 2)), dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=8,
            precision="highest",
        )  # fmt: skip
        return jnp.moveaxis((out + bias).reshape(2, 3, 42, 8), 1, 2)

    def tiled(bank, bias):
        return depthwise(v, jnp.tile(bank, 3), jnp.tile(bias, 3), grid=(6, 7))

    np.testing.assert_allclose(tiled(bank, bias), per_head(bank, bias), atol=2e-5)
    gradients = [jax.grad(lambda *x, f=f: jnp.square(f(*x)).sum(), (0, 1))(bank, bias) for f in (tiled, per_head)]
    for a, b in zip(*gradients, strict=True):
        assert error(a, b) < 1e-5


def test_what_does_not_fit_is_refused():
    q, k, v, _ = inputs((1, 42, 2, 8), "float32")
    with pytest.raises(ValueError, match="one shape"):
        linear_attention(q, k[:, :40], v)
    with pytest.raises(ValueError, match="42 tokens are no grid of 6 x 6"):
        linear_attention(q, k, v, conv_weight=jnp.ones((5, 5, 16)))
    with pytest.raises(ValueError, match=r"must be \[odd, odd, 16\]"):
        linear_attention(q, k, v, conv_weight=jnp.ones((5, 5, 8)), grid=(6, 7))
