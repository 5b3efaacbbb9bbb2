import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from heirloom.common.surgery.axes import Axes, Leaf
from heirloom.common.train.optim import OptimConfig, make_optimizer

AXES = {"query/kernel": "layer embed -> head head_dim", "query/bias": "layer -> head head_dim", "out/scale": "embed"}
SHAPES = {"query/kernel": (2, 5, 2, 3), "query/bias": (2, 2, 3), "out/scale": (5,)}
SPEC = {path: Leaf(Axes.parse(AXES[path]), SHAPES[path], np.dtype("float32")) for path in AXES}
CFG = OptimConfig(
    algorithm="came", lr=0.1, warmup=0, schedule="constant", b1=0.9, b2=0.99, b3=0.999, weight_decay=0.0, clip=None
)


def by_hand(gradients, *, factored):
    """The update of one tensor after all of `gradients`, in f64, from the algorithm of the paper (Luo et al. 2023)."""
    m, r, c, v, rr, rc = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for g in gradients:
        square = g**2 + 1e-30
        if factored:
            r, c = 0.99 * r + 0.01 * square.mean(1), 0.99 * c + 0.01 * square.mean(0)
            v = np.outer(r, c) / r.mean()
        else:
            v = 0.99 * v + 0.01 * square
        u = g / np.sqrt(v)
        u = u / max(1, np.sqrt((u**2).mean()))
        m = 0.9 * m + 0.1 * u
        update = m
        if factored:
            residual = (u - m) ** 2 + 1e-16
            rr, rc = 0.999 * rr + 0.001 * residual.mean(1), 0.999 * rc + 0.001 * residual.mean(0)
            update = m / np.sqrt(np.outer(rr, rc) / rr.mean())
    return -0.1 * update


@pytest.fixture(scope="module")
def third():
    """Three gradients, and the updates of the third step."""
    optimizer, rng = make_optimizer(CFG, SPEC, 10), np.random.default_rng(0)
    gradients = [{path: rng.standard_normal(shape) for path, shape in SHAPES.items()} for _ in range(3)]
    params = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for grads in gradients:
        updates, state = update({path: jnp.asarray(g, jnp.float32) for path, g in grads.items()}, state, params)
    return gradients, updates, state


@pytest.mark.parametrize("layer", [0, 1])
def test_a_kernel_is_factored_layer_by_layer(third, layer):
    gradients, updates, _ = third
    expected = by_hand([g["query/kernel"][layer].reshape(5, 6) for g in gradients], factored=True)
    np.testing.assert_allclose(updates["query/kernel"][layer].reshape(5, 6), expected, rtol=2e-5)


def test_other_parameters_are_not_factored(third):
    gradients, updates, _ = third
    for path, place in (("query/bias", 0), ("query/bias", 1), ("out/scale", slice(None))):
        expected = by_hand([g[path][place].ravel() for g in gradients], factored=False)
        np.testing.assert_allclose(np.asarray(updates[path][place]).ravel(), expected, rtol=2e-5)


def test_a_factored_moment_holds_rows_and_columns_only(third):
    second = optax.tree.get(third[2], "second")
    assert second["query/kernel"].row.shape == (2, 5)
    assert second["query/kernel"].col.shape == (2, 6)
    assert second["query/bias"].shape == (2, 6)


def test_frozen_parameters_have_no_moments():
    optimizer = make_optimizer(
        OptimConfig(algorithm="came", warmup=0, frozen=("out/*",)), SPEC, 10
    )
    params = {path: jnp.ones(shape) for path, shape in SHAPES.items()}
    state = optimizer.init(params)
    assert set(optax.tree.get(state, "second")) == {"query/kernel", "query/bias"}
    updates, _ = optimizer.update(params, state, params)
    assert not updates["out/scale"].any()
    assert updates["query/bias"].all()
