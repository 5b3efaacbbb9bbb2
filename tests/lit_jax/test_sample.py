"""Sampling: guidance on the channels that are asked for, modulations ahead or step by step, any number of labels on any
mesh.
"""

import json
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from PIL import Image

from heirloom.common.data.grid import grid, save_grid
from heirloom.common.diffusion import Prediction
from heirloom.common.errors import InputError
from heirloom.common.mesh import start
from heirloom.common.nn.functional import functional
from lit_jax import sample
from lit_jax.decode import PictureDecoder, open_pictures, to_uint8
from lit_jax.denoiser import PromptConfig
from lit_jax.dit import Dit
from lit_jax.generate import class_keys
from lit_jax.sample import SampleConfig, check_whole, drawer, guide, picture_keys


@pytest.fixture(scope="module")
def mesh():
    return start()


@pytest.fixture(scope="module")
def model(lit, draw):
    model = functional(Dit, lit)
    return model, draw(model.spec)


def test_guidance_is_by_channel():
    conditional, free = (
        Prediction(jnp.full((1, 2, 2, 4), value), jnp.full((1, 2, 2, 4), 10 * value)) for value in (3.0, 1.0)
    )
    some = guide(conditional, free, SampleConfig(guidance=1.5, guided="first three"))
    np.testing.assert_array_equal(some.noise[0, 0, 0], [4, 4, 4, 3])
    np.testing.assert_array_equal(some.ratio, conditional.ratio)
    every = guide(conditional, free, SampleConfig(guidance=1.5, guided="all"))
    np.testing.assert_array_equal(every.noise[0, 0, 0], [4, 4, 4, 4])


@pytest.mark.parametrize(
    "how", [SampleConfig("ddpm", 6), SampleConfig("ddim", 5, guidance=2.0), SampleConfig("dpm", 5, guidance=2.0)]
)
def test_modulations_ahead_or_step_by_step_draw_the_same(lit, model, mesh, monkeypatch, how):
    module, params = model
    labels, key = [4, 0, 4, 2, 5], jax.random.key(1)
    ahead = drawer(module, lit, how, mesh)(params, labels, key)
    assert ahead.shape == (5, 8, 8, 3) and np.isfinite(ahead).all()
    monkeypatch.setattr(sample, "PRECOMPUTE_LIMIT", 0)
    np.testing.assert_allclose(drawer(module, lit, how, mesh)(params, labels, key), ahead, rtol=1e-4, atol=1e-4)


def test_a_sample_is_the_loop_written_out(lit, model, mesh):
    """DDIM with guidance, by hand: two calls of the whole network at each step."""
    module, params = model
    how, key = SampleConfig("ddim", 4, guidance=3.0, guided="all"), jax.random.key(2)
    labels = np.array([1, 3])
    drawn = drawer(module, lit, how, mesh)(params, labels, key)
    starts = [jax.random.split(jax.random.fold_in(key, i))[0] for i in range(2)]
    table, x = how.make(), jnp.stack([jax.random.normal(start, (8, 8, 3)) for start in starts])
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
    with pytest.raises(InputError, match="no class 6: this model has 0 to 4, and 5 for no class"):
        drawer(module, lit, SampleConfig("ddim", 2), mesh)(params, [6], jax.random.key(0))
    with pytest.raises(InputError, match=r"steps 333 with ddim: no integer stride.* nearest number possible is 334"):
        SampleConfig("ddim", 333).make()
    for steps, sampler in ((0, "ddpm"), (-5, "dpm"), (1001, "dpm"), (2000, "ddpm")):
        with pytest.raises(InputError, match=f"--steps {steps} with {sampler}: choose between 1 and 1000"):
            SampleConfig(sampler, steps).make()
    with pytest.raises(InputError, match="with ddpm returns noise: use 2 steps or more"):
        SampleConfig("ddpm", 1).make()
    assert len(SampleConfig("dpm", 1).make()) == 1
    for guidance in (float("nan"), True, None, "2", [2.0], 10**400):
        with pytest.raises(InputError, match=r"guidance is .*: give a number"):
            SampleConfig(guidance=guidance)
    for steps in (True, 2.5, None, "4", [4]):
        with pytest.raises(InputError, match=r"--steps .* with dpm: choose between 1 and 1000"):
            SampleConfig("dpm", steps).make()
    for count in (True, 2.0, None, [1]):
        with pytest.raises(InputError, match=r"count is .*: choose a whole number"):
            check_whole("count", count)


def test_settings_from_python_are_stored_as_plain_numbers():
    """So that one setting is compiled once, and fits the JSON of a picture."""
    given = dict(steps=np.int64(4), guidance=np.float32(2), guided_steps=[np.float32(0.25), 1])
    plain = PromptConfig(steps=4, guidance=2.0, guided_steps=(0.25, 1.0))
    assert PromptConfig(**given) == plain and hash(PromptConfig(**given)) == hash(plain)
    assert json.loads(json.dumps(asdict(PromptConfig(**given)))) == json.loads(json.dumps(asdict(plain)))
    assert PromptConfig(guided_steps=np.array([0.25, 1])).guided_steps == (0.25, 1.0)
    for wrong in ((0.1,), 0.5, None, ("a", "b"), (0.9, 0.1), (0, True), (0.0, float("nan")), "ab", np.array(0.5)):
        with pytest.raises(InputError, match=r"guided_steps are .*: give two shares of the steps, such as 0.1 0.8"):
            PromptConfig(guided_steps=wrong)


