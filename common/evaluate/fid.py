"""Scores of generated pictures from their features: FID, Inception score, precision and recall (ADM suite), and KID."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg, special

RUN = 5000  # rows of a split of the Inception score: 50,000 rows make ten
NEIGHBOURS = 3  # k of the k-th neighbour, for precision and recall
BLOCK = 1024  # rows of pairwise distances at a time: 200 MB against 50,000 columns


@dataclass(frozen=True)
class Gaussian:
    """Mean [dim] and covariance [dim, dim] of a set of features, f64."""

    mean: np.ndarray
    covariance: np.ndarray


class Statistics:
    """Accumulates mean and covariance (ddof 1) in f64 of rows in batches of any size."""

    def __init__(self, dim: int):
        self.count = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))

    def add(self, rows: np.ndarray) -> None:
        """Adds rows [batch, dim]: moments around the batch's mean, then shifted, without cancellation (Chan 1979)."""
        if not len(rows):
            return
        rows = np.asarray(rows, np.float64)
        total = self.count + len(rows)
        mean = rows.mean(0)
        shift, centred = mean - self.mean, rows - mean
        self.scatter += centred.T @ centred + np.outer(shift, shift) * (self.count * len(rows) / total)
        self.mean += shift * (len(rows) / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Returns mean and covariance. Raises ValueError for fewer than two rows, which have no covariance."""
        if self.count < 2:
            raise ValueError(f"{self.count} rows have no covariance")
        return Gaussian(self.mean.copy(), self.scatter / (self.count - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Computes |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)), the squared 2-Wasserstein distance of two Gaussians.

    Adds 1e-6 to both diagonals only where the root of a singular product is not finite. Raises ValueError when the root
    has imaginary parts of more than 1e-3 on its diagonal: then the matrices are not covariances.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", linalg.LinAlgWarning)  # singular matrices: handled in the next lines
        root = linalg.sqrtm(a.covariance @ b.covariance)
        if not np.isfinite(root).all():
            ridge = 1e-6 * np.eye(len(a.mean))
            root = linalg.sqrtm((a.covariance + ridge) @ (b.covariance + ridge))
    imaginary = np.abs(np.diagonal(root).imag).max()
    if not imaginary <= 1e-3:
        raise ValueError(f"the root of the covariances has imaginary parts up to {imaginary:.1e}")
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root).real)


def inception_score(logits: np.ndarray, run: int = RUN) -> float:
    """Computes exp of the mean KL divergence of p(class | picture) from p(class), over splits of `run` rows (ADM).

    logits: [pictures, class], in random order. A shorter last split has the same weight as the others; fewer than `run`
    rows are one split. Raises ValueError for no rows.
    """
    if not len(logits):
        raise ValueError("no rows have no score")
    scores = []
    for start in range(0, len(logits), run):
        part = special.log_softmax(np.asarray(logits[start : start + run], np.float64), 1)
        marginal = special.logsumexp(part, 0) - np.log(len(part))
        scores.append(np.exp((np.exp(part) * (part - marginal)).sum(1).mean()))
    return float(np.mean(scores))


@dataclass(frozen=True)
class PrecisionRecall:
    """Share of samples on the manifold of the reference, and share of the reference on the manifold of the samples."""

    precision: float
    recall: float


def precision_recall(reference: np.ndarray, samples: np.ndarray, k: int = NEIGHBOURS) -> PrecisionRecall:
    """Computes precision and recall; a manifold is the union of balls to the k-th neighbours (Kynkäänniemi 2019).

    reference: [n, dim], samples: [m, dim]. Raises ValueError for a set of k rows or fewer. Deviation: distances are
    f32, where the ADM suite tries f16 first.
    """
    if min(len(reference), len(samples)) <= k:
        given = f"{len(reference)} reference rows and {len(samples)} samples"
        raise ValueError(f"{given}: a {k}-th neighbour needs more than {k} of both")
    sets = [jnp.asarray(rows, jnp.float32) for rows in (reference, samples)]
    real, fake = ((rows, jnp.concatenate([_radii(block, rows, k) for block in _blocks(rows)])) for rows in sets)
    precision, recall = (
        np.concatenate([_covered(block, *manifold) for block in _blocks(rows)])
        for rows, manifold in ((sets[1], real), (sets[0], fake))
    )
    return PrecisionRecall(float(precision.mean()), float(recall.mean()))


def _blocks(rows: jax.Array) -> Iterator[jax.Array]:
    return (rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK))


def _distances(rows: jax.Array, centres: jax.Array) -> jax.Array:
    products = jnp.matmul(rows, centres.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.square(rows).sum(1)[:, None] + jnp.square(centres).sum(1)
    return jnp.maximum(squares - 2 * products, 0)


@partial(jax.jit, static_argnames="k")
def _radii(rows: jax.Array, centres: jax.Array, k: int) -> jax.Array:
    """Returns the squared distance of each row to its k-th neighbour among the centres, which include the row."""
    return -jax.lax.top_k(-_distances(rows, centres), k + 1)[0][:, k]


@jax.jit
def _covered(rows: jax.Array, centres: jax.Array, radii: jax.Array) -> jax.Array:
    return (_distances(rows, centres) <= radii).any(1)


@dataclass(frozen=True)
class Kid:
    """Mean and standard deviation of KID over the subsets."""

    mean: float
    std: float


def kid(reference: np.ndarray, samples: np.ndarray, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> Kid:
    """Computes the unbiased squared MMD with the kernel (x.y / dim + 1)^3 (Bińkowski et al. 2018), in f64.

    reference: [n, dim], samples: [m, dim]. Each subset draws `size` rows of both without replacement, or as many as the
    smaller set has. Raises ValueError for a set of one row.
    """
    size = min(size, len(reference), len(samples))
    if size < 2:
        raise ValueError("a set of one row has no pairs")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        picked = (rows[rng.choice(len(rows), size, replace=False)] for rows in (reference, samples))
        x, y = (np.asarray(rows, np.float64) for rows in picked)
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        values.append(within - 2 * xy.mean())
    return Kid(float(np.mean(values)), float(np.std(values)))
