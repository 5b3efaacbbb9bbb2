"""Schedules, the bound and the samplers against float64 and against what is known in closed form."""

from functools import partial
from math import log, pi, sqrt

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heirloom.common import diffusion
from heirloom.common.diffusion import Prediction

FULL = diffusion.linear_schedule()


def test_the_schedule_is_the_published_one():
    assert FULL.alpha_bar[0] == pytest.approx(0.9999, abs=1e-12)
    assert FULL.alpha_bar[-1] == pytest.approx(4.035830e-5, rel=1e-6)
    np.testing.assert_allclose(FULL.beta[[0, -1]], [1e-4, 0.02], rtol=1e-9)
    assert FULL.posterior_variance[0] == 0
    np.testing.assert_allclose(FULL.log_variance_range[0, 0], log(FULL.posterior_variance[1]))


def test_respacing_rounds_as_the_released_code_does():
    times = diffusion.respace(FULL, 250).time.tolist()
    assert times[:8] == [0, 4, 8, 12, 16, 20, 24, 28] and times[-4:] == [987, 991, 995, 999]
    assert len(set(times)) == 250
    assert diffusion.respace(FULL, 50, "integer").time.tolist() == list(range(0, 1000, 20))
    short = diffusion.respace(FULL, 250)
    assert short.beta[3] == pytest.approx(1 - FULL.alpha_bar[12] / FULL.alpha_bar[8])
    with pytest.raises(ValueError, match="no integer stride makes 999"):
        diffusion.respace(FULL, 999, "integer")
    with pytest.raises(ValueError, match="between 1 and 1000"):
        diffusion.respace(FULL, 1001)


@pytest.mark.parametrize("total", [1000, 97])
def test_every_respacing_is_that_of_iddpm(total):
    """Ties are decided by the rounding errors of its sum (improved-diffusion, respace.py, space_timesteps)."""
    chain = diffusion.linear_schedule(total)
    for count in range(1, total + 1):
        stride, at, expected = 1.0 if count <= 1 else (total - 1) / (count - 1), 0.0, []
        for _ in range(count):
            expected.append(round(at))
            at += stride
        assert diffusion.respace(chain, count).time.tolist() == expected


def test_noise_comes_out_as_it_went_in():
    rng = np.random.default_rng(0)
    clean, noise = (jnp.asarray(rng.standard_normal((4, 8, 8, 3)), jnp.float32) for _ in range(2))
    step = jnp.array([0, 10, 500, 700])
    noisy = diffusion.add_noise(FULL, clean, step, noise)
    mixed = sqrt(FULL.alpha_bar[500]) * clean[2] + sqrt(1 - FULL.alpha_bar[500]) * noise[2]
    np.testing.assert_allclose(noisy[2], mixed, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(diffusion.remove_noise(FULL, noisy, step, noise), clean, atol=1e-4)


def bound64(clean, noisy, t, noise, ratio):
    """The definition, one step, plain float64."""
    beta, bar = FULL.beta, FULL.alpha_bar
    before = bar[t - 1] if t else 1.0
    low = log(beta[max(t, 1)] * (1 - bar[max(t, 1) - 1]) / (1 - bar[max(t, 1)]))
    spread = (ratio + 1) / 2 * log(beta[t]) + (1 - ratio) / 2 * low

    def mean(x0):
        return beta[t] * sqrt(before) / (1 - bar[t]) * x0 + (1 - before) * sqrt(1 - beta[t]) / (1 - bar[t]) * noisy

    predicted = mean((noisy - sqrt(1 - bar[t]) * noise) / sqrt(bar[t]))
    if t:
        return np.mean(
            0.5 * (spread - low - 1 + np.exp(low - spread) + (mean(clean) - predicted) ** 2 * np.exp(-spread))
        ) / log(2)

    def cdf(x):
        return 0.5 * (1 + np.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))

    above, below = (cdf((clean - predicted + side / 255) * np.exp(-spread / 2)) for side in (1, -1))
    mass = np.where(clean < -0.999, above, np.where(clean > 0.999, 1 - below, above - below))
    return np.mean(-np.log(np.maximum(mass, 1e-12))) / log(2)


@pytest.mark.parametrize("t", [0, 1, 37, 500, 999])
def test_the_bound_agrees_with_float64(t):
    rng = np.random.default_rng(t)
    clean = np.round(rng.uniform(-1, 1, (2, 4, 4, 3)) * 127.5) / 127.5
    clean[0, 0], clean[0, 1] = -1, 1  # the open bins
    noise, predicted, ratio = (
        rng.standard_normal(clean.shape),
        rng.standard_normal(clean.shape),
        rng.uniform(-1, 1, clean.shape),
    )
    predicted = noise + 0.1 * predicted
    noisy = sqrt(FULL.alpha_bar[t]) * clean + sqrt(1 - FULL.alpha_bar[t]) * noise
    f32 = [jnp.asarray(x, jnp.float32) for x in (clean, noisy, predicted, ratio)]
    ours = diffusion.variational_bound(FULL, f32[0], f32[1], jnp.full(2, t), f32[2], f32[3])
    expected = [bound64(clean[i], noisy[i], t, predicted[i], ratio[i]) for i in range(2)]
    np.testing.assert_allclose(ours, expected, rtol=2e-3 if t == 0 else 1e-4)  # at 0 a difference of two cdfs, in f32


