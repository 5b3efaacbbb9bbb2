"""Accuracies, novelty and diversity."""

import json

import numpy as np
import pytest

from weightgen.metrics import Scores, disagreement, error_overlap, head_accuracy, nearest_distance


def test_four_numbers_are_kept_apart(rng):
    x, y = rng.standard_normal((3, 40, 5)), np.broadcast_to(np.arange(40) % 4, (3, 40))
    samples = rng.standard_normal((6, 3, 4, 6))
    with pytest.raises(ValueError, match="oracle"):
        Scores.of(samples, (x, y), (x, y))
    scores = Scores.of(samples, (rng.standard_normal(x.shape), y), (x, y))
    every = head_accuracy(samples, x, y)
    np.testing.assert_allclose(scores.single, every.mean(0))
    np.testing.assert_allclose(scores.oracle, every.max(0))
    assert (scores.selected <= scores.oracle).all() and (scores.selected < scores.oracle).any()
    assert [name for name in scores.rows("g") if "oracle" in name] == ["g, best by test (oracle)"]


def test_novelty_and_diversity(rng):
    zoo = rng.standard_normal((10, 4))
    np.testing.assert_allclose(nearest_distance(zoo[3:4] + 0.1 * np.eye(4)[:1], zoo), 0.1, atol=1e-6)
    apart = np.linalg.norm(zoo[:, None] - zoo[None], axis=-1) + 1e9 * np.eye(10)
    np.testing.assert_allclose(nearest_distance(zoo, zoo, skip_self=True), apart.min(1))
    wrong = np.array([[1, 1, 0, 0]], bool)
    np.testing.assert_allclose(error_overlap(wrong, np.array([[1, 0, 0, 0], [1, 1, 1, 0]], bool)), 2 / 3)
    assert disagreement(np.array([[0, 1, 2, 3], [0, 1, 3, 2], [0, 1, 2, 3]])) == pytest.approx((0.5 + 0 + 0.5) / 3)
    json.dumps(disagreement(np.zeros((2, 3))))
