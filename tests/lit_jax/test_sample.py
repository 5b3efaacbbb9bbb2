"""Sampling: guidance on the channels that are asked for, modulations ahead or step by step, any number of labels on any mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from common.diffusion import Prediction
from common.errors import InputError
from common.nn.functional import functional
from common.train.mesh import MeshConfig, start
from lit_jax import sample
from lit_jax.decode import Pictures, open_pictures
from lit_jax.dit import Dit
from lit_jax.sample import SampleConfig, drawer, grid, guide, save_grid


@pytest.fixture(scope="module")
def mesh():
    return start(MeshConfig())


@pytest.fixture(scope="module")
def model(lit, draw):
    model = functional(Dit, lit)
    return model, draw(model.spec)


def test_guidance_is_by_channel():
    conditional, free = (Prediction(jnp.full((1, 2, 2, 4), value), jnp.full((1, 2, 2, 4), 10 * value)) for value in (3.0, 1.0))
    some = guide(conditional, free, SampleConfig(guidance=1.5, guided="first three"))
    np.testing.assert_array_equal(some.noise[0, 0, 0], [4, 4, 4, 3])
    np.testing.assert_array_equal(some.ratio, conditional.ratio)
    every = guide(conditional, free, SampleConfig(guidance=1.5, guided="all"))
    np.testing.assert_array_equal(every.noise[0, 0, 0], [4, 4, 4, 4])


@pytest.mark.parametrize("how", [SampleConfig("ddpm", 6), SampleConfig("ddim", 5, guidance=2.0), SampleConfig("dpm", 5, guidance=2.0)])
def test_modulations_ahead_or_step_by_step_draw_the_same(lit, model, mesh, monkeypatch, how):
    module, params = model
    labels, key = [4, 0, 4, 2, 5], jax.random.key(1)
    ahead = drawer(module, lit, how, mesh)(params, labels, key)
    assert ahead.shape == (5, 8, 8, 3) and np.isfinite(ahead).all()
    monkeypatch.setattr(sample, "AHEAD", 0)
    np.testing.assert_allclose(drawer(module, lit, how, mesh)(params, labels, key), ahead, rtol=1e-4, atol=1e-4)


def test_a_sample_is_the_loop_written_out(lit, model, mesh):
    """DDIM with guidance, by hand: two calls of the whole network at each step."""
    module, params = model
    how, key = SampleConfig("ddim", 4, guidance=3.0, guided="all"), jax.random.key(2)
    labels = np.array([1, 3])
    drawn = drawer(module, lit, how, mesh)(params, labels, key)
    table, x = how.make(), jax.random.normal(jax.random.split(key)[0], (2, 8, 8, 3))
    for i, t in enumerate(table.time):
        noises = [module.apply(params, x, np.full(2, t), y)[..., :3] for y in (labels, np.full(2, lit.classes))]
        noise = noises[1] + 3.0 * (noises[0] - noises[1])
        clean = (x - table.sigma[i] * noise) / table.alpha[i]
        x = table.keep[i] * x + table.clean[i] * clean
    np.testing.assert_allclose(drawn, x, rtol=2e-4, atol=2e-4)


def test_without_guidance_the_free_branch_is_not_computed(lit, model, mesh):
    module, params = model
    seen = []

    class Spy:
        @staticmethod
        def apply(params, *args, method):
            if method == "denoise":
                seen.append(args[0].shape)
            return module.apply(params, *args, method=method)

    drawer(Spy, lit, SampleConfig("ddim", 2), mesh)(params, [0, 1], jax.random.key(0))
    assert len(seen) == 1
    drawer(Spy, lit, SampleConfig("ddim", 2, guidance=2.0), mesh)(params, [0, 1], jax.random.key(0))
    assert len(seen) == 3


def test_wrong_classes_and_steps_are_one_line(lit, model, mesh):
    module, params = model
    with pytest.raises(InputError, match="no class 6: this model has 0 to 4, and 5 for none"):
        drawer(module, lit, SampleConfig("ddim", 2), mesh)(params, [6], jax.random.key(0))
    with pytest.raises(InputError, match="steps 333 with ddim: no integer stride"):
        SampleConfig("ddim", 333).make()
    with pytest.raises(InputError, match="2000 steps of 1000"):
        SampleConfig("ddpm", 2000).make()


def test_grids(tmp_path):
    pictures = np.stack([np.full((2, 2, 3), 10 * i, np.uint8) for i in range(5)])
    image = np.asarray(grid(pictures))
    assert image.shape == (4, 6, 3)
    assert image[::2, ::2, 0].tolist() == [[0, 10, 20], [30, 40, 255]]
    assert np.asarray(grid(pictures, columns=1)).shape == (10, 2, 3)
    save_grid(pictures, tmp_path / "grid.png", least=24)
    assert Image.open(tmp_path / "grid.png").size == (24, 16)


def test_pixels_are_truncated_as_in_the_release():
    assert Pictures.to_uint8(np.array([-1.0, -0.999, 0.0, 0.9999, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255, 255]


def test_pixel_models_need_no_decoder_and_latent_models_say_so(lit, mesh):
    pixels = open_pictures(lit, "", mesh)
    assert pixels is not None
    np.testing.assert_array_equal(pixels(jnp.zeros((1, 8, 8, 3))), np.full((1, 8, 8, 3), 128))
    assert open_pictures(replace(lit, channels=4), "", mesh) is None
