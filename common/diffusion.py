"""Gaussian diffusion (Ho et al. 2020; Nichol & Dhariwal 2021): schedules, the variational bound, and samplers.

A schedule is a table of numbers in float64, and so is a sampler: DDPM, DDIM and DPM-Solver++ differ in the coefficients
of

    x' = keep x + clean x0 + before x0_previous + std noise

and one scan runs them all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import log, pi, sqrt
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Spacing = Literal["even", "integer"]
Times = Literal["fractional", "integer"]


@dataclass(frozen=True, eq=False)
class Schedule:
    """A chain of K steps. alpha_bar: [K], from nearly 1 to nearly 0. time: [K], the steps of the full chain, an input
    of the network.
    """

    alpha_bar: np.ndarray
    time: np.ndarray

    def __len__(self) -> int:
        return len(self.alpha_bar)

    @cached_property
    def previous(self) -> np.ndarray:
        """alpha_bar of the previous step of the chain, [K]; 1 for the first step."""
        return np.concatenate([[1.0], self.alpha_bar[:-1]])

    @cached_property
    def beta(self) -> np.ndarray:
        """Variance that each step adds, [K]."""
        return 1 - self.alpha_bar / self.previous

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0), [K]; 0 for the first step."""
        return self.beta * (1 - self.previous) / (1 - self.alpha_bar)

    @cached_property
    def log_variance_range(self) -> np.ndarray:
        """Logarithms of the smallest variance (posterior, its first entry replaced by the second) and the largest
        (beta), [K, 2].
        """
        smallest = self.posterior_variance.copy()
        smallest[0] = smallest[1] if len(smallest) > 1 else self.beta[0]
        return np.log(np.stack([smallest, self.beta], axis=1))

    @cached_property
    def posterior_mean(self) -> np.ndarray:
        """Coefficients of x_t and of x_0 in the mean of q(x_{t-1} | x_t, x_0), [K, 2]."""
        on_noisy = (1 - self.previous) * np.sqrt(1 - self.beta) / (1 - self.alpha_bar)
        on_clean = self.beta * np.sqrt(self.previous) / (1 - self.alpha_bar)
        return np.stack([on_noisy, on_clean], axis=1)


