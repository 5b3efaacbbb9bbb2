import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from heirloom.common.errors import InputError
from heirloom.common.mesh import shardings
from heirloom.common.surgery.axes import Axes, Leaf
from heirloom.common.train.optim import OptimConfig, make_optimizer
from heirloom.common.train.state import abstract_state, create_state
from heirloom.common.train.step import STATISTICS, StepConfig, make_step


@pytest.fixture
def optimizer(spec):
    return make_optimizer(OptimConfig(lr=1e-2, warmup=0), spec, 100)


def host(tree):
    return jax.tree.map(np.array, tree)


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_a_step_is_that_of_optax(loss, optimizer, spec, params, batch, mesh):
    state = create_state(params, optimizer, spec, mesh)
    state, metrics = make_step(loss, optimizer, spec, mesh, StepConfig())(state, batch)
    (value, _), grads = jax.value_and_grad(loss, has_aux=True)(jax.tree.map(jnp.asarray, params), batch, None, None)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for path, expected in optax.apply_updates(params, updates).items():
        np.testing.assert_allclose(state.params[path], expected, rtol=1e-5, atol=1e-7)
    expected = {"loss": value, "error": value, "grad_norm": optax.tree.norm(grads), "lr": 1e-2, "skipped": 0.0}
    assert metrics.keys() == expected.keys()
    for name, (total, count) in metrics.items():
        np.testing.assert_allclose(total / count, expected[name], rtol=1e-5)
    assert int(state.step) == 1


def test_the_callers_parameters_survive_the_donation(loss, optimizer, spec, params, batch, mesh):
    mine = jax.device_put(params, shardings(spec, mesh))  # already where the state wants them
    state = create_state(mine, optimizer, spec, mesh, ema=0.9)
    make_step(loss, optimizer, spec, mesh, StepConfig(ema=0.9))(state, batch)
    assert equal(host(mine), params)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.ema)))


