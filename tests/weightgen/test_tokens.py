"""Weights to tokens and back: exact, for any tree."""

import ml_dtypes
import numpy as np
import pytest

from heirloom.common.errors import InputError
from weightgen.tokens import chunks, neurons
from weightgen.zoo.nets import NetConfig, net


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "conv": (rng.standard_normal((3, 4)).astype(np.float32), {"bias": rng.standard_normal(5).astype(np.float16)}),
        "double": [rng.standard_normal((2, 2, 2)), rng.standard_normal(())],
        "half": {"kernel": rng.standard_normal((2, 3)).astype(ml_dtypes.bfloat16)},
        "norm": {"running_mean": rng.standard_normal(5).astype(np.float32), "num_batches_tracked": np.int64(7)},
    }


def leaves(t):
    import jax

    return jax.tree.leaves(t)


@pytest.mark.parametrize("length", [None, 1, 4, 7, 100])
def test_the_way_back_is_exact(length):
    before, other = tree(0), tree(1)
    spec = chunks(before, length)
    tokens = spec.flatten(before)
    tokens[~spec.mask] = np.nan  # padding must not leak
    after = spec.unflatten(tokens, other)
    assert spec.count == spec.mask.sum() == 12 + 5 + 8 + 1 + 6
    for kept, a, b, c in zip(
        ("conv", "conv", "double", "double", "half", "", ""), *map(leaves, (before, after, other)), strict=True
    ):
        assert b.dtype == a.dtype and b.tobytes() == (a if kept else c).tobytes()  # statistics stay the template's
    assert isinstance(after["conv"], tuple) and isinstance(after["double"], list)


def test_selection_by_regex_and_its_mistakes():
    assert [p.path for p in chunks(tree(), select="bias|half").pieces] == ["conv/1/bias", "half/kernel"]
    with pytest.raises(InputError, match="no floating tensor matches 'nothing'"):
        chunks(tree(), select="nothing")
    with pytest.raises(InputError, match="int64"):
        chunks({"seen": np.int64(7), "w": np.ones(2)}, select="seen")
    with pytest.raises(InputError, match="filter is complex64, and only real numbers can be generated"):
        chunks({"filter": np.ones(2, np.complex64), "w": np.ones(2)})


def test_layer_wise_rows_do_not_mix_tensors():
    spec = chunks(tree(), 5)
    assert [(p.path, p.first, p.rows) for p in spec.pieces][:2] == [("conv/0", 0, 3), ("conv/1/bias", 3, 1)]
    assert spec.tensor[2].tolist() == [0, 0, -1, -1, -1] and (spec.pieces[0].fan_in, spec.pieces[0].fan_out) == (4, 3)


def test_a_neuron_is_what_it_reads_and_its_bias():
    cfg = NetConfig("mlp", features=3, hidden=4, classes=2)
    model = net(cfg)
    spec = neurons(model.spec)
    params = {
        path: np.random.default_rng(i).standard_normal(leaf.shape).astype(np.float32)
        for i, (path, leaf) in enumerate(model.spec.items())
    }
    tokens = spec.flatten(params)
    assert tokens.shape == (6, 5) and spec.count == 4 * 4 + 2 * 5
    np.testing.assert_array_equal(tokens[3, :4], [*params["up/kernel"][:, 1], params["up/bias"][1]])
    np.testing.assert_array_equal(tokens[1], [*params["out/kernel"][:, 1], params["out/bias"][1]])
    assert not spec.mask[2, 4] and spec.mask[0].all()
    back = spec.unflatten(tokens, params)
    assert all(np.array_equal(back[path], params[path]) for path in params)


@pytest.mark.parametrize(
    ("kind", "features", "count"), [("cnn", 1, 2464), ("cnn", 3, 2864), ("mlp", 64, 1125), ("head", 64, 325)]
)
def test_networks_of_published_zoos(kind, features, count):
    cfg = NetConfig(kind, features, classes=10 if kind == "cnn" else 5)
    assert neurons(net(cfg).spec).count == count