def linear_schedule(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """Betas rise linearly from `first` to `last` (DDPM, DiT, PixArt)."""
    return Schedule(np.cumprod(1 - np.linspace(first, last, steps, dtype=np.float64)), np.arange(steps))


def scaled_linear_schedule(steps: int = 1024, first: float = 0.0015, last: float = 0.0155) -> Schedule:
    """Square roots of the betas rise linearly (latent diffusion; the defaults are D2NWG's)."""
    return Schedule(
        np.cumprod(1 - np.linspace(sqrt(first), sqrt(last), steps, dtype=np.float64) ** 2), np.arange(steps)
    )


def respace(schedule: Schedule, steps: int, spacing: Spacing = "even") -> Schedule:
    """Shortens a chain to `steps`: "even" from the first to the last time (iDDPM), or with "integer" strides from 0
    (DDIM).

    Raises ValueError when no such chain exists.
    """
    total = len(schedule)
    if not 1 <= steps <= total:
        raise ValueError(f"{steps} steps of {total}: choose between 1 and {total}")
    if spacing == "even":
        stride = (total - 1) / (steps - 1) if steps > 1 else 1.0
        kept = [round(at) for at in accumulate([0.0] + [stride] * (steps - 1))]  # added up, which decides ties as iDDPM
    else:
        found = {len(range(0, total, s)): s for s in range(total - 1, 0, -1)}
        if steps not in found:
            near = min(found, key=lambda possible: abs(possible - steps))
            raise ValueError(f"no integer stride makes {steps} steps of {total}; the nearest number possible is {near}")
        kept = list(range(0, total, found[steps]))
    return Schedule(schedule.alpha_bar[kept], schedule.time[kept])


def add_noise(schedule: Schedule, clean: jax.Array, step: jax.Array, noise: jax.Array) -> jax.Array:
    """Returns x_t of q(x_t | x_0). clean, noise: [batch, ...]; step: [batch] int, index into the schedule."""
    signal, spread = (_at(np.sqrt(x), step, clean) for x in (schedule.alpha_bar, 1 - schedule.alpha_bar))
    return signal * clean + spread * noise


def remove_noise(schedule: Schedule, noisy: jax.Array, step: jax.Array, noise: jax.Array) -> jax.Array:
    """Returns x_0 from x_t and the noise in it: the inverse of `add_noise`."""
    signal, spread = (_at(np.sqrt(x), step, noisy) for x in (schedule.alpha_bar, 1 - schedule.alpha_bar))
    return (noisy - spread * noise) / signal


def log_variance(schedule: Schedule, ratio: jax.Array, step: jax.Array) -> jax.Array:
    """Returns the logarithm of the learned variance (iDDPM eq. 15). ratio: [batch, ...], -1 smallest, 1 largest; step:
    [batch].
    """
    low, high = (_at(schedule.log_variance_range[:, i], step, ratio) for i in (0, 1))
    share = (ratio + 1) / 2
    return share * high + (1 - share) * low


def variational_bound(
    schedule: Schedule, clean: jax.Array, noisy: jax.Array, step: jax.Array, noise: jax.Array, ratio: jax.Array
) -> jax.Array:
    """Returns the term of one step of the variational bound: [batch], bits per dimension, not clipped.

    KL(q(x_{t-1} | x_t, x_0) || p) where the step is above 0, else the negative log-likelihood of 8-bit data in [-1, 1].
    The network predicts `noise` and `ratio`; the DiT loss stops the gradient of `noise` here.
    """
    on_noisy, on_clean = (_at(schedule.posterior_mean[:, i], step, clean) for i in (0, 1))
    mean = on_noisy * noisy + on_clean * remove_noise(schedule, noisy, step, noise)
    true_mean = on_noisy * noisy + on_clean * clean
    spread = log_variance(schedule, ratio, step)
    true_spread = _at(schedule.log_variance_range[:, 0], step, clean)
    kl = 0.5 * (
        spread - true_spread - 1 + jnp.exp(true_spread - spread) + jnp.square(true_mean - mean) * jnp.exp(-spread)
    )
    terms = jnp.where(_over(step, clean) == 0, -_log_likelihood(clean, mean, 0.5 * spread), kl)
    return terms.reshape(len(clean), -1).mean(1) / log(2)


def _log_likelihood(x: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """Returns the logarithm of a Gaussian's mass in the 8-bit bin around x, with open bins at both ends."""
    scale = jnp.exp(-log_std)
    above, below = (_normal_cdf(scale * (x - mean + side / 255)) for side in (1, -1))
    inside = jnp.log(jnp.maximum(above - below, 1e-12))
    low, high = jnp.log(jnp.maximum(above, 1e-12)), jnp.log(jnp.maximum(1 - below, 1e-12))
    return jnp.where(x < -0.999, low, jnp.where(x > 0.999, high, inside))


def _normal_cdf(x: jax.Array) -> jax.Array:
    """Normal distribution function by the tanh approximation that the released losses use."""
    return 0.5 * (1 + jnp.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))


def _over(step: jax.Array, like: jax.Array) -> jax.Array:
    return step.reshape(-1, *[1] * (like.ndim - 1))


def _at(table: np.ndarray, step: jax.Array, like: jax.Array) -> jax.Array:
    """Looks up rows of a float64 table, rounded once to the dtype of `like` and shaped to multiply it."""
    return _over(jnp.asarray(table, like.dtype)[step], like)


class Prediction(NamedTuple):
    """What the network predicts from x_t: the noise, and the position of the variance between its bounds (-1 to 1;
    None: the upper).
    """

    noise: jax.Array
    ratio: jax.Array | None = None


Denoise = Callable[[jax.Array, jax.Array], Prediction]
"""`denoise(x, i)` predicts for x before step i of the sampler. i: traced int32, an index into precomputed tables."""


@dataclass(frozen=True, eq=False)
class Sampler:
    """Coefficients by step, each [K] in float64, in the order in which the steps are taken.

    time: the time that the network gets, fractional for DPM-Solver++. alpha, sigma: x = alpha x0 + sigma noise before
    the step. log_variance: [K, 2], bounds of the variance; `stochastic`: 0 where no noise is added.
    """

    time: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    keep: np.ndarray
    clean: np.ndarray
    before: np.ndarray
    log_variance: np.ndarray
    stochastic: np.ndarray

    def __len__(self) -> int:
        return len(self.time)

    def run(self, denoise: Denoise, x: jax.Array, key: jax.Array) -> jax.Array:
        """Denoises x, N(0, 1) noise of any shape, through all steps, in one compiled loop.

        key: one for all of x, or [batch], one for each row; then a row does not depend on the batch it is in.
        """

        def step(carry: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            return self.step(denoise, *carry, i, key), None

        return jax.lax.scan(step, (x, jnp.zeros_like(x)), jnp.arange(len(self)))[0][0]

    def step(
        self, denoise: Denoise, x: jax.Array, previous: jax.Array, i: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Takes step i: returns the new x, and x0 as predicted, which is `previous` of the next step (at first zeros).

        key: as in `run`; step i draws from fold_in(key, i).
        """
        names = ("alpha", "sigma", "keep", "clean", "before", "log_variance", "stochastic")
        row = {name: jnp.asarray(getattr(self, name), x.dtype)[i] for name in names}
        noise, ratio = denoise(x, i)
        clean = (x - row["sigma"] * noise) / row["alpha"]
        new = row["keep"] * x + row["clean"] * clean + row["before"] * previous
        if self.stochastic.any():
            low, high = row["log_variance"]
            spread = high if ratio is None else (ratio + 1) / 2 * (high - low) + low
            new = new + row["stochastic"] * jnp.exp(spread / 2) * _drawn(jnp.asarray(key), i, x)
        return new, clean


def _drawn(key: jax.Array, i: jax.Array, like: jax.Array) -> jax.Array:
    """Draws the noise of step i. key: one, or one for each row of `like`."""
    if key.ndim:
        return jax.vmap(lambda own, row: _drawn(own, i, row))(key, like)
    return jax.random.normal(jax.random.fold_in(key, i), like.shape, like.dtype)


def ddpm(schedule: Schedule) -> Sampler:
    """Ancestral sampling with the learned variance; the last step adds no noise."""
    mean, zero = schedule.posterior_mean, np.zeros(len(schedule))
    stochastic = np.ones(len(schedule))
    stochastic[0] = 0
    alpha, sigma = np.sqrt(schedule.alpha_bar), np.sqrt(1 - schedule.alpha_bar)
    return _backwards(
        time=schedule.time,
        alpha=alpha,
        sigma=sigma,
        keep=mean[:, 0],
        clean=mean[:, 1],
        before=zero,
        log_variance=schedule.log_variance_range,
        stochastic=stochastic,
    )


def ddim(schedule: Schedule, eta: float = 0.0) -> Sampler:
    """DDIM (Song et al. 2021): deterministic at `eta` 0, as noisy as DDPM with the posterior variance at 1."""
    alpha, sigma = np.sqrt(schedule.alpha_bar), np.sqrt(1 - schedule.alpha_bar)
    variance = eta**2 * schedule.posterior_variance
    keep = np.sqrt(1 - schedule.previous - variance) / sigma
    clean = np.sqrt(schedule.previous) - keep * alpha
    bounds = np.log(np.maximum(variance, 1e-30))[:, None].repeat(2, axis=1)
    return _backwards(
        time=schedule.time,
        alpha=alpha,
        sigma=sigma,
        keep=keep,
        clean=clean,
        before=np.zeros(len(schedule)),
        log_variance=bounds,
        stochastic=(variance > 0).astype(float),
    )


def _backwards(**columns: np.ndarray) -> Sampler:
    """Builds a sampler from columns in the order of the chain: it takes the steps in reverse."""
    return Sampler(**{name: column[::-1] for name, column in columns.items()})


def dpm_solver(schedule: Schedule, steps: int, times: Times = "fractional") -> Sampler:
    """DPM-Solver++(2M) (Lu et al. 2022), uniform in time, first and last step of order 1.

    times: "fractional" as PixArt samples: from 1 to 1/1000, log alpha piecewise linear between the steps of the full
    chain. "integer" as diffusers' DPMSolverMultistepScheduler: steps of the full chain, and a last step to no noise.
    Raises ValueError for as many steps as the chain has, of which two would be the same.
    """
    total, log_alpha_bar = len(schedule), np.log(schedule.alpha_bar)
    if times == "fractional":
        time = np.linspace(1, 1 / total, steps + 1)
        log_alpha = np.interp(time, (np.arange(total) + 1) / total, 0.5 * log_alpha_bar)
        inputs = (time[:-1] - 1 / total) * total
    else:
        if steps >= total:
            raise ValueError(f"integer times are of at most {total - 1} steps")
        inputs = np.linspace(0, total - 1, steps + 1).round()[:0:-1]
        log_alpha = np.append(0.5 * log_alpha_bar[inputs.astype(int)], 0.0)
    alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
    with np.errstate(divide="ignore"):  # infinite without noise
        half_snr = log_alpha - np.log(sigma)
    h = np.diff(half_snr)
    toward = -alpha[1:] * np.expm1(-h)
    lead = np.zeros(steps)
    lead[1:-1] = h[1:-1] / (2 * h[:-2])
    zero = np.zeros(steps)
    return Sampler(
        time=inputs,
        alpha=alpha[:-1],
        sigma=sigma[:-1],
        keep=sigma[1:] / sigma[:-1],
        clean=toward * (1 + lead),
        before=-toward * lead,
        log_variance=np.zeros((steps, 2)),
        stochastic=zero,
    )