def test_accumulation_changes_nothing_but_memory(loss, optimizer, spec, params, batch, mesh):
    found = {}
    for parts in (1, 4):
        state = create_state(params, optimizer, spec, mesh)
        step = make_step(loss, optimizer, spec, mesh, StepConfig(accumulate=parts))
        for _ in range(3):
            state, metrics = step(state, batch)
        found[parts] = host((optax.tree.get(state.opt, "mu"), metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found[1], found[4])
    assert found[4][1]["error"][1] == 32 * 16


def test_micro_batches_must_divide_the_batch(loss, optimizer, spec, params, batch, mesh):
    step = make_step(loss, optimizer, spec, mesh, StepConfig(accumulate=3))
    with pytest.raises(InputError, match="a batch of 32 does not divide into 3 micro-batches on 4 devices"):
        step(create_state(params, optimizer, spec, mesh), batch)


def test_average_by_hand(loss, optimizer, spec, params, batch, mesh):
    state = create_state(params, optimizer, spec, mesh, ema=0.75)
    step = make_step(loss, optimizer, spec, mesh, StepConfig(ema=0.75))
    expected = params["up/kernel"]
    for _ in range(3):
        state, _ = step(state, batch)
        expected = 0.75 * expected + 0.25 * np.array(state.params["up/kernel"])
    np.testing.assert_allclose(state.ema["up/kernel"], expected, rtol=1e-6)
    assert np.abs(expected - np.array(state.params["up/kernel"])).max() > 1e-3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(loss, optimizer, spec, params, batch, mesh, bad):
    good = batch | {"factor": np.ones((32, 1), "float32")}
    poisoned = batch | {"factor": np.full((32, 1), bad, "float32")}
    state = create_state(params, optimizer, spec, mesh, ema=0.9)
    step = make_step(loss, optimizer, spec, mesh, StepConfig(ema=0.9))
    state, _ = step(state, good)
    before = host((state.params, state.opt, state.ema))
    for skipped in (1, 2):
        state, metrics = step(state, poisoned)
        assert (int(state.step), int(state.skipped)) == (1 + skipped, skipped)
        assert host(metrics["loss"]) == (0, 0) and host(metrics["skipped"]) == (1, 1)
    assert equal(host((state.params, state.opt, state.ema)), before)
    state, metrics = step(state, good)
    assert (int(state.step), int(state.skipped)) == (4, 0)
    assert host(metrics["skipped"]) == (0, 1) and not equal(host(state.params), before[0])


def test_bfloat16_is_one_cast_at_the_door(spec, params, batch, mesh):
    seen = {}

    def loss(params, batch, key, frozen):
        seen.update({path: x.dtype.name for path, x in params.items()})
        return (params["up/kernel"].astype("float32") ** 2).sum() / 2, {}

    optimizer = make_optimizer(OptimConfig(warmup=0, clip=None), spec, 100)
    state = create_state(params, optimizer, spec, mesh)
    state, _ = make_step(loss, optimizer, spec, mesh, StepConfig(compute="bfloat16"))(state, batch)
    assert seen == {"up/kernel": "bfloat16", "up/bias": "float32", "down/kernel": "bfloat16", "logit_scale": "float32"}
    assert {x.dtype.name for x in state.params.values()} == {"float32"}
    # the gradient is the kernel as the loss saw it, rounded to 8 bits; Adam's first moment is a tenth of it
    rounded = jnp.asarray(params["up/kernel"]).astype("bfloat16").astype("float32")
    np.testing.assert_allclose(optax.tree.get(state.opt, "mu")["up/kernel"], 0.1 * rounded, rtol=1e-6)


def test_the_key_belongs_to_the_step(optimizer, spec, params, batch, mesh):
    def loss(params, batch, key, frozen):
        return params["logit_scale"] * 0, {"noise": (jax.random.normal(key), 1)}

    step = make_step(loss, optimizer, spec, mesh, StepConfig(seed=7))
    state, drawn = create_state(params, optimizer, spec, mesh), []
    for _ in range(2):
        state, metrics = step(state, batch)
        drawn.append(float(metrics["noise"][0]))
    expected = [float(jax.random.normal(jax.random.fold_in(jax.random.key(7), n))) for n in range(2)]
    np.testing.assert_allclose(drawn, expected, rtol=1e-6)


def test_frozen_is_an_argument_and_projection_comes_last(loss, optimizer, spec, params, batch, mesh):
    teacher = {"w": jnp.full((16,), 3.0)}

    def distil(params, batch, key, frozen):
        value, metrics = loss(params, batch, key, None)
        return value + frozen["w"].sum(), metrics

    def project(params):
        return params | {"logit_scale": jnp.float32(0.5)}

    step = make_step(distil, optimizer, spec, mesh, StepConfig(ema=0.0), frozen=teacher, project=project)
    state, metrics = step(create_state(params, optimizer, spec, mesh, ema=0.0), batch)
    np.testing.assert_allclose(metrics["loss"][0] - metrics["error"][0] / metrics["error"][1], 48.0, rtol=1e-5)
    assert float(state.params["logit_scale"]) == float(state.ema["logit_scale"]) == 0.5
    assert float(teacher["w"].sum()) == 48.0


def test_a_step_is_compiled_from_shapes_alone(loss, optimizer, spec, mesh):
    step = make_step(loss, optimizer, spec, mesh, StepConfig())
    lowered = step.lower(abstract_state(optimizer, spec, mesh), {"x": jax.ShapeDtypeStruct((32, 16), jnp.float32)})
    assert lowered.compile().memory_analysis().argument_size_in_bytes > 3 * 4 * (16 * 32 * 2)


def test_parameters_of_another_shape_are_refused(optimizer, spec, params, mesh):
    with pytest.raises(ValueError, match=r"up/bias: the parameters have \(31,\), the spec \(32,\)"):
        create_state(params | {"up/bias": np.zeros(31, "float32")}, optimizer, spec, mesh)


@pytest.mark.parametrize("parts", [1, 4])
def test_running_statistics_are_those_of_the_loss(mesh, parts):
    spec = {
        path: Leaf(Axes.parse("embed"), (1,), np.dtype("float32")) for path in ("kernel", "norm/mean", "other/mean")
    }
    params = {"kernel": np.float32([3.0]), "norm/mean": np.float32([1.0]), "other/mean": np.float32([1.0])}
    cfg = OptimConfig(lr=1e-2, warmup=0, schedule="constant", weight_decay=1.0, decay=("**",), clip=1.0)
    optimizer = make_optimizer(cfg, spec, 10)

    def loss(params, batch, key, frozen):
        moved = {path: params[path] / 2 + batch["x"].mean() / 2 for path in ("norm/mean", "other/mean")}
        return (params["kernel"] * batch["x"].mean()).sum(), {"rows": (1.0, 1.0), STATISTICS: moved}

    step = make_step(loss, optimizer, spec, mesh, StepConfig(accumulate=parts, ema=0.75), fixed={"other/mean"})
    state, metrics = step(create_state(params, optimizer, spec, mesh, ema=0.75), {"x": np.arange(32, dtype="float32")})
    # 0.5 + 15.5 / 2: no decay, no rate; the average over micro-batches is the batch's.
    np.testing.assert_allclose(state.params["norm/mean"], [8.25], rtol=1e-6)
    np.testing.assert_allclose(state.ema["norm/mean"], [0.75 + 0.25 * 8.25], rtol=1e-6)
    np.testing.assert_array_equal(state.params["other/mean"], [1.0])
    np.testing.assert_allclose(state.params["kernel"], [3.0 - 1e-2 * (1 + 3)], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"][0], 15.5, rtol=1e-6)
    assert metrics.keys() == {"rows", "loss", "grad_norm", "lr", "skipped"} and float(metrics["rows"][0]) == parts
    assert jax.tree.leaves(optax.tree.get(state.opt, "mu")["norm/mean"]) == []
    before = host(state.params)
    state, _ = step(state, {"x": np.full(32, np.inf, "float32")})
    assert equal(host(state.params), before)


def test_a_statistic_under_a_parameters_path_is_an_error(loss, optimizer, spec, params, batch, mesh):
    def wrong(params, batch, key, frozen):
        return loss(params, batch, key, frozen)[0], {STATISTICS: {"up/bias": params["up/bias"]}}

    with pytest.raises(ValueError, match="up/bias: the loss returns it as a running statistic"):
        make_step(wrong, optimizer, spec, mesh, StepConfig())(create_state(params, optimizer, spec, mesh), batch)
