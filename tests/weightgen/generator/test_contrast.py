"""Losses that align a data-set encoder with latents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heirloom.common.nn.functional import functional
from weightgen.generator.conditions import SetConfig
from weightgen.generator.contrast import LOSSES, Aligned, info_nce, siglip, soft_target


def test_soft_targets_by_hand():
    w = np.array([[1.0, 0], [0, 1], [1, 1]])
    d = np.array([[0.5, 0], [0, 2], [1, 0]])
    soft = lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True)  # noqa: E731
    s, t = w @ d.T, soft((w @ w.T + d @ d.T) / 2)
    expected = -(t * np.log(soft(s))).sum(1).mean() / 2 - (t.T * np.log(soft(s.T))).sum(1).mean() / 2
    assert float(soft_target(jnp.asarray(w), jnp.asarray(d))) == pytest.approx(expected, rel=1e-6)
    # The gradient flows into the targets through the data embeddings: it is that of the whole expression.
    with jax.enable_x64(True):
        grad = np.asarray(jax.grad(lambda d: soft_target(jnp.asarray(w), d))(jnp.asarray(d)))
        step = np.zeros_like(d)
        step[1, 0] = 1e-5
        up, down = (float(soft_target(jnp.asarray(w), jnp.asarray(d + sign * step))) for sign in (1, -1))
    assert grad[1, 0] == pytest.approx((up - down) / 2e-5, rel=1e-5)


def test_other_alignment_losses():
    eye = jnp.eye(4)
    for temperature in (1.0, 0.5):
        found = float(info_nce(eye, eye, temperature))
        assert found == pytest.approx(np.log(np.exp(1 / temperature) + 3) - 1 / temperature, rel=1e-6)
    assert float(info_nce(eye, 7 * eye, 0.07)) < 1e-5 < float(info_nce(eye, eye[::-1], 0.07))
    assert float(siglip(eye, eye, 10.0, -5.0)) == pytest.approx(np.log1p(np.exp(-5)) * 4, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "begin", "learned"),
    [("info_nce", 1 / 0.07, {"logit_scale"}), ("siglip", 10, {"logit_scale", "logit_bias"}), ("soft_target", 1, set())],
)
def test_temperatures_are_learned(loss, begin, learned):
    model = functional(
        lambda cfg, rngs: Aligned(cfg, loss, rngs=rngs), SetConfig(4, hidden=4, inducing=1, out=4, latent=8)
    )
    params = {path: jnp.zeros(leaf.shape) for path, leaf in model.spec.items()}
    w, data = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 8)), jnp.float32)

    def value(own):
        return model.apply(params | own, w, data, method="nats")

    own = {"logit_scale": jnp.log(float(begin)), "logit_bias": jnp.float32(-10)}
    assert float(value(own)) == pytest.approx(float(LOSSES[loss](w, data)), rel=1e-5), (
        "these are the constants of the functions"
    )
    assert {path for path, g in jax.grad(value)(own).items() if g} == learned
    assert value({"logit_scale": jnp.float32(9)}) == value({"logit_scale": jnp.float32(5)}), "a scale of 100 at most"
