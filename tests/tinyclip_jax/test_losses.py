"""Losses: values by hand, gradients, and the same numbers however the batch is spread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tinyclip_jax.losses import affinity_mimicking, contrastive, soft_cross_entropy

# spec §2.5
STUDENT = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
TEACHER = np.array([[0.8, 0.3], [0.1, 0.7]], np.float32)


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)


def test_reference_values():
    np.testing.assert_allclose(soft_cross_entropy(5 * STUDENT, 5 * TEACHER), 0.2562238, atol=1e-6)
    np.testing.assert_allclose(soft_cross_entropy(5 * STUDENT.T, 5 * TEACHER.T), 0.2896519, atol=1e-6)
    # Features whose products are those cosines: the identity on one side.
    eye = jnp.eye(2)
    np.testing.assert_allclose(affinity_mimicking(STUDENT, eye, TEACHER, eye, 5.0, 5.0), 0.2729379, atol=1e-6)


def test_affinity_mimicking_written_out():
    rng = np.random.default_rng(0)
    image, text, teacher_image, teacher_text = unit(rng, 5, 8), unit(rng, 5, 8), unit(rng, 5, 3), unit(rng, 5, 3)
    got = affinity_mimicking(image, text, teacher_image, teacher_text, 20.0, 7.0)
    student = 20.0 * np.array(image, np.float64) @ np.array(text).T
    teacher = 7.0 * np.array(teacher_image, np.float64) @ np.array(teacher_text).T
    total = 0.0
    for s, t in ((student, teacher), (student.T, teacher.T)):
        for i in range(5):
            target = np.exp(t[i]) / np.exp(t[i]).sum()
            total -= sum(target[j] * (s[i, j] - np.log(np.exp(s[i]).sum())) for j in range(5)) / 5
    np.testing.assert_allclose(got, total / 2, rtol=1e-6)


def test_a_student_that_is_its_teacher_is_at_the_minimum():
    """Cross-entropy, not divergence: the value is the teacher's entropy and the gradient is zero."""
    rng = np.random.default_rng(1)
    image, text = unit(rng, 6, 4), unit(rng, 6, 4)
    value, gradient = jax.value_and_grad(lambda x: affinity_mimicking(x, text, image, text, 10.0, 10.0))(image)
    rows, columns = (jax.nn.softmax(10.0 * image @ text.T, axis=a) for a in (1, 0))
    entropy = -(jnp.sum(rows * jnp.log(rows)) + jnp.sum(columns * jnp.log(columns))) / 12
    np.testing.assert_allclose(value, entropy, rtol=1e-5)
    assert float(jnp.abs(gradient).max()) < 1e-6


def test_no_gradient_reaches_the_teacher():
    rng = np.random.default_rng(2)
    features = [unit(rng, 4, 3) for _ in range(4)]
    gradients = jax.grad(affinity_mimicking, argnums=(0, 1, 2, 3, 4, 5))(*features, 10.0, 10.0)
    assert [bool(jnp.any(g != 0)) for g in gradients] == [True, True, False, False, True, False]


def test_large_scales_stay_finite():
    eye = jnp.eye(3)
    value, gradient = jax.value_and_grad(affinity_mimicking)(-eye, eye, eye, eye, 1e4, 1e4)
    np.testing.assert_allclose(value, 1e4 + np.log(2), rtol=1e-6)
    assert bool(jnp.isfinite(gradient).all())


def test_contrastive_is_infonce():
    logits = 5 * STUDENT
    rows = [np.log(np.exp(logits[i]).sum()) - logits[i, i] for i in range(2)]
    columns = [np.log(np.exp(logits[:, i]).sum()) - logits[i, i] for i in range(2)]
    expected = (np.mean(rows) + np.mean(columns)) / 2
    np.testing.assert_allclose(contrastive(STUDENT, jnp.eye(2), 5.0), expected, rtol=1e-5)
    np.testing.assert_allclose(contrastive(STUDENT, jnp.eye(2), 5.0, jnp.array([7, 3])), expected, rtol=1e-5)


def test_pairs_of_one_group_share_the_target():
    """Rows 0 and 2 are one group: each puts half of its target on either caption, row 1 all on its own."""
    logits = np.array([[0.9, 0.1, 0.5], [0.2, 0.8, 0.3], [0.4, 0.0, 0.6]], np.float32)
    target = np.array([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
    expected = 0.0
    for axis in (0, 1):
        log = logits - np.log(np.exp(logits).sum(axis, keepdims=True))
        expected -= (target * log).sum() / 3 / 2
    np.testing.assert_allclose(contrastive(logits, jnp.eye(3), 1.0, jnp.array([4, 9, 4])), expected, rtol=1e-6)


@pytest.fixture(scope="module")
def mimicry(model, params, images, tokens):
    """Loss and gradients of the small model against a teacher's features, on a batch of 8 spread over n devices."""
    rng = np.random.default_rng(5)
    images, tokens = np.concatenate([images, -images]), np.concatenate([tokens, tokens])
    tokens[4:, 0] += 1
    batch = {"images": images, "tokens": tokens, "image": unit(rng, 8, 6), "text": unit(rng, 8, 6)}

    def loss(params, batch):
        student = model.apply(params, batch["images"], batch["tokens"])
        return affinity_mimicking(student.image, student.text, batch["image"], batch["text"], student.scale, 10.0)

    def on(devices):
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
        # Compiled without the optimiser's passes, which take most of the time and change nothing here.
        quick = {"xla_backend_optimization_level": 0}
        step = jax.jit(jax.value_and_grad(loss), in_shardings=(whole, rows), out_shardings=whole, compiler_options=quick)
        return jax.device_get(step(params, batch))

    return on


def test_loss_and_gradients_are_the_same_on_1_2_and_8_devices(mimicry):
    value, gradients = mimicry(1)
    assert value > 0.1 and max(float(np.abs(g).max()) for g in gradients.values()) > 1e-2
    for devices in (2, 8):
        other, others = mimicry(devices)
        np.testing.assert_allclose(other, value, rtol=1e-5)
        for path, gradient in gradients.items():
            np.testing.assert_allclose(others[path], gradient, atol=1e-5 * max(1, np.abs(gradient).max()), err_msg=path)
