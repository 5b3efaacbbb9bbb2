"""Matching of neurons, and greedy search around a checkpoint."""

import numpy as np
import pytest

from benchmarks.weightgen import align, search
from heirloom.common.errors import InputError
from weightgen.zoo.nets import NetConfig, net


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(("kind", "axes"), [("mlp", ["hidden"]), ("cnn", ["first", "second", "third", "hidden"])])
def test_matching_finds_a_permutation_back(kind, axes, rng):
    model = net(NetConfig(kind, 8 if kind == "mlp" else 1))
    tree = {path: rng.standard_normal(leaf.shape) for path, leaf in model.spec.items()}
    groups = align.symmetries(model.spec, axes)
    shuffled = align.permute(tree, groups, {g.name: rng.permutation(g.size) for g in groups})
    back = align.align(tree, shuffled, groups)
    assert all(np.array_equal(back[path], tree[path]) for path in tree)
    x = rng.standard_normal((3, 8) if kind == "mlp" else (3, 28, 28, 1)).astype(np.float32)
    one, two = (model.apply({k: v.astype(np.float32) for k, v in t.items()}, x) for t in (tree, shuffled))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="only write"):
        align.symmetries(model.spec, ["class"])


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
    with pytest.raises(InputError, match="no models"):
        search.soup([])


def test_proposals_are_compared_at_one_norm(rng):
    tensor = rng.standard_normal((16, 8))
    row = search.row_proposal({"a": tensor}, latent=4)
    for propose in (search.noise_proposal(0.1), search.matched(row, 0.1)):
        step = propose("a", tensor, np.random.default_rng(1)) - tensor
        assert np.linalg.norm(step) == pytest.approx(0.1 * np.linalg.norm(tensor), rel=1e-5)
    # What is drawn lies in the span of the components: rank 4, where noise has rank 8.
    assert np.linalg.matrix_rank(row("a", tensor, rng) - tensor, tol=1e-4) == 4
