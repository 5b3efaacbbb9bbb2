"""Batch norms: the batch's statistics in training, the running ones in evaluation, and new running ones as outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from heirloom.common.nn.block import each, run, scan, stack
from heirloom.common.nn.functional import functional
from heirloom.common.nn.norm import BatchNorm


class Net(nnx.Module):
    """One norm by itself, then two in a stack."""

    def __init__(self, cfg, *, rngs):
        self.first = BatchNorm(3, eps=1e-5, rngs=rngs)
        self.blocks = stack(lambda rngs: BatchNorm(3, eps=1e-5, rngs=rngs), 2, rngs)
        self.remat = cfg

    def __call__(self, x):
        return scan(self.blocks, run(self.first, x, remat=self.remat), remat=self.remat)

    def all_at_once(self, x):
        return each(self.blocks, self.first(x))


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        path: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        for path, leaf in functional(Net, "none").spec.items()
    }


@pytest.fixture
def x():
    return np.random.default_rng(1).normal(2, 3, (4, 5, 3)).astype(np.float32)


def by_hand(params, x, train):
    """Output and new running statistics, in float64."""
    y, moved = x.astype(np.float64).reshape(-1, 3), {}
    for path, layer in (("first", ...), ("blocks", 0), ("blocks", 1)):
        scale, bias, mean, variance = (
            params[f"{path}/{name}"][layer] for name in ("scale", "bias", "mean", "variance")
        )
        if train:
            moved.setdefault(f"{path}/mean", []).append(0.9 * mean + 0.1 * y.mean(0))
            moved.setdefault(f"{path}/variance", []).append(0.9 * variance + 0.1 * y.var(0, ddof=1))
            mean, variance = y.mean(0), y.var(0)
        y = (y - mean) / np.sqrt(variance + 1e-5) * scale + bias
    return y.reshape(x.shape), {path: np.squeeze(values) for path, values in moved.items()}


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_training_uses_the_batch_and_returns_new_running_statistics(params, x, remat):
    output, statistics = jax.jit(functional(Net, remat).train)(params, x)
    expected, moved = by_hand(params, x, train=True)
    np.testing.assert_allclose(output, expected, atol=1e-4)
    assert statistics.keys() == moved.keys()
    for path, value in moved.items():
        np.testing.assert_allclose(statistics[path], value, rtol=1e-5, err_msg=path)


def test_evaluation_uses_the_running_statistics(params, x):
    np.testing.assert_allclose(functional(Net, "none").apply(params, x), by_hand(params, x, train=False)[0], atol=1e-4)


@pytest.mark.parametrize("mode", ["train", "apply"])
def test_a_running_statistic_has_no_gradient(params, x, mode):
    model = functional(Net, "none")

    def loss(params):
        output = model.train(params, x)[0] if mode == "train" else model.apply(params, x)
        return jnp.sin(output).sum()

    largest = {path: float(np.abs(gradient).max()) for path, gradient in jax.jit(jax.grad(loss))(params).items()}
    assert {largest[path] for path in largest if path.endswith(("mean", "variance"))} == {0}
    assert largest["blocks/scale"] > 0.1 and largest["blocks/bias"] > 0.1


def test_a_statistic_that_would_be_lost_is_an_error(params, x):
    with pytest.raises(ValueError, match="blocks/mean: all_at_once in training does not update this running statistic"):
        functional(Net, "none").train(params, x, method="all_at_once")


def test_a_model_without_batch_norms_has_no_statistics(x):
    class Twice(nnx.Module):
        def __init__(self, cfg, *, rngs):
            pass

        def __call__(self, x):
            return 2 * x

    output, statistics = functional(Twice, None).train({}, x)
    np.testing.assert_array_equal(output, 2 * x)
    assert statistics == {}
