"""The released system: published counts, its parts, and how they fit together."""

from functools import partial

import jax
import numpy as np
import pytest

from heirloom.common.diffusion import ddim, ddpm, scaled_linear_schedule
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from weightgen.d2nwg.model import D2nwg, D2nwgConfig, latent_scale, sample, stage2_loss
from weightgen.d2nwg.unet import Unet, UnetConfig
from weightgen.d2nwg.vae import ConvVae, VaeConfig
from weightgen.generator.conditions import MlpSet, SetConfig, SetOfSets, SetTransformer


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


def test_the_unet_is_zero_at_first_and_uses_its_condition(draw):
    cfg = UnetConfig(size=4, channels=8, multiples=(1, 2), blocks=1, attention=(2,), groups=4)
    model = functional(Unet, cfg)
    params = draw(model.spec)
    # decides alone: it is the last layer
    leave = model.init(jax.random.key(0), [path for path in params if path.startswith("leave/")])
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 1)).astype(np.float32)
    apply = run(model)
    assert len(leave) == 2 and not np.asarray(apply(params | leave, x, np.ones(2), x)).any()
    outs = [np.asarray(apply(params, x, np.full(2, t), c)) for t, c in ((1.0, x), (1.0, -x), (500.0, x))]
    assert np.abs(outs[0] - outs[1]).max() > 1e-3 and np.abs(outs[0] - outs[2]).max() > 1e-3


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


def test_the_released_pipeline_fits_together(draw):
    cfg = D2nwgConfig(
        VaeConfig(1, 24, 64, 1, 8, channels=8, multiples=(1, 1), blocks=1),
        UnetConfig(size=8, channels=8, multiples=(1,), blocks=1, attention=(), groups=4),
        features=SetConfig(features=6),
        slots=6,
        scale=0.5,
        steps=4,
    )
    model = functional(D2nwg, cfg)
    params = {path: 0 * x if path.startswith("unet/leave/") else x for path, x in draw(model.spec).items()}
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3, 24)).astype(np.float32)
    support = rng.standard_normal((3, 3, 2, 6)).astype(np.float32)
    key = jax.random.key(1)
    # Decoding the latent image is decoding the latent: the reshape by memory order is undone, and so is the scale.
    image = run(model, "latents")(params, weights, key)
    back, _ = run(model, "reconstruct")(params, weights, key)
    np.testing.assert_allclose(run(model, "decode")(params, image), 0.5 * back, atol=1e-5)
    k = latent_scale(model, params, weights, key)
    assert float((k * image).std()) == pytest.approx(1, rel=1e-5)
    # A UNet that says 0 has the error of unit noise; the autoencoder is not trained; draws are finite.
    value, grads = jax.jit(jax.value_and_grad(lambda p: stage2_loss(model, cfg, k, p, weights, support, key)))(params)
    assert float(value) == pytest.approx(1, abs=0.25)
    assert not any(np.asarray(g).any() for path, g in grads.items() if path.startswith("vae/"))
    assert np.asarray(grads["unet/leave/bias"]).any()
    drawn = jax.jit(lambda params: sample(model, cfg, k, params, support, key))(params)
    assert drawn.shape == (3, 24) and np.isfinite(drawn).all()
    with pytest.raises(InputError, match="does not fill"):
        D2nwgConfig(cfg.vae)
