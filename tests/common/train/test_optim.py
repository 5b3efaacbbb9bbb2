import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from heirloom.common.errors import InputError
from heirloom.common.surgery.axes import Axes, Leaf
from heirloom.common.train.optim import OptimConfig, decayed, learning_rate, make_optimizer


@pytest.mark.parametrize(
    "step, expected",
    [(0, 5.0e-8), (999, 5.0e-5), (1999, 1.0e-4), (2000, 1.0e-4), (147_484, 5.0e-5), (292_967, 2.914401e-15)],
)
def test_learning_rate_is_tinyclips(step, expected):
    rate = jax.jit(learning_rate(OptimConfig(lr=1e-4, warmup=2000), 292_968))
    np.testing.assert_allclose(rate(jnp.int32(step)), expected, rtol=2e-5)


def test_learning_rate_ends_at_zero_and_stays_there():
    rate = learning_rate(OptimConfig(warmup=10), 100)
    assert [float(rate(step)) for step in (100, 150)] == [0.0, 0.0]


def test_constant_schedule_without_warmup():
    rate = learning_rate(OptimConfig(lr=3e-4, warmup=0, schedule="constant"), 100)
    np.testing.assert_allclose([rate(0), rate(99)], 3e-4, rtol=1e-6)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(InputError, match="a warm-up of 2000 steps does not fit in 100 steps"):
        learning_rate(OptimConfig(), 100)


def roles(*paths):
    return {path: Leaf(Axes.parse("embed"), (4,), np.dtype("float32")) for path in paths}


def test_decay_goes_by_role():
    spared = ["image/norm/scale", "image/blocks/attn/query/bias", "image/cls", "logit_scale"]
    shrunk = [
        "image/blocks/attn/query/kernel",
        "text/table",
        "image/position",
        "image/cls_position",
        "image/projection/kernel",
    ]
    found = decayed(OptimConfig(), roles(*spared, *shrunk))
    assert [path for path, decays in found.items() if decays] == shrunk
    assert [path for path, decays in found.items() if not decays] == spared


def test_patterns_overrule_roles():
    found = decayed(
        OptimConfig(no_decay=("**/position",), decay=("**/gain", "**/position")), roles("image/position", "image/gain")
    )
    assert found == {"image/position": False, "image/gain": True}


def test_an_unknown_role_is_an_error_that_names_the_nearest():
    with pytest.raises(
        InputError, match=r"image/kernle: .* did you mean 'kernel'\?; name it in optim.decay or optim.no_decay"
    ):
        make_optimizer(OptimConfig(warmup=0), roles("image/kernle"), 10)


@pytest.mark.parametrize("field", ["decay", "no_decay", "frozen"])
def test_a_pattern_without_effect_is_an_error(field):
    with pytest.raises(InputError, match=r"pattern 'imgae/\*\*' matches no parameter"):
        make_optimizer(OptimConfig(warmup=0, **{field: ("imgae/**",)}), roles("image/kernel"), 10)


def updates(cfg, params, grads):
    optimizer = make_optimizer(
        cfg, {path: Leaf(Axes.parse("embed"), x.shape, x.dtype) for path, x in params.items()}, 10
    )
    return optimizer.update(grads, optimizer.init(params), params)


def test_first_step_by_hand():
    # after bias correction the first Adam update is g / (|g| + eps); the kernel shrinks by lr * decay * w besides
    params = {"a/kernel": jnp.array([2.0, -4.0]), "a/bias": jnp.array([2.0])}
    grads = {"a/kernel": jnp.array([0.3, -0.1]), "a/bias": jnp.array([-0.5])}
    found, _ = updates(OptimConfig(lr=0.1, warmup=0, schedule="constant", weight_decay=0.2, clip=None), params, grads)
    np.testing.assert_allclose(found["a/kernel"], [-0.1 - 0.04, 0.1 + 0.08], rtol=2e-5)
    np.testing.assert_allclose(found["a/bias"], [0.1], rtol=2e-5)


def test_clip_is_of_all_trained_parameters_together():
    # (3, 4) has norm 5, clipped to 1: moments hold 0.1 x (0.6, 0.8); a frozen gradient of 100 does not count
    params = {"a/kernel": jnp.array([1.0]), "a/bias": jnp.array([1.0]), "b/kernel": jnp.array([1.0])}
    grads = {"a/kernel": jnp.array([3.0]), "a/bias": jnp.array([4.0]), "b/kernel": jnp.array([100.0])}
    found, state = updates(OptimConfig(warmup=0, clip=1.0, frozen=("b/**",)), params, grads)
    mu = optax.tree.get(state, "mu")
    np.testing.assert_allclose([mu["a/kernel"][0], mu["a/bias"][0]], [0.06, 0.08], rtol=1e-5)
    assert found["b/kernel"] == 0.0
    assert jax.tree.leaves(mu["b/kernel"]) == []  # a frozen parameter has no moments


def test_moments_are_float32():
    params = {"a/kernel": jnp.ones(3)}
    _, state = updates(OptimConfig(warmup=0), params, params)
    assert {optax.tree.get(state, name)["a/kernel"].dtype for name in ("mu", "nu")} == {jnp.dtype("float32")}


def test_muon_sees_each_layers_matrix_whatever_its_dimensions():
    axes = {
        "query/kernel": "layer embed -> head head_dim",
        "query/bias": "layer -> head head_dim",
        "filter/kernel": "row col embed",
    }
    shapes = {"query/kernel": (3, 8, 2, 3), "query/bias": (3, 2, 3), "filter/kernel": (5, 5, 8)}
    spec = {path: Leaf(Axes.parse(axes[path]), shapes[path], np.dtype("float32")) for path in axes}
    constant: dict = dict(lr=0.1, warmup=0, schedule="constant", weight_decay=0.0, clip=None)
    cfg = OptimConfig(algorithm="muon", eps=0.01, **constant)
    optimizer = make_optimizer(cfg, spec, 10)
    grads = {path: jax.random.normal(jax.random.key(i), shape) for i, (path, shape) in enumerate(shapes.items())}
    updates, _ = jax.jit(lambda grads: optimizer.update(grads, optimizer.init(grads), grads))(grads)
    # A layer's update is a multiple of U V^T of its gradient, 8 x 6; its size that of Adam's: RMS 0.2 times the rate.
    for update, grad in zip(
        updates["query/kernel"].reshape(3, 8, 6), grads["query/kernel"].reshape(3, 8, 6), strict=True
    ):
        u, _, v = np.linalg.svd(grad, full_matrices=False)
        singular = np.diag(u.T @ update @ v.T) / (-0.1 * 0.2 * 8**0.5)
        np.testing.assert_allclose(singular, 1, atol=0.4)  # five Newton-Schulz steps leave them between 0.7 and 1.2
    rest = {path: grads[path] for path in ("query/bias", "filter/kernel")}  # no matrices
    nadam = optax.nadam(0.1, cfg.b1, cfg.b2, cfg.eps)
    expected, _ = jax.jit(lambda rest: nadam.update(rest, nadam.init(rest), rest))(rest)
    for path in rest:
        np.testing.assert_allclose(updates[path], expected[path], rtol=1e-5)


def test_a_clip_of_zero_is_refused():
    with pytest.raises(InputError, match="clip is 0, which makes every gradient 0: set it to None"):
        OptimConfig(clip=0.0)
