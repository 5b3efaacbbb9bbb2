"""Scores against closed forms, brute force, and other formulas for the same number."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heirloom.common.evaluate import fid
from heirloom.common.evaluate.fid import Gaussian, Statistics, frechet_distance, inception_score, kid, precision_recall


def spd(rng, dim, rank):
    root = rng.standard_normal((dim, rank))
    return root @ root.T / rank


@given(st.lists(st.integers(0, 7), min_size=1, max_size=9), st.integers(0, 99))
def test_statistics_are_those_of_all_rows_however_they_are_cut(sizes, seed):
    rows = 1e4 + np.random.default_rng(seed).standard_normal((sum(sizes) + 2, 3)).astype(np.float32)
    seen = Statistics(3)
    for part in np.split(rows, np.cumsum(sizes)):
        seen.add(part)
    found = seen.gaussian()
    assert seen.count == len(rows)
    np.testing.assert_allclose(found.mean, rows.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)


def test_one_row_has_no_covariance():
    seen = Statistics(2)
    seen.add(np.ones((1, 2)))
    with pytest.raises(ValueError, match="1 rows"):
        seen.gaussian()


def test_distance_of_gaussians_with_the_same_axes():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((9, 9)))[0]
    deviation, mean = rng.uniform(0.1, 2, (2, 9)), rng.standard_normal((2, 9))
    a, b = (Gaussian(m, axes @ np.diag(s**2) @ axes.T) for m, s in zip(mean, deviation, strict=True))
    want = np.square(mean[0] - mean[1]).sum() + np.square(deviation[0] - deviation[1]).sum()
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("rank", [30, 5])  # 5: fewer pictures than features, where the product is singular
def test_distance_by_eigenvalues(rank):
    rng = np.random.default_rng(rank)
    a, b = (Gaussian(rng.standard_normal(20), spd(rng, 20, rank)) for _ in range(2))
    values, vectors = np.linalg.eigh(a.covariance)
    half = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    root = np.sqrt(np.maximum(np.linalg.eigvalsh(half @ b.covariance @ half), 0)).sum()
    want = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-6)


def test_a_singular_product_without_a_finite_root_gets_a_ridge():
    # Not covariances, but what rounding can leave of them: the product is nilpotent and has no root.
    a, b = Gaussian(np.zeros(2), np.array([[0.0, 1.0], [0.0, 0.0]])), Gaussian(np.zeros(2), np.eye(2))
    assert 0 > frechet_distance(a, b) - 2 > -0.1


def test_no_covariance_is_refused():
    with pytest.raises(ValueError, match="imaginary"):
        frechet_distance(Gaussian(np.zeros(2), np.diag([1.0, -1.0])), Gaussian(np.zeros(2), np.eye(2)))


def test_inception_score_of_known_classes():
    sure = 100 * np.eye(7)[np.arange(70) % 7]
    assert inception_score(sure) == pytest.approx(7)
    assert inception_score(np.ones((70, 7))) == pytest.approx(1)
    assert inception_score(np.sort(sure, axis=0)[:, :1] * np.ones(7)) == pytest.approx(1)
    # Two kinds of pictures, 0.9 and 0.1 either way: the marginal is even.
    unsure = np.log([[0.9, 0.1], [0.1, 0.9]])[np.arange(40) % 2]
    assert inception_score(unsure) == pytest.approx(np.exp(0.9 * np.log(1.8) + 0.1 * np.log(0.2)))


def test_inception_score_is_the_mean_over_runs_of_consecutive_rows():
    logits = np.repeat(100 * np.eye(10), 4, axis=0)  # each run of four sees one class alone
    assert inception_score(logits, run=4) == pytest.approx(1)
    assert inception_score(logits) == pytest.approx(10)  # fewer than 5,000 rows are one run
    # Two runs: of six rows, which see two classes as 4 to 2, and of two rows, which see one.
    sizes = np.log(3) - 2 / 3 * np.log(2)
    assert inception_score(logits[:8], run=6) == pytest.approx((np.exp(sizes) + 1) / 2)
    with pytest.raises(ValueError, match="no rows"):
        inception_score(np.zeros((0, 3)))


@pytest.mark.parametrize(("rows", "runs"), [(50_000, 10), (10_000, 2), (7000, 2), (5000, 1), (999, 1)])
def test_runs_are_of_5000_rows(rows, runs):
    logits = np.random.default_rng(0).standard_normal((rows, 5)) * 2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    parts = [p[5000 * i : 5000 * (i + 1)] for i in range(runs)]
    want = np.mean([np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in parts])
    assert sum(map(len, parts)) == rows and inception_score(logits) == pytest.approx(want, rel=1e-9)


def test_manifolds_by_hand():
    line = np.arange(5.0)[:, None]  # spaced by 1: the third neighbour of 0, 1, 2, 3, 4 is 3, 2, 2, 2, 3 away
    far = np.array([[7.0], [7.1], [7.2], [7.3]])  # 7 is on the edge of 4's ball, the rest outside; their own reach 0.3
    found = precision_recall(line, far)
    assert (found.precision, found.recall) == (0.25, 0.0)
    found = precision_recall(far, line)
    assert (found.precision, found.recall) == (0.0, 0.25)


def test_manifolds_by_brute_force(monkeypatch):
    monkeypatch.setattr(fid, "BLOCK", 7)  # several blocks, the last of them short
    rng = np.random.default_rng(0)
    reference, samples = rng.standard_normal((40, 5)), 0.8 * rng.standard_normal((31, 5)) + 0.4

    def inside(points, centres):
        radii = [sorted(np.linalg.norm(c - centres, axis=1))[3] for c in centres]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points])

    found = precision_recall(reference, samples)
    assert found.precision == pytest.approx(inside(samples, reference))
    assert found.recall == pytest.approx(inside(reference, samples))
    assert 0.2 < found.recall < found.precision < 1


def test_manifolds_need_neighbours():
    with pytest.raises(ValueError, match="3 samples"):
        precision_recall(np.zeros((9, 2)), np.zeros((3, 2)))


def test_kid_by_its_formula():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((6, 4)), rng.standard_normal((6, 4)) + 0.5
    pairs = [(i, j) for i in range(6) for j in range(6)]

    def kernel(a, b):
        return (a @ b / 4 + 1) ** 3

    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j) / 30
    want = within - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / 36
    found = kid(x, y, subsets=3)
    # every subset is the whole set
    assert found.mean == pytest.approx(want) and found.std == pytest.approx(0, abs=1e-12)


def test_kid_of_the_same_distribution_is_zero_on_average():
    rng = np.random.default_rng(0)
    draws = [kid(*rng.standard_normal((2, 50, 8)), subsets=1).mean for _ in range(200)]
    error = np.std(draws) / 200**0.5
    assert abs(np.mean(draws)) < 2 * error
    # With the diagonals counted in, as the biased estimate does, the mean would be ten errors up.
    assert 10 * error < 2 * (2**3 - 1) / 50


def test_kid_draws_what_its_seed_says():
    x, y = np.random.default_rng(0).standard_normal((2, 50, 4))
    first, again, other = (kid(x, y, subsets=4, size=20, seed=seed) for seed in (0, 0, 1))
    assert first == again != other and first.std > 0
    with pytest.raises(ValueError, match="one row"):
        kid(x[:1], y)