def test_integer_times_are_not_as_many_as_the_chain_has():
    """Two of them would be the same step: a division by zero."""
    with pytest.raises(InputError, match="--steps 1000 with dpm: integer times are of at most 999 steps"):
        PromptConfig(steps=1000, times="integer").make()
    with pytest.raises(InputError, match=r"--steps 2\.5 with dpm: choose between 1 and 1000"):
        PromptConfig(steps=2.5).make()
    for how in (PromptConfig(steps=999, times="integer"), PromptConfig(steps=1000)):
        assert all(np.isfinite(column).all() for column in vars(how.make()).values())


@pytest.mark.parametrize("config", [SampleConfig, PromptConfig])
def test_guidance_below_none(config, remarks):
    with pytest.raises(InputError, match="guidance is -1, which draws away from the class or prompt: give 1"):
        config(guidance=-1)
    assert config(guidance=1).guidance == 1 and remarks() == []
    assert config(guidance=0).guidance == 0 and "0 ignores the class or prompt, 1 is no" in remarks()[0]


def test_a_model_without_a_class_for_none_is_not_guided(lit, draw, mesh):
    cfg = replace(lit, null_class=False)
    module = functional(Dit, cfg)
    with pytest.raises(InputError, match=r"guidance 2: .*no null class"):
        drawer(module, cfg, SampleConfig("ddim", 2, guidance=2.0), mesh)
    drawn = drawer(module, cfg, SampleConfig("ddim", 2), mesh)
    with pytest.raises(InputError, match="no class 5: this model has 0 to 4, and no null class"):
        drawn(draw(module.spec), [5], jax.random.key(0))


@pytest.mark.parametrize("how", [SampleConfig("ddpm", 4, guidance=2.0), SampleConfig("dpm", 4)])
def test_a_picture_is_the_same_in_any_batch_and_on_any_mesh(lit, model, mesh, how):
    """Its noise is that of its own key, at the start and at every step."""
    module, params = model
    labels, keys = np.array([4, 0, 4, 2, 3]), picture_keys(jax.random.key(7), np.arange(5))
    together = np.asarray(drawer(module, lit, how, mesh)(params, labels, keys))
    single = jax.make_mesh(
        (1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )
    alone = drawer(module, lit, how, single)
    for rows in ([3], [4, 1]):
        np.testing.assert_allclose(
            alone(params, labels[rows], keys[np.array(rows)]), together[rows], rtol=1e-4, atol=1e-4
        )
    np.testing.assert_allclose(drawer(module, lit, how, mesh)(params, labels, jax.random.key(7)), together, rtol=1e-6)
    assert np.abs(together[0] - together[2]).max() > 0.1  # the same class, another key


def test_the_key_of_a_picture_is_of_seed_class_and_number():
    data = jax.random.key_data
    many, few = class_keys(3, [7, 2], 4), class_keys(3, [2], 2)
    np.testing.assert_array_equal(data(many)[4:6], data(few))
    assert len(np.unique(data(many), axis=0)) == 8
    assert not np.array_equal(data(class_keys(4, [2], 2)), data(few))
    again = np.asarray(data(class_keys(3, [2, 7, 2], 2)))
    np.testing.assert_array_equal(again[[0, 1, 4, 5]], data(class_keys(3, [2], 4)))
    for seed in (-1, 2**32):
        with pytest.raises(InputError, match=f"seed {seed}: choose a whole number from 0 to 4294967295"):
            class_keys(seed, [0], 1)


def test_pictures_that_are_not_finite_are_named():
    """NaN would become a black picture."""
    drawn = np.zeros((4, 2, 2, 3), np.float32)
    drawn[2, 1, 1, 0] = np.inf
    with pytest.raises(InputError, match=r"step 50: picture 10: the model's output is not finite \(NaN or infinity\)"):
        PictureDecoder(lambda x: x)(drawn, first=8, where="step 50: ")
    with pytest.raises(InputError, match="picture 1: the decoder's output is not finite"):
        PictureDecoder(lambda x: x * np.array([1.0, np.nan]).reshape(2, 1, 1, 1))(jnp.ones((2, 2, 2, 3)))


def test_grids(tmp_path):
    pictures = np.stack([np.full((2, 2, 3), 10 * i, np.uint8) for i in range(5)])
    image = np.asarray(grid(pictures))
    assert image.shape == (4, 6, 3)
    assert image[::2, ::2, 0].tolist() == [[0, 10, 20], [30, 40, 255]]
    assert np.asarray(grid(pictures, columns=1)).shape == (10, 2, 3)
    save_grid(pictures, tmp_path / "grid.png", least=24)
    assert Image.open(tmp_path / "grid.png").size == (24, 16)


def test_pixels_are_truncated_as_in_the_release():
    assert to_uint8(np.array([-1.0, -0.999, 0.0, 0.9999, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255, 255]


def test_pixel_models_need_no_decoder_and_latent_models_say_so(lit, mesh):
    pixels = open_pictures(lit, "", mesh)
    assert pixels is not None
    np.testing.assert_array_equal(pixels(jnp.zeros((1, 8, 8, 3))), np.full((1, 8, 8, 3), 128))
    assert open_pictures(replace(lit, channels=4), "", mesh) is None
