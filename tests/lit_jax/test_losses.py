"""DiT's loss and the hybrid distillation, by hand in numpy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heirloom.common.checkpoint.family import Donor
from heirloom.common.diffusion import Prediction, linear_schedule
from heirloom.common.errors import InputError
from heirloom.common.mesh import MeshConfig, batch_sharding, shardings, start
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.plan import Source
from lit_jax.dit import Dit
from lit_jax.losses import DistillConfig, diffusion, distillation, split
from lit_jax.train import Config, check_shapes, loss_fn
from lit_jax.zoo import FAMILY

SCHEDULE = linear_schedule()


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    student, teacher = (
        Prediction(*(jnp.asarray(rng.standard_normal((4, 2, 2, 3)), jnp.float32) for _ in range(2))) for _ in range(2)
    )
    return student, teacher, jnp.array([0, 1, 500, 999])


def test_outputs_are_noise_then_variance():
    noise, ratio = split(jnp.arange(6.0)[None])
    assert noise.tolist() == [[0, 1, 2]] and ratio.tolist() == [[3, 4, 5]]


def test_distillation_by_hand(pair):
    student, teacher, step = pair
    apart = distillation(SCHEDULE, student, teacher, step)
    for got, mine, theirs in zip(apart, student, teacher, strict=True):
        np.testing.assert_allclose(
            got, np.square(np.asarray(mine) - np.asarray(theirs)).reshape(4, -1).mean(1), rtol=1e-6
        )
    low, high = SCHEDULE.log_variance_range[np.asarray(step)].T[:, :, None]
    ratios = [(np.asarray(p.ratio, np.float64).reshape(4, -1) + 1) / 2 for p in (student, teacher)]
    logs = [r * high + (1 - r) * low for r in ratios]
    log_sigma = distillation(SCHEDULE, student, teacher, step, "log_sigma").variance
    np.testing.assert_allclose(
        log_sigma, np.square(logs[0] - logs[1]).mean(1), rtol=1e-4, atol=1e-9
    )  # f32: the bounds meet at late times
    sigma = distillation(SCHEDULE, student, teacher, step, "sigma").variance
    np.testing.assert_allclose(sigma, np.square(np.exp(logs[0]) - np.exp(logs[1])).mean(1), rtol=1e-4, atol=1e-9)


def test_the_bound_teaches_the_variance_alone_and_no_gradient_reaches_the_teacher(pair):
    student, teacher, step = pair
    rng = np.random.default_rng(1)
    clean, noisy, noise = (jnp.asarray(rng.standard_normal((4, 2, 2, 3)), jnp.float32) for _ in range(3))

    def bound(predicted):
        return diffusion(SCHEDULE, predicted, clean, noisy, step, noise).bound.sum()

    grads = jax.grad(bound)(student)
    assert (
        not np.asarray(grads.noise).any() and np.abs(grads.ratio[1]).min() > 0.1
    )  # at late times the bounds of the variance meet
    mse = jax.grad(lambda p: diffusion(SCHEDULE, p, clean, noisy, step, noise).mse.sum())(student)
    np.testing.assert_allclose(mse.noise, 2 * (student.noise - noise) / 12, rtol=1e-5)
    assert not np.asarray(mse.ratio).any()
    through = jax.grad(lambda t: sum(x.sum() for x in distillation(SCHEDULE, student, t, step)))(teacher)
    assert not any(np.asarray(x).any() for x in through)


def donor_of(cfg, params):
    model = functional(Dit, cfg)
    return Donor(FAMILY, cfg, model, Source(model.spec, params), "heirloom", None, None)


@pytest.fixture(scope="module")
def setup(cfg, lit, draw):
    student, teacher = functional(Dit, lit), functional(Dit, cfg)
    rng = np.random.default_rng(2)
    batch = {
        "image": jnp.asarray(rng.uniform(-1, 1, (64, 8, 8, 3)), jnp.float32),
        "label": jnp.asarray(rng.integers(5, size=64), jnp.int32),
    }
    return student, draw(student.spec), donor_of(cfg, draw(teacher.spec, 7)), batch


def value(cfg, student, teacher, params, batch, frozen=None):
    return jax.jit(loss_fn(cfg, student, teacher, None))(params, batch, jax.random.key(5), frozen)


def test_a_fresh_model_starts_at_the_variance_of_the_noise(lit, setup):
    student, _, _, batch = setup
    _, metrics = value(Config(student=lit), student, None, student.init(jax.random.key(0)), batch)
    total, n = metrics["mse"]
    assert abs(float(total) / n - 1) < 0.05 and n == 64  # 64 x 192 unit normals: a standard error of 0.013


def test_the_weighted_sum(lit, setup):
    student, params, teacher, batch = setup
    cfg = Config(student=lit, teacher="x", distill=DistillConfig(0.3, 0.07))
    loss, metrics = value(cfg, student, teacher, params, batch, teacher.source.values)
    parts = {name: float(total) / n for name, (total, n) in metrics.items()}
    expected = parts["mse"] + parts["bound"] + 0.3 * parts["kd_noise"] + 0.07 * parts["kd_variance"]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert min(parts.values()) > 1e-3


def test_weights_of_zero_are_the_plain_loss_to_the_bit(lit, setup):
    student, params, teacher, batch = setup
    plain, metrics = value(Config(student=lit), student, None, params, batch)
    zero = Config(student=lit, teacher="x", distill=DistillConfig(0.0, 0.0))
    assert not zero.distill.active and set(metrics) == {"mse", "bound"}
    assert float(value(zero, student, teacher, params, batch, teacher.source.values)[0]) == float(plain)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(cfg, setup):
    _, _, teacher, batch = setup
    both = Config(student=cfg, teacher="x")
    _, metrics = value(both, teacher.model, teacher, teacher.source.values, batch, teacher.source.values)
    assert float(metrics["kd_noise"][0]) == 0 and float(metrics["kd_variance"][0]) == 0


def test_whose_labels_are_dropped(cfg, setup):
    """All labels hidden: a student that is its teacher agrees with it when both see none, and not when the teacher sees
    the label.
    """
    _, _, teacher, batch = setup
    for dropped, agrees in (("shared", True), ("student", False)):
        both = Config(student=cfg, teacher="x", label_drop=1.0, distill=DistillConfig(dropped=dropped))
        _, metrics = value(both, teacher.model, teacher, teacher.source.values, batch, teacher.source.values)
        assert (float(metrics["kd_noise"][0]) == 0) is agrees


def test_labels_are_dropped_as_often_as_asked(lit, setup):
    """Seen through a label table whose last row alone is not zero."""
    student, params, _, batch = setup
    big = {name: jnp.tile(x, (32, *[1] * (x.ndim - 1))) for name, x in batch.items()}
    seen = []

    class Spy:
        spec = student.spec

        @staticmethod
        def apply(params, noisy, step, labels):
            seen.append(labels)
            return student.apply(params, noisy, step, labels)

    loss_fn(Config(student=lit, label_drop=0.25), Spy, None, None)(params, big, jax.random.key(1), None)
    hidden = np.asarray(seen[0]) == 5
    assert 0.22 < hidden.mean() < 0.28  # 2048 draws: a standard error of 0.01
    np.testing.assert_array_equal(np.asarray(seen[0])[~hidden], np.asarray(big["label"])[~hidden])


def test_what_does_not_fit_together_is_one_line(cfg, lit, setup):
    teacher = setup[2]
    example = {"image": np.zeros((8, 8, 3)), "label": 0}
    check_shapes(Config(student=lit), example, teacher)
    with pytest.raises(InputError, match=r"the data is \[8, 8, 3\], the student takes \[16, 16, 3\]"):
        check_shapes(Config(student=replace(lit, size=16)), example, None)
    with pytest.raises(InputError, match=r"of 5 classes, the student .* of 7"):
        check_shapes(Config(student=replace(lit, classes=7)), example, teacher)
    with pytest.raises(InputError, match=r"the data is \[8, 8, 3\]"):
        check_shapes(Config(student=replace(lit, size=16)), {"moments": np.zeros((2, 8, 8, 6))}, None)
    for shape in ((8, 8, 6), (1, 8, 8, 6)):  # latents of other tools
        with pytest.raises(InputError, match=r"a row of moments is \[.*8, 8, 6\], and a cache has \[2, row, column"):
            check_shapes(Config(student=lit), {"moments": np.zeros(shape)}, None)


def test_loss_and_gradients_are_the_same_on_any_mesh(lit, setup):
    student, params, teacher, batch = setup
    cfg, key = Config(student=lit, teacher="x"), jax.random.key(5)

    def gradients(params, batch, frozen):
        (loss, _), grads = jax.value_and_grad(loss_fn(cfg, student, teacher, None), has_aux=True)(
            params, batch, key, frozen
        )
        return loss, grads

    def on(**sizes):
        mesh = start(MeshConfig(**sizes))
        theirs = shardings(teacher.model.spec, mesh)
        places = shardings(student.spec, mesh), batch_sharding(mesh), theirs
        with jax.set_mesh(mesh):
            return jax.device_get(jax.jit(gradients, in_shardings=places)(params, batch, teacher.source.values))

    loss, expected = jax.jit(gradients)(params, batch, teacher.source.values)
    for sizes in (dict(data=8), dict(data=2, fsdp=2, tensor=2)):
        other, grads = on(**sizes)
        np.testing.assert_allclose(other, loss, rtol=1e-5)
        for path, gradient in expected.items():
            np.testing.assert_allclose(grads[path], gradient, atol=1e-5 * np.abs(gradient).max(), err_msg=path)
