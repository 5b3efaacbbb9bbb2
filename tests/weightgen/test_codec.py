"""PCA, autoencoders, and the gate that a codec must pass."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from weightgen.codec import Normaliser, TokenVae, TokenVaeConfig, fit_pca, gate, vae_loss
from weightgen.d2nwg.vae import ConvVae, VaeConfig
from weightgen.tokens import chunks


def run(model, method="__call__"):
    """Compiled whole: operation by operation these networks take ten times as long."""
    return jax.jit(partial(model.apply, method=method))


def test_pca_and_the_gate():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((200, 3)) @ rng.standard_normal((3, 10)) + 1
    fit = fit_pca(rows, 3)
    latents = (rows - fit.mean) @ fit.components / fit.scale
    assert latents.std() == pytest.approx(1, abs=0.01)
    np.testing.assert_allclose(latents * fit.scale @ fit.components.T + fit.mean, rows, atol=1e-4)
    assert gate([0.9], [0.89], rows, rows, 0.02).passed
    bad = gate([0.9], [0.6], rows, rows + 1, 0.02)
    with pytest.raises(InputError, match=r"90\.0 % before, 60\.0 % after"):
        bad.check()
    bad.check(force=True)
    # A codec that codes nothing loses no accuracy where a prior has it all, or where there is none to lose.
    nothing = np.broadcast_to(rows.mean(0), rows.shape)
    for before, limit, wrong in ((0.9, 0.5, "relative error 1.000, at most 0.5"), (0.21, 2, "at chance: 21.0 % right, 20.0 %")):
        with pytest.raises(InputError, match=wrong):
            gate([before], [before], rows, nothing, 0.02, chance=0.2, limit=limit).check()
    assert gate(np.nan, np.nan, rows, rows, 0.02, limit=0.5).passed and not gate(np.nan, np.nan, rows, nothing, 0.02, limit=0.5).passed
    assert bad.error == pytest.approx(rows.size / np.sum((rows - rows.mean(0)) ** 2))


def overfit(model, loss, steps, lr):
    import optax

    optimizer = optax.adam(optax.cosine_decay_schedule(lr, steps))

    @jax.jit
    def run(params):
        def step(carry, i):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, i), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))[0][0]

    return run(model.init(jax.random.key(0)))


@pytest.mark.parametrize("kind", ["conv", "token"])
def test_autoencoders_learn_eight_vectors_by_heart(kind):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 24)), jnp.float32)
    if kind == "conv":
        model = functional(ConvVae, VaeConfig(1, 24, 64, 1, 8, channels=8, multiples=(1, 1), blocks=1))
    else:
        model, x = functional(TokenVae, TokenVaeConfig(4, 6, latent=8, width=32, layers=1)), x.reshape(8, 4, 6)

    def loss(params, i):
        back, posterior = model.apply(params, x, jax.random.fold_in(jax.random.key(1), i))
        return vae_loss(x, back, posterior, beta=1e-6)

    params = overfit(model, loss, 200, 1e-2)
    back = run(model, "decode")(params, run(model, "encode")(params, x).mean)
    assert float(jnp.sum((back - x) ** 2) / jnp.sum(x**2)) < 1e-3


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "conv": (rng.standard_normal((3, 4)).astype(np.float32), {"bias": rng.standard_normal(5).astype(np.float16)}),
        "double": [rng.standard_normal((2, 2, 2)), rng.standard_normal(())],
        "half": {"kernel": rng.standard_normal((2, 3)).astype(ml_dtypes.bfloat16)},
        "norm": {"running_mean": rng.standard_normal(5).astype(np.float32), "num_batches_tracked": np.int64(7)},
    }


@given(st.sampled_from(["none", "scale", "tensor", "row", "asinh"]), st.integers(0, 10))
def test_normalisers_come_back(kind, seed):
    spec = chunks(tree(), 4)
    tokens = np.stack([spec.flatten(tree(seed + i)).astype(np.float32) for i in range(3)])
    fitted = Normaliser.fit(kind, spec, tokens, scale=0.125)
    scaled = fitted(tokens)
    np.testing.assert_allclose(fitted.invert(scaled), tokens, rtol=2e-5, atol=2e-6)
    assert not scaled[:, ~spec.mask].any()
    if kind == "tensor":
        assert abs(scaled[:, spec.tensor == 0].std() - 1) < 1e-5
    if kind == "scale":
        np.testing.assert_allclose(scaled, tokens * 8)
