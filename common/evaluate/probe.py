"""Linear probe: logistic regression on frozen features by L-BFGS, regularisation by validation (CLIP §3.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from heirloom.common.errors import InputError
from heirloom.common.evaluate.features import finite

STRENGTHS = tuple(10.0**power for power in range(-6, 5))
ITERATIONS = 1000


@dataclass(frozen=True)
class Probe:
    """Top-1 accuracy on the test examples, and the regularisation that was best in validation."""

    top1: float
    strength: float


def probe(
    features: np.ndarray,
    labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    *,
    held_back: float = 0.1,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> Probe:
    """Chooses a strength on validation examples, fits again on all training examples, and scores the test examples.

    features: [n, width] f32, labels: [n] int from 0. held_back: share of the training examples for validation.
    strengths: values of lambda in `mean cross-entropy + lambda / 2 |weights|^2`; biases are not regularised. Raises
    InputError for features that are NaN or infinite, labels that are not whole numbers from 0, and labels that occur in
    the test examples only.
    """
    finite(features, "the features of the training examples")
    finite(test_features, "the features of the test examples")
    for values in (labels, test_labels):
        if values.dtype.kind not in "iu" or values.min() < 0:
            raise InputError(f"labels must be whole numbers from 0, one of the data is {values.min()} ({values.dtype})")
    if test_labels.max() > labels.max():
        labelled = f"the training examples have 0 to {labels.max()}"
        raise InputError(f"a test example has the label {test_labels.max()}, {labelled}")
    order = np.random.default_rng(seed).permutation(len(labels))
    held = order[: max(1, round(held_back * len(labels)))]
    rest = order[len(held) :]
    classes = int(labels.max()) + 1
    scored = []
    start = np.zeros((features.shape[1] + 1) * classes)
    for strength in sorted(strengths, reverse=True):  # strongest first: each solution is a good start for the next
        start = _fit(features[rest], labels[rest], classes, strength, start)
        scored.append((_accuracy(start, features[held], labels[held], classes), strength))
    best = max(scored)[1]
    weights = _fit(features, labels, classes, best, start)
    return Probe(_accuracy(weights, test_features, test_labels, classes), best)


def _fit(features: np.ndarray, labels: np.ndarray, classes: int, strength: float, start: np.ndarray) -> np.ndarray:
    inputs, targets = jnp.asarray(features, jnp.float32), jnp.asarray(labels)

    def loss(flat: jax.Array) -> jax.Array:
        weights = flat.reshape(-1, classes)
        logits = jnp.matmul(inputs, weights[:-1], precision=jax.lax.Precision.HIGHEST) + weights[-1]
        right = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1)
        return -right.mean() + strength / 2 * jnp.square(weights[:-1]).sum()

    both = jax.jit(jax.value_and_grad(loss))

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = both(jnp.asarray(flat, jnp.float32))
        return float(value), np.asarray(gradient, np.float64)

    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS})
    return np.asarray(found.x)


def _accuracy(flat: np.ndarray, features: np.ndarray, labels: np.ndarray, classes: int) -> float:
    weights = flat.reshape(-1, classes)
    return float(np.mean((features @ weights[:-1] + weights[-1]).argmax(1) == labels))
