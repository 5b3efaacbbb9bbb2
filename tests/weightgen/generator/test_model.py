"""Generators: symmetries, samplers and the linear prior."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from heirloom.common.diffusion import linear_schedule
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from weightgen.codec import TokenCodec, TokenVaeConfig
from weightgen.generator.config import GeneratorConfig
from weightgen.generator.denoiser import DenoiserConfig
from weightgen.generator.loss import loss
from weightgen.generator.model import Generator, fit_stage1
from weightgen.generator.sample import SampleConfig, drawer
from weightgen.tokens import chunks
from weightgen.zoo.data import Bank, draw_tasks
from weightgen.zoo.nets import NetConfig
from weightgen.zoo.zoo import Zoo

ORDERS = ("ordered", "exchangeable")


SMALL = DenoiserConfig(width=16, layers=1, heads=2, hidden=16)


@pytest.fixture(scope="module")
def generator():
    """A head generator with weights far from the initial ones and a codec that keeps everything."""
    cfg = GeneratorConfig(NetConfig(features=4, classes=3), latent=5, shots=2, denoiser=SMALL)
    model = functional(Generator, cfg)
    rng = np.random.default_rng(0)
    params = {
        path: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32) for path, leaf in model.spec.items()
    }
    params |= {"codec/components": jnp.eye(5), "codec/scale": jnp.ones(()), "codec/mean": jnp.zeros((1, 5))}
    support = jnp.asarray(rng.standard_normal((8, 3, 2, 4)), jnp.float32)
    return cfg, model, params, support, jnp.ones((8, 3, 2), bool)


def test_heads_follow_the_order_of_classes(generator):
    _, model, params, support, there = generator
    x, t = jnp.asarray(np.random.default_rng(1).standard_normal((8, 3, 5)), jnp.float32), jnp.full(8, 300.0)
    out = model.apply(params, x, t, support, there)
    turned = model.apply(params, x[:, ::-1], t, support[:, ::-1], there)
    np.testing.assert_allclose(turned[:, ::-1], out, atol=1e-5)
    expected = [model.apply(params, s, there, method="expected") for s in (support, support[:, ::-1])]
    np.testing.assert_allclose(expected[0][:, ::-1], expected[1], atol=1e-5)
    coded = functional(TokenCodec, TokenVaeConfig(3, 5, latent=4, width=16, layers=1, heads=2, order="exchangeable"))
    learned = coded.init(jax.random.key(0)) | {"std": jnp.ones((3, 5)), "scale": jnp.ones(())}
    for method, rows in (("encode", x), ("decode", x[..., :4])):
        apply = jax.jit(partial(coded.apply, method=method))
        found, back = (apply(learned, r) for r in (rows, rows[:, ::-1]))
        np.testing.assert_allclose(back[:, ::-1], found, atol=1e-5)
    by = [
        GeneratorConfig(NetConfig(features=4, classes=3), prior="none", codec=TokenVaeConfig(3, 5, order=o))
        for o in ORDERS
    ]
    assert [cfg.by_row for cfg in by] == [False, True], "a codec that knows places needs a denoiser that does"
    # Whoever is told other pictures says something else.
    assert np.abs(np.asarray(model.apply(params, x, t, support[::-1], there) - out)).max() > 1e-2


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samples_are_the_same_on_one_device_and_on_eight(sampler, generator):
    cfg, model, params, support, there = generator
    draw = drawer(model, cfg, SampleConfig(sampler, steps=5, guidance=1.5))
    key, index = jax.random.key(0), jnp.arange(8)
    one = np.asarray(draw(params, support, there, key, index))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    many = draw(params, *(jax.device_put(a, rows) for a in (support, there)), key, jax.device_put(index, rows))
    assert len(many.sharding.device_set) == 8
    np.testing.assert_allclose(np.asarray(many), one, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        draw(params, support[5:6], there[5:6], key, jnp.array([5]))[0], one[5], rtol=1e-5, atol=1e-5
    )


def test_steps_of_ddpm_have_the_variance_of_the_posterior(generator):
    cfg, model, params, support, there = generator
    params = params | {path: jnp.zeros_like(x) for path, x in params.items() if path.startswith("denoiser/final")}
    drawn = drawer(model, cfg, SampleConfig("ddpm", steps=2))(params, support, there, jax.random.key(0), jnp.arange(8))
    # The first step ends at the first time, where 1e-4 of noise is left; beta of that step is nearly 1.
    spread = np.std(np.asarray(drawn - model.apply(params, support, there, method="expected")))
    assert spread == pytest.approx(linear_schedule().beta[0] ** 0.5, rel=0.3)


def test_given_weights_are_refined(generator):
    cfg, model, params, support, there = generator
    start = jnp.asarray(np.random.default_rng(2).standard_normal((8, 3, 5)), jnp.float32)
    key, index = jax.random.key(0), jnp.arange(8)
    free = drawer(model, cfg, SampleConfig(steps=5))(params, support, there, key, index)
    near = drawer(model, cfg, SampleConfig(steps=50, strength=0.02))(params, support, there, key, index, start)
    assert np.abs(np.asarray(near - start)).mean() < 0.1 * np.abs(np.asarray(free - start)).mean()
    with pytest.raises(InputError, match="none are given"):
        drawer(model, cfg, SampleConfig(strength=0.5))(params, support, there, key, index)
    for steps in (0, 1):
        with pytest.raises(InputError, match=f"{steps} steps"):
            SampleConfig(steps=steps)


def test_diffusion_returns_the_latent_of_each_condition():
    import optax

    cfg = GeneratorConfig(
        NetConfig(features=4, classes=3), latent=5, shots=1, prior="none", denoiser=DenoiserConfig(32, 1, 2, 32)
    )
    model = functional(Generator, cfg)
    heads = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
    told = np.random.default_rng(1).standard_normal((2, 3, 1, 4)).astype(np.float32)
    params = model.init(jax.random.key(0)) | {"codec/components": jnp.eye(5), "codec/scale": jnp.ones(())}
    batch = {"tokens": np.repeat(heads, 16, 0), "support": np.repeat(told, 16, 0), "shots": np.ones(32, np.int32)}
    value, optimizer = loss(model, cfg, 0.0), optax.adam(optax.cosine_decay_schedule(5e-3, 600))

    @jax.jit
    def run(params):
        def step(carry, i):
            params, state = carry
            grads = jax.grad(lambda p: value(p, batch, jax.random.fold_in(jax.random.key(1), i), None)[0])(params)
            grads = {k: jnp.zeros_like(v) if k.startswith("codec") else v for k, v in grads.items()}
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(600))[0][0]

    there = np.ones((4, 3, 1), bool)
    drawn = drawer(model, cfg, SampleConfig(steps=50))(
        run(params), np.repeat(told, 2, 0), there, jax.random.key(2), np.arange(4)
    )
    assert np.abs(np.asarray(drawn) - np.repeat(heads, 2, 0)).max() < 0.2 < np.abs(heads[0] - heads[1]).max()


def test_guidance_leads_away_from_what_is_drawn_without_a_condition(generator):
    cfg, model, params, support, there = generator
    # what is drawn then depends on the condition by v alone
    params = params | {"prior/table": jnp.zeros_like(params["prior/table"])}

    def drawn(guidance, support):  # the first of two steps goes nearly all the way, and is linear in v
        draw = drawer(model, cfg, SampleConfig(steps=2, guidance=guidance))
        return np.asarray(draw(params, support, there, jax.random.key(0), jnp.arange(8)))

    without, told, guided = (drawn(guidance, support) for guidance in (0, 1, 3))
    assert np.abs(guided - without - 3 * (told - without)).max() < 0.1 * np.abs(told - without).max()
    assert np.array_equal(without, drawn(0, support[::-1])) and np.abs(told - without).max() > 0.5


def test_a_linear_prior_of_whole_networks_is_a_ridge_map():
    cfg = GeneratorConfig(NetConfig("mlp", 4, 3, classes=2), latent=5, shots=2, denoiser=SMALL)
    model, spec, rng = functional(Generator, cfg), cfg.tokens, np.random.default_rng(0)
    bank = Bank.of(rng.standard_normal((24, 4)).astype(np.float32), np.repeat(np.arange(6), 4), list("abcdef"))
    classes = draw_tasks(6, 30, 2, rng)
    zoo = Zoo(
        rng.standard_normal((30, spec.count)).astype(np.float32), np.zeros(30, np.float32), classes, cfg.net, spec
    )
    fitted = fit_stage1(cfg, zoo, bank)
    params = model.init(jax.random.key(0)) | fitted
    support, there = bank.draw(classes, 2, rng), np.ones((30, 2, 2), bool)
    for shots in (1, 2):
        there[:, :, shots:] = False
        told = np.c_[support[:, :, :shots].mean(2).reshape(30, -1), np.ones(30)]
        found = np.asarray(model.apply(params, support, there, method="expected"))
        np.testing.assert_allclose(found[:, spec.mask], told @ fitted["prior/table"][shots - 1], rtol=1e-5, atol=1e-5)
        assert not found[:, ~spec.mask].any()
        there[:] = True
    latents = model.apply(params, zoo.tokens(slice(None)), support, there, method="encode")
    back = model.apply(params, latents, support, there, method="decode")
    np.testing.assert_allclose(back, zoo.tokens(slice(None)), atol=1e-4)  # five latents of tokens of five


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"net": None}, "set exactly one of net"),
        ({"cut": chunks({"w": np.zeros(2)})}, "set exactly one of net"),
        ({"condition": "label", "prior": "none"}, "labels is 0: the condition label needs the number"),
        ({"condition": "label"}, "set prior to"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(given, wrong):
    with pytest.raises(InputError, match=wrong):
        GeneratorConfig(**given)


def test_a_codec_decides_the_size_of_latents():
    cfg = GeneratorConfig(prior="none", codec=TokenVaeConfig(5, 65, latent=7))
    assert (cfg.latent, cfg.latent_size, GeneratorConfig().latent_size) == (48, 7, 48)