def gaussian(sampler, mean=0.7, std=0.5):
    """The exact denoiser of data that is N(mean, std^2)."""

    def denoise(x, i):
        alpha, sigma = jnp.asarray(sampler.alpha, x.dtype)[i], jnp.asarray(sampler.sigma, x.dtype)[i]
        return Prediction(sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2), jnp.full_like(x, -1.0))

    return denoise


@pytest.mark.parametrize(
    "make", [diffusion.ddpm, diffusion.ddim, partial(diffusion.ddim, eta=1.0)], ids=["ddpm", "ddim", "ddim, eta 1"]
)
def test_samplers_reach_the_distribution_of_the_data(make):
    sampler = make(diffusion.respace(FULL, 250))
    x = jax.jit(lambda x, key: sampler.run(gaussian(sampler), x, key))(
        jax.random.normal(jax.random.key(0), (20000,)), jax.random.key(1)
    )
    assert float(x.mean()) == pytest.approx(0.7, abs=0.015)
    assert float(x.std()) == pytest.approx(0.5, abs=0.02)


def test_ddpm_and_ddim_at_eta_one_are_the_same_chain():
    chain = diffusion.respace(FULL, 20)
    one, two = diffusion.ddpm(chain), diffusion.ddim(chain, eta=1.0)
    np.testing.assert_allclose(one.keep, two.keep, atol=1e-9)
    np.testing.assert_allclose(one.clean, two.clean, atol=1e-9)
    assert one.stochastic.tolist() == two.stochastic.tolist() == [1.0] * 19 + [0.0]
    assert one.time.tolist() == chain.time.tolist()[::-1]


def test_the_learned_ratio_chooses_the_variance():
    sampler = diffusion.ddpm(diffusion.Schedule(np.array([0.9, 0.5]), np.array([0, 1])))
    start, key = jnp.zeros(100_000), jax.random.key(0)

    def spread(ratio):
        # one step with noise, then x = clean: predicting no noise leaves a known multiple of that step's noise
        x = sampler.run(lambda x, i: Prediction(jnp.zeros_like(x), jnp.full_like(x, ratio)), start, key)
        return float(x.std()) * sampler.alpha[1]

    low, high = np.exp(sampler.log_variance[0] / 2)
    assert spread(-1.0) == pytest.approx(low, rel=0.01) and spread(1.0) == pytest.approx(high, rel=0.01)
    assert spread(0.0) == pytest.approx(sqrt(low * high), rel=0.01)


def test_dpm_solver_times_and_orders():
    sampler = diffusion.dpm_solver(FULL, 20)
    assert sampler.time[0] == pytest.approx(999) and sampler.time[-1] == pytest.approx(49.95)
    assert sampler.before[0] == sampler.before[-1] == 0 and (sampler.before[1:-1] != 0).all()
    half_snr = np.log(sampler.alpha / sampler.sigma)
    assert half_snr[0] == pytest.approx(-5.0588, abs=1e-4)


def test_dpm_solver_is_of_second_order():
    """On a grid uniform in half the log-SNR, where the constant of the error does not change its sign."""

    def error(steps):
        half_snr = np.linspace(-3, 3, steps + 1)
        log_alpha = -0.5 * np.log1p(np.exp(-2 * half_snr))
        # a schedule whose chain is this very grid: the solver's own uniform times then fall on it
        chain = diffusion.Schedule(np.exp(2 * log_alpha[::-1]), np.arange(steps + 1))
        sampler = diffusion.dpm_solver(chain, steps)
        alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
        x = np.full(1, 1.3) * np.sqrt(alpha[0] ** 2 * 0.25 + sigma[0] ** 2) + alpha[0] * 0.7
        exact = 1.3 * np.sqrt(alpha[-1] ** 2 * 0.25 + sigma[-1] ** 2) + alpha[-1] * 0.7
        with jax.enable_x64(True):
            out = sampler.run(gaussian(sampler), jnp.asarray(x, jnp.float64), jax.random.key(0))
        return abs(float(out[0]) - exact)

    ratios = [error(n) / error(2 * n) for n in (20, 40, 80)]
    assert all(3.4 < ratio < 4.6 for ratio in ratios), ratios


def test_integer_times_are_those_of_diffusers():
    """Values of DPMSolverMultistepScheduler of diffusers 0.42 with 5 steps: times, and sigma / alpha before each
    step.
    """
    sampler = diffusion.dpm_solver(FULL, 5, "integer")
    np.testing.assert_array_equal(sampler.time, [999, 799, 599, 400, 200])
    expected = [157.4073, 25.5285, 6.1352, 2.0411, 0.7236]
    np.testing.assert_allclose(sampler.sigma / sampler.alpha, expected, rtol=1e-4)
    assert sampler.keep[-1] == 0 and sampler.clean[-1] == 1 and sampler.before[-1] == 0  # the last step returns x0


def test_a_loop_over_single_steps_is_the_scan():
    sampler, x = diffusion.dpm_solver(FULL, 6), jax.random.normal(jax.random.key(1), (3, 4))
    key = jax.random.split(jax.random.key(0), 3)
    by_scan = sampler.run(gaussian(sampler), x, key)
    previous = jnp.zeros_like(x)
    for i in range(6):
        x, previous = sampler.step(gaussian(sampler), x, previous, i, key)
    np.testing.assert_allclose(x, by_scan, rtol=1e-5, atol=1e-6)
