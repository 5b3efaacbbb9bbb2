"""Published counts, symmetries, and the reference losses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heirloom.common.diffusion import ddim, ddpm, scaled_linear_schedule
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from weightgen.codec import TokenVae, TokenVaeConfig, fit_pca, gate, vae_loss
from weightgen.d2nwg.model import Reference, ReferenceConfig, latent_scale, preset, sample, stage2_loss
from weightgen.d2nwg.unet import Unet, UnetConfig
from weightgen.d2nwg.vae import ConvVae, VaeConfig
from weightgen.generator.conditions import MlpSet, PerClass, SetConfig, SetOfSets, SetTransformer
from weightgen.generator.config import GeneratorConfig
from weightgen.generator.contrast import LOSSES, Aligned, info_nce, siglip, soft_target


def run(model, method="__call__"):
    """Compiled whole: operation by operation these networks take ten times as long."""
    return jax.jit(partial(model.apply, method=method))


def count(model):
    return sum(leaf.count for leaf in model.spec.values())


@pytest.mark.parametrize(
    ("module", "cfg", "parameters"),
    [
        (ConvVae, VaeConfig(), 38_566_165),
        (Unet, UnetConfig(), 102_684_929),
        (SetTransformer, SetConfig(), 684_160),
        (SetOfSets, SetConfig(), 1_893_632),
        (lambda cfg, rngs: MlpSet(rngs=rngs), None, 2_098_380),
    ],
)
def test_published_counts(module, cfg, parameters):
    assert count(functional(module, cfg)) == parameters


def test_the_latent_is_4_x_16_x_16_and_the_image_must_be_filled():
    assert VaeConfig().latent_shape == (16, 16, 4)
    model = functional(ConvVae, VaeConfig())
    out = jax.eval_shape(
        lambda p, x: model.apply(p, x, method="encode").mean,
        {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in model.spec.items()},
        jax.ShapeDtypeStruct((2, 2864), np.float32),
    )
    assert out.shape == (2, 16, 16, 4)
    quants = sum(leaf.count for path, leaf in model.spec.items() if "quant/" in path)
    assert quants == 92
    with pytest.raises(InputError, match=r"1 x 4000 = 4000.*1 x 64\^2 = 4096"):
        VaeConfig(fdim=4000)


def test_the_unet_is_zero_at_first_and_uses_its_condition():
    cfg = UnetConfig(size=8, channels=8, multiples=(1, 2), attention=(2,), groups=4)
    model = functional(Unet, cfg)
    params = model.init(jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 1)), jnp.float32)
    apply = run(model)
    assert not np.asarray(apply(params, x, jnp.ones(2), x)).any()
    rng = np.random.default_rng(1)
    params = {path: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), jnp.float32) for path, leaf in params.items()}
    outs = [np.asarray(apply(params, x, jnp.full(2, t), c)) for t, c in ((1.0, x), (1.0, -x), (500.0, x))]
    assert np.abs(outs[0] - outs[1]).max() > 1e-3 and np.abs(outs[0] - outs[2]).max() > 1e-3


@pytest.fixture(scope="module")
def pictures():
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 3, 16)), jnp.float32)


def test_the_set_encoder_does_not_know_any_order(pictures):
    model = functional(SetOfSets, SetConfig(16, hidden=8, inducing=4, out=16, latent=8))
    params = model.init(jax.random.key(0))
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
        model.apply(params, pictures.at[:, :, 2].set(9.0), fewer).tokens, model.apply(params, pictures, fewer).tokens, atol=1e-6
    )


def test_the_released_schedule_and_its_samplers():
    chain = scaled_linear_schedule()
    assert chain.beta[0] == pytest.approx(0.0015) and chain.beta[-1] == pytest.approx(0.0155)
    assert chain.alpha_bar[-1] == pytest.approx(5.61e-4, rel=2e-3)
    assert int(np.argmin(np.abs(chain.alpha_bar - 0.5))) == pytest.approx(270, abs=2)
    # Posterior: mean coefficients and variance of q(x_{t-1} | x_t, x_0), by Bayes.
    t = 400
    before, alpha = chain.alpha_bar[t - 1], 1 - chain.beta[t]
    precision = 1 / (1 - before) + alpha / chain.beta[t]
    assert chain.posterior_variance[t] == pytest.approx(1 / precision)
    assert chain.posterior_mean[t] == pytest.approx(
        [np.sqrt(alpha) / chain.beta[t] / precision, np.sqrt(before) / (1 - before) / precision]
    )
    # DDIM at eta 1 over all steps takes DDPM's steps, with the posterior variance.
    a, b = ddim(chain, eta=1.0), ddpm(chain)
    on_clean = np.stack([a.keep, a.clean]), np.stack([b.keep, b.clean])
    np.testing.assert_allclose(*on_clean, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(a.log_variance[:-1, 0], b.log_variance[:-1, 0], rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_soft_targets_by_hand(temperature):
    w = np.array([[1.0, 0], [0, 1], [1, 1]])
    d = np.array([[0.5, 0], [0, 2], [1, 0]])
    soft = lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True)  # noqa: E731
    s, t = w @ d.T / temperature, soft((w @ w.T + d @ d.T) / 2 * temperature)
    expected = -(t * np.log(soft(s))).sum(1).mean() / 2 - (t.T * np.log(soft(s.T))).sum(1).mean() / 2
    assert float(soft_target(jnp.asarray(w), jnp.asarray(d), temperature)) == pytest.approx(expected, rel=1e-6)
    # The gradient flows into the targets through the data embeddings: it is that of the whole expression.
    with jax.enable_x64(True):
        grad = np.asarray(jax.grad(lambda d: soft_target(jnp.asarray(w), d, temperature))(jnp.asarray(d)))
        step = np.zeros_like(d)
        step[1, 0] = 1e-5
        up, down = (float(soft_target(jnp.asarray(w), jnp.asarray(d + sign * step), temperature)) for sign in (1, -1))
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
    model = functional(lambda cfg, rngs: Aligned(cfg, loss, rngs=rngs), SetConfig(4, hidden=4, inducing=1, out=4, latent=8))
    params = {path: jnp.zeros(leaf.shape) for path, leaf in model.spec.items()}
    w, data = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 8)), jnp.float32)

    def value(own):
        return model.apply(params | own, w, data, method="nats")

    own = {"logit_scale": jnp.log(float(begin)), "logit_bias": jnp.float32(-10)}
    assert float(value(own)) == pytest.approx(float(LOSSES[loss](w, data)), rel=1e-5), "these are the constants of the functions"
    assert {path for path, g in jax.grad(value)(own).items() if g} == learned
    assert value({"logit_scale": jnp.float32(9)}) == value({"logit_scale": jnp.float32(5)}), "a scale of 100 at most"


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


def test_the_released_pipeline_fits_together():
    cfg = ReferenceConfig(
        VaeConfig(1, 24, 64, 1, 8, channels=8, multiples=(1, 1), blocks=1),
        UnetConfig(size=8, channels=8, multiples=(1,), attention=(), groups=4),
        features=SetConfig(features=6),
        slots=6,
        scale=0.5,
        steps=4,
    )
    model = functional(Reference, cfg)
    params = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.standard_normal((3, 24)), jnp.float32)
    support = jnp.asarray(rng.standard_normal((3, 3, 2, 6)), jnp.float32)
    key = jax.random.key(1)
    # Decoding the latent image is decoding the latent: the reshape by memory order is undone, and so is the scale.
    image = run(model, "latents")(params, weights, key)
    back, _ = run(model, "reconstruct")(params, weights, key)
    np.testing.assert_allclose(run(model, "decode")(params, image), 0.5 * back, atol=1e-5)
    k = latent_scale(model, params, weights, key)
    assert float((k * image).std()) == pytest.approx(1, rel=1e-5)
    # A UNet that says 0 has the error of unit noise; the autoencoder is not trained by it, and drawing gives finite weights.
    value, grads = jax.jit(jax.value_and_grad(lambda p: stage2_loss(model, cfg, k, p, weights, support, key)))(params)
    assert float(value) == pytest.approx(1, abs=0.25)
    assert not any(np.asarray(g).any() for path, g in grads.items() if path.startswith("vae/"))
    assert np.asarray(grads["unet/leave/bias"]).any()
    drawn = jax.jit(lambda params: sample(model, cfg, k, params, support, key))(params)
    assert drawn.shape == (3, 24) and np.isfinite(drawn).all()
    assert preset("d2nwg") == ReferenceConfig() and preset("default") == GeneratorConfig()
    with pytest.raises(InputError, match="did you mean 'd2nwg'"):
        preset("d2nw")
    with pytest.raises(InputError, match="does not fill"):
        ReferenceConfig(cfg.vae)
