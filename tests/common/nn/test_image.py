"""Parts of image models by their formulas: pooling, a layer over pixels, the posterior, unit norm, activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heirloom.common.errors import InputError
from heirloom.common.nn.image import average_pool, over_pixels, upsample
from heirloom.common.nn.mlp import HF_ACTIVATIONS, HF_NAMES, check_activation
from heirloom.common.nn.moments import Moments
from heirloom.common.nn.norm import unit


def test_pooling_undoes_upsampling_and_takes_means():
    x = jnp.arange(8.0).reshape(1, 2, 2, 2)
    np.testing.assert_array_equal(upsample(x)[0, :, :, 0], [[0, 0, 2, 2], [0, 0, 2, 2], [4, 4, 6, 6], [4, 4, 6, 6]])
    np.testing.assert_array_equal(average_pool(upsample(x), 2), x)
    np.testing.assert_array_equal(average_pool(x, 2), [[[[3, 4]]]])
    assert average_pool(x, 1) is x


def test_pixels_are_tokens_row_by_row():
    x = np.arange(12.0).reshape(1, 2, 3, 2)
    shifted = over_pixels(lambda tokens: np.roll(tokens, 1, axis=1), x)
    np.testing.assert_array_equal(shifted[0, :, :, 0], [[10, 0, 2], [4, 6, 8]])


def test_the_posterior_is_bounded_and_its_kl_is_summed_over_the_latent():
    moments = Moments.bounded(jnp.full((2, 3, 1), 2.0), jnp.full((2, 3, 1), -99.0))
    np.testing.assert_array_equal(moments.logvar, np.full((2, 3, 1), -30))
    np.testing.assert_allclose(moments.sample(jax.random.key(0)), 2, atol=1e-5)
    np.testing.assert_allclose(moments.kl(), [3 * 0.5 * (4 + np.exp(-30) - 1 + 30)] * 2, rtol=1e-6)


def test_unit_norm_keeps_the_kind_of_array_and_zeros():
    rows = np.array([[3.0, 4.0], [0.0, 0.0]])
    assert isinstance(unit(rows), np.ndarray) and unit(rows).dtype == np.float64
    for got in (unit(rows), unit(jnp.asarray(rows))):
        np.testing.assert_allclose(got, [[0.6, 0.8], [0, 0]], rtol=1e-6)


def test_names_of_activations():
    names = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh", "silu": "silu"}
    assert names == HF_NAMES
    assert (HF_ACTIVATIONS["gelu_python"], HF_ACTIVATIONS["gelu_fast"]) == ("gelu", "gelu_tanh")
    with pytest.raises(InputError, match=r"no activation 'quick_gely'.*\(gelu, gelu_tanh, quick_gelu, silu\)"):
        check_activation("quick_gely")
