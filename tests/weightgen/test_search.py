"""Greedy search around a checkpoint."""

import numpy as np
import pytest

from heirloom.common.errors import InputError
from weightgen import search


def test_greedy_search_keeps_only_what_selection_likes():
    target = {"w": np.full((4, 4), 2.0), "v": np.zeros((4, 4))}
    base = {"w": np.zeros((4, 4)), "v": np.zeros((4, 4))}
    score = lambda p: -sum(float(np.abs(p[k] - target[k]).sum()) for k in p)  # noqa: E731
    found = search.greedy(
        base, ["w", "v"], lambda name, tensor, rng: tensor + rng.standard_normal(), score, candidates=8
    )
    assert found.score == score(found.params) > score(base) and found.trials == 16
    assert [step.kept for step in found.steps] == [True, False]  # v was right, every change makes it worse
    assert np.array_equal(found.params["v"], base["v"]) and len(found.accepted) == 1
    half = search.interpolate(base, found.params, 0.5)
    np.testing.assert_allclose(half["w"], found.params["w"] / 2)
    np.testing.assert_allclose(search.soup([base, target])["w"], 1.0)
    with pytest.raises(InputError, match="nothing to average: no proposal was accepted"):
        search.soup([])


def test_proposals_are_compared_at_one_norm(rng):
    tensor = rng.standard_normal((16, 8))
    row = search.row_proposal({"a": tensor}, latent=4)
    for propose in (search.noise_proposal(0.1), search.matched(row, 0.1)):
        step = propose("a", tensor, np.random.default_rng(1)) - tensor
        assert np.linalg.norm(step) == pytest.approx(0.1 * np.linalg.norm(tensor), rel=1e-5)
    # What is drawn lies in the span of the components: rank 4, where noise has rank 8.
    assert np.linalg.matrix_rank(row("a", tensor, rng) - tensor, tol=1e-4) == 4
