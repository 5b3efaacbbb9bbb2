"""PCA, autoencoders, and the gate that a codec must pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from heirloom.common.typed import from_json
from weightgen.codec import Gate, TokenVae, TokenVaeConfig, fit_pca, tensor_scale, vae_loss
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
    gate = partial(Gate.of, given=rows, tolerance=0.02)
    assert not gate([0.9], [0.89], back=rows).fault
    bad = gate([0.9], [0.6], back=rows + 1)
    with pytest.raises(InputError, match=r"90\.0 % before, 60\.0 % after"):
        bad.check()
    bad.check(force=True)
    # A codec that codes nothing loses no accuracy where a prior has it all, or where there is none to lose.
    nothing = np.broadcast_to(rows.mean(0), rows.shape)
    for before, limit, wrong in (
        (0.9, 0.5, "relative error 1.000, at most 0.5"),
        (0.21, 2, "at chance: 21.0 % right, 20.0 %"),
    ):
        with pytest.raises(InputError, match=wrong):
            gate([before], [before], back=nothing, chance=0.2, limit=limit).check()
    assert not gate(np.nan, np.nan, back=rows, limit=0.5).fault and gate(np.nan, np.nan, back=nothing, limit=0.5).fault
    assert bad.error == pytest.approx(rows.size / np.sum((rows - rows.mean(0)) ** 2))


def overfit(params, loss, steps, lr):
    import optax

    optimizer = optax.adam(optax.cosine_decay_schedule(lr, steps))

    @jax.jit
    def run(params):
        def step(carry, i):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, i), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))[0][0]

    return run(params)


@pytest.mark.parametrize(("kind", "steps"), [("conv", 100), ("token", 200)])
def test_autoencoders_learn_eight_vectors_by_heart(kind, steps, draw):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 24)), jnp.float32)
    if kind == "conv":
        model = functional(ConvVae, VaeConfig(1, 24, 64, 1, 8, channels=8, multiples=(1, 1), blocks=1))
    else:
        model, x = functional(TokenVae, TokenVaeConfig(4, 6, latent=8, width=32, layers=1)), x.reshape(8, 4, 6)

    def loss(params, i):
        back, posterior = model.apply(params, x, jax.random.fold_in(jax.random.key(1), i))
        return vae_loss(x, back, posterior, beta=1e-6)

    begin = {
        path: x if path.endswith("kernel") else 0 * x + path.endswith("scale") for path, x in draw(model.spec).items()
    }
    params = overfit(begin, loss, steps, 1e-2)
    back = run(model, "decode")(params, run(model, "encode")(params, x).mean)
    assert float(jnp.sum((back - x) ** 2) / jnp.sum(x**2)) < 1e-3


def test_weights_are_standardised_tensor_by_tensor():
    rng = np.random.default_rng(0)
    spec = chunks({"w": np.zeros((2, 5), np.float32), "b": np.zeros(3, np.float32)}, 4)
    weights = np.concatenate([3 + 2 * rng.standard_normal((50, 10)), 7 * rng.standard_normal((50, 3))], 1).astype(
        np.float32
    )
    mean, std = tensor_scale(spec, spec.padded(weights))
    for tensor, own in ((0, weights[:, :10]), (1, weights[:, 10:])):
        np.testing.assert_allclose(mean[spec.tensor == tensor], own.mean(), rtol=1e-5)
        np.testing.assert_allclose(std[spec.tensor == tensor], own.std(), rtol=1e-5)
    assert not mean[~spec.mask].any() and (std[~spec.mask] == 1).all()


def test_a_codec_in_an_older_folder_is_read_alike():
    stored = {"tokens": 3, "length": 5, "normalise": "row"}
    assert from_json(TokenVaeConfig, stored).normalise == "row"
    with pytest.raises(InputError, match="normalise is 'asinh'; it is one of none, tensor"):
        from_json(TokenVaeConfig, stored | {"normalise": "asinh"})
