"""Baselines of a generator of weights. Heads are [..., class, feature + 1], the bias last; features [..., feature]."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from heirloom.common.errors import InputError
from heirloom.common.nn.norm import unit

Heads = np.ndarray
ArrayT = TypeVar("ArrayT", bound=np.ndarray | jax.Array)
PENALTIES = (1e2, 1e3, 1e4, 3e4, 1e5, 3e5)


def with_bias(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.ones_like(x[..., :1])], axis=-1)


def prototype(support: np.ndarray) -> Heads:
    """Build nearest-mean heads, bias minus half the squared norm. support: [task, class, picture, feature]."""
    mean = support.mean(2)
    return np.concatenate([mean, -0.5 * np.sum(mean**2, -1, keepdims=True)], axis=-1)


def discriminant(support: np.ndarray, spread: np.ndarray, shrink: float = 0.5) -> Heads:
    """Build linear-discriminant heads with the zoo's within-class covariance, shrunk to a multiple of one.

    spread: [feature, feature], that covariance.
    """
    d = len(spread)
    inverse = np.linalg.inv((1 - shrink) * spread + shrink * np.trace(spread) / d * np.eye(d))
    mean = support.mean(2)
    return np.concatenate([mean @ inverse, -0.5 * np.einsum("tcf,fg,tcg->tc", mean, inverse, mean)[..., None]], axis=-1)


def nearest_model(condition: np.ndarray, zoo_condition: np.ndarray, heads: Heads) -> Heads:
    """Pick the head of the zoo's task whose mean feature is closest in cosine.

    condition: [task, feature]; zoo_condition: [member, feature].
    """
    return heads[np.argmax(unit(condition) @ unit(zoo_condition).T, axis=1)]


def nearest_row(prototypes: np.ndarray, zoo_prototypes: np.ndarray, rows: np.ndarray) -> Heads:
    """Pick for each class the row of the zoo's most similar class (cosine).

    prototypes: [task, class, feature]; rows: [n, feature + 1].
    """
    return rows[np.argmax(unit(prototypes) @ unit(zoo_prototypes).T, axis=-1)]


@dataclass(frozen=True)
class Ridge:
    """A linear map from condition to weights, [in + 1, out]; the penalty is chosen on classes that were left out."""

    matrix: np.ndarray
    penalty: float

    @classmethod
    def fit(
        cls, condition: np.ndarray, weights: np.ndarray, groups: np.ndarray, penalties: Sequence[float] = PENALTIES
    ) -> "Ridge":
        """Fit the map. condition: [n, in]; weights: [n, out]; groups: [n].

        groups: what a row must not share with the rows it is tested on (its class). Whole networks are grouped by their
        first class alone: their other classes may be among those that were fitted.

        The last fifth of the groups chooses, then all rows are used. Rows of one class are alike: held-out rows would
        choose too little. The constant is not penalised: without a use for the condition the map gives the mean. Raises
        InputError for rows of one group alone: none could be left out.
        """
        if len(np.unique(groups)) < 2:
            one = 'to leave one out; here is one: set prior to "none"'
            raise InputError(f"a linear map needs networks of two classes or tasks, {one}")
        x, y = condition.astype(np.float64), weights.astype(np.float64)
        held = groups >= np.quantile(np.unique(groups), 0.8)

        def solve(rows: np.ndarray, penalty: float) -> np.ndarray:
            centre, mean = x[rows].mean(0), y[rows].mean(0)
            a, b = x[rows] - centre, y[rows] - mean
            slope = np.linalg.solve(a.T @ a + penalty * np.eye(x.shape[1]), a.T @ b)
            return np.concatenate([slope, (mean - centre @ slope)[None]])

        errors = [float(np.mean((with_bias(x[held]) @ solve(~held, p) - y[held]) ** 2)) for p in penalties]
        best = penalties[int(np.argmin(errors))]
        return cls(solve(np.ones(len(x), bool), best), best)

    def __call__(self, condition: np.ndarray) -> np.ndarray:
        return (with_bias(condition) @ self.matrix).astype(np.float32)


def hypernetwork(
    condition: np.ndarray, weights: np.ndarray, seed: int = 0, *, hidden: int = 256, steps: int = 1000
) -> Callable[[Any], np.ndarray]:
    """Train a network of one hidden layer, [n, in] -> [n, out], from conditions to standardised weights: L2, Adam."""
    mean, std = weights.mean(0), weights.std(0) + 1e-6
    centre, spread = condition.mean(0), condition.std(0) + 1e-6
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = ((condition.shape[1], hidden), (hidden, weights.shape[1]))
    params = [
        (jax.random.normal(key, size) / size[0] ** 0.5, jnp.zeros(size[1]))
        for key, size in zip(keys[:2], sizes, strict=True)
    ]
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))

    def apply(params: Any, x: Any) -> jax.Array:
        (up, a), (down, b) = params
        return jax.nn.relu(x @ up + a) @ down + b

    def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
        params, state = carry
        grads = jax.grad(lambda p: jnp.mean(jnp.square(apply(p, x[rows]) - y[rows])))(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    x, y = (jnp.asarray(a, jnp.float32) for a in ((condition - centre) / spread, (weights - mean) / std))
    rows = jax.random.randint(keys[2], (steps, min(128, len(x))), 0, len(x))
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, rows))((params, optimizer.init(params)))
    return lambda x: np.asarray(apply(params, jnp.asarray((x - centre) / spread, jnp.float32)) * std + mean, np.float32)


def row_condition(mean: ArrayT) -> ArrayT:
    """Build the features from which a linear map predicts a row: [..., class, f] -> [..., class, 4 f + 2].

    They are the class's mean feature, its direction, the task's mean, the offset from it, and both squared lengths,
    from which a nearest-mean bias is made. numpy or traced.
    """
    xp: Any = jnp if isinstance(mean, jax.Array) else np
    size = xp.mean(mean**2, -1, keepdims=True)
    task = xp.broadcast_to(xp.mean(mean, -2, keepdims=True), mean.shape)
    others = xp.broadcast_to(xp.mean(size, -2, keepdims=True), size.shape)
    return xp.concatenate([mean, mean / xp.sqrt(size + 1e-6), task, mean - task, size, others], -1)


def noisy(weights: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Add noise to zoo networks, of `sigma` times each weight's spread over the zoo: [n, count]."""
    return (weights + sigma * weights.std(0) * rng.standard_normal(weights.shape)).astype(np.float32)


def average(weights: np.ndarray, n: int, members: int, rng: np.random.Generator) -> np.ndarray:
    """Average `members` random networks, `n` times."""
    return np.stack([weights[rng.choice(len(weights), members, replace=False)].mean(0) for _ in range(n)])


def gaussian(weights: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `n` networks from an independent Gaussian per weight."""
    return (weights.mean(0) + weights.std(0) * rng.standard_normal((n, weights.shape[1]))).astype(np.float32)


def kde(latents: np.ndarray, n: int, rng: np.random.Generator, bandwidth: float = 0.002) -> np.ndarray:
    """Sample from a kernel density by dimension (S_KDE; S_KDE30: of the best 30 %). latents: [member, latent].

    Deviation: the released code draws every dimension from the same seed, so that all pick the same member and share
    the noise.
    """
    shape = (n, latents.shape[1])
    pick, noise = rng.integers(len(latents), size=shape), rng.standard_normal(shape)
    return (np.take_along_axis(latents, pick, axis=0) + bandwidth * noise).astype(np.float32)
