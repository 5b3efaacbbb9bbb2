"""Encoders of conditions: the order of classes and pictures."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heirloom.common.nn.functional import functional
from weightgen.generator.conditions import PerClass, SetConfig, SetOfSets


def run(model, method="__call__"):
    """Compiled whole: operation by operation these networks take ten times as long."""
    return jax.jit(partial(model.apply, method=method))


@pytest.fixture(scope="module")
def pictures():
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 3, 16)), jnp.float32)


def test_the_set_encoder_does_not_know_any_order(pictures, draw):
    model = functional(SetOfSets, SetConfig(16, hidden=8, inducing=4, out=16, latent=8))
    params = draw(model.spec)
    apply = run(model)
    out = np.asarray(apply(params, pictures))
    for other in (pictures[:, ::-1], pictures[:, :, ::-1]):
        np.testing.assert_allclose(apply(params, other), out, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(apply(params, pictures[::-1])) - out).max() > 1e-3


def test_tokens_per_class_follow_the_order_of_classes(pictures):
    model = functional(lambda cfg, rngs: PerClass(16, 8, rngs=rngs), None)
    params, there = model.init(jax.random.key(0)), jnp.ones(pictures.shape[:3], bool)
    found = model.apply(params, pictures, there)
    turned = model.apply(params, pictures[:, ::-1, ::-1], there)
    np.testing.assert_allclose(turned.tokens, found.tokens[:, ::-1], atol=1e-5)
    np.testing.assert_allclose(turned.whole, found.whole, atol=1e-5)
    assert np.abs(np.asarray(found.tokens[:, 0] - found.tokens[:, 1])).max() > 1e-2
    # A picture that is not there might be anything.
    fewer = there.at[:, :, 2].set(False)
    np.testing.assert_allclose(
        model.apply(params, pictures.at[:, :, 2].set(9.0), fewer).tokens,
        model.apply(params, pictures, fewer).tokens,
        atol=1e-6,
    )
