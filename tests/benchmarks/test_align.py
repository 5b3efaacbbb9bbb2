"""Matching of neurons."""

import numpy as np
import pytest

from benchmarks.weightgen import align
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
