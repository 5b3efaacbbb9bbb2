"""The T5 encoder: published sizes, buckets of positions, padding, and products with bfloat16 kernels."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from heirloom.common.nn.precision import wide_matmul
from lit_jax.text.t5 import T5Config, T5Encoder, macs, parameters, position_bucket, t5


def test_parameters_of_the_published_sizes():
    counts = {size: parameters(functional(T5Encoder, t5(size)).spec)["total"] for size in ("small", "base", "xxl")}
    assert counts == {"small": 35_332_800, "base": 109_628_544, "xxl": 4_762_310_656}


def test_macs_count_the_blocks_and_not_the_tables():
    spec = functional(T5Encoder, t5("xxl")).spec
    kernels = 24 * (4 * 4096**2 + 3 * 4096 * 10240)
    assert macs(t5("xxl"), spec, 10) == 10 * kernels + 24 * 2 * 10**2 * 4096


def test_buckets_are_exact_for_near_keys_and_logarithmic_beyond():
    near = position_bucket(np.arange(-8, 9), 32, 128)
    assert near.tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0, 17, 18, 19, 20, 21, 22, 23, 24]
    far = position_bucket(np.array([-500, -128, -127, -64, -16, 16, 45, 46, 64, 90, 91, 300]), 32, 128)
    assert far.tolist() == [15, 15, 15, 14, 10, 26, 28, 29, 30, 30, 31, 31]


def test_padding_changes_nothing(small_t5):
    cfg, params = small_t5
    model, rng = functional(T5Encoder, cfg), np.random.default_rng(0)
    tokens = rng.integers(0, cfg.vocabulary, (2, 40), dtype=np.int32)
    short = model.apply(params, tokens[:, :9], np.ones((2, 9), bool))
    padded = model.apply(params, tokens, np.broadcast_to(np.arange(40) < 9, (2, 40)))
    np.testing.assert_allclose(padded[:, :9], short, rtol=0, atol=1e-5)
    assert np.abs(model.apply(params, tokens, np.ones((2, 40), bool))[:, :9] - short).max() > 0.01


def test_positions_are_relative_and_logits_are_not_divided(small_t5):
    """One head of one layer by hand: what moves with the distance, and the scale of the logits."""
    cfg = T5Config(vocabulary=4, width=2, layers=1, heads=1, head_dim=2, hidden=2, buckets=8, max_distance=20)
    model = functional(T5Encoder, cfg)
    params = {path: np.zeros(leaf.shape, np.float32) for path, leaf in model.spec.items()}
    params |= {path: np.ones_like(value) for path, value in params.items() if path.endswith("scale")}
    params["embed/table"] = np.array([[3, 4], [4, -3], [0, 1], [1, 0]], np.float32)
    params["position/table"] = np.arange(8, dtype=np.float32)[:, None]
    eye = np.eye(2, dtype=np.float32)
    for name in ("query", "key", "value"):
        params[f"blocks/attn/{name}/kernel"] = eye.reshape(1, 2, 1, 2)
    params["blocks/attn/out/kernel"] = eye.reshape(1, 1, 2, 2)
    x = np.array([[3, 4], [4, -3]], np.float32)
    n = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    logits = n @ n.T + np.array([[0, 5], [1, 0]])  # a key one place ahead is in bucket 4 + 1, one behind in bucket 1
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    y = x + weights @ n
    expected = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
    found = model.apply(params, np.array([[0, 1]]), np.ones((1, 2), bool))
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-6)


def test_products_with_a_bfloat16_kernel_keep_sixteen_bits_of_the_input():
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((7, 256), np.float32), rng.standard_normal((256, 33), np.float32)
    narrow = kernel.astype(ml_dtypes.bfloat16)
    exact = x.astype(np.float64) @ narrow.astype(np.float64)
    found = jax.jit(wide_matmul)(x, jnp.asarray(narrow))
    assert found.dtype == jnp.float32
    scale = np.abs(x).astype(np.float64) @ np.abs(narrow).astype(np.float64)
    assert np.max(np.abs(found - exact) / scale) < 2**-17
    half = jax.jit(wide_matmul)(x, jnp.asarray(kernel, jnp.float16))
    np.testing.assert_allclose(half, x @ kernel.astype(np.float16).astype(np.float32), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(heads=0), "heads is 0: choose 1 or more"),
        (dict(buckets=30), "30 buckets up to a distance of 128: choose a multiple of 4, and a distance above"),
        (dict(max_distance=8), "32 buckets up to a distance of 8: choose a multiple of 4, and a distance above"),
        (dict(eps=float("nan")), "eps is nan"),
    ],
)  # fmt: skip
def test_a_size_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        T5Config(**wrong)
