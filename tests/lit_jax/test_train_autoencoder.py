from dataclasses import replace

import jax
import numpy as np
import pytest

import lit_jax
from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from lit_jax.autoencoder import Autoencoder, AutoencoderConfig
from lit_jax.autoencoder_layouts import FAMILY
from lit_jax.train_autoencoder import Config, loss_fn, standardised

SMALL = AutoencoderConfig(channels=(4, 4), resnets=1, latent=2, groups=2, scaling_factor=0.5, size=16)
ICONS = SourceConfig(path="icons", split="test", text="")
CFG = Config(student=SMALL, kl=0.01, data=ICONS, held_out=ICONS, flips=0.0, pipeline=PipelineConfig(batch=8))


@pytest.fixture(scope="module")
def model():
    return functional(Autoencoder, SMALL)


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


def test_the_loss_is_the_absolute_error_and_the_weighted_divergence(model, params):
    images = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)
    key = jax.random.key(1)
    total, parts = loss_fn(CFG, model, None)(params, {"image": images}, key, None)
    mean, logvar = (np.asarray(x, np.float64) for x in model.apply(params, images, method="encode"))
    drawn = mean + np.exp(logvar / 2) * np.asarray(jax.random.normal(key, mean.shape))
    restored = np.asarray(model.apply(params, drawn.astype(np.float32), method="decode"))
    error = np.abs(restored - images).mean()
    kl = (0.5 * (mean**2 + np.exp(logvar) - 1 - logvar)).sum((1, 2, 3)).mean()
    np.testing.assert_allclose(float(parts["error"][0]) / 3, error, rtol=1e-5)
    np.testing.assert_allclose(float(parts["kl"][0]) / 3, kl, rtol=1e-5)
    np.testing.assert_allclose(float(total), error + 0.01 * kl, rtol=1e-5)


def test_latents_get_unit_variance_and_pictures_stay(one_device, model, params):
    changed = standardised(CFG, model, params)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    before, after = (model.apply(p, images, method="encode") for p in (params, changed))
    ratio = np.asarray(after.mean / before.mean)
    np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-3)
    np.testing.assert_allclose(after.logvar - before.logvar, 2 * np.log(ratio.flat[0]), atol=1e-4)
    np.testing.assert_allclose(model.apply(changed, images), model.apply(params, images), atol=1e-5)
    again = standardised(CFG, model, changed)  # their scaled standard deviation is 1 now
    np.testing.assert_allclose(again["quant/kernel"], changed["quant/kernel"], rtol=1e-4)


def test_latents_that_are_all_alike_are_refused(one_device, model, params):
    dead = params | {"quant/kernel": 0 * params["quant/kernel"]}
    constant = dead | {"quant/bias": 0 * params["quant/bias"]}
    with pytest.raises(InputError, match=r"standard deviation of 0\.0: train again with a lower optim\.lr"):
        standardised(CFG, model, constant)


def test_a_training_writes_an_autoencoder_that_loads(one_device, tmp_path):
    cfg = replace(CFG, steps=2, log_every=1, eval_every=2, save_every=2, optim=replace(CFG.optim, warmup=1))
    cfg.train(tmp_path)
    assert open_donor(tmp_path / "model", [FAMILY]).cfg == SMALL
    pictures = np.zeros((1, 16, 16, 3), np.uint8)
    loaded = lit_jax.load(str(tmp_path))
    assert loaded.decode(loaded.encode(pictures)).shape == pictures.shape
    assert (tmp_path / "samples" / "0000002.png").is_file()
