"""Losses: values by hand, gradients, and the same numbers however the batch is spread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import TypeCheckError

from tinyclip_jax import losses
from tinyclip_jax.losses import affinity_mimicking, contrastive

# values of the formulas, computed in float64
STUDENT = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
TEACHER = np.array([[0.8, 0.3], [0.1, 0.7]], np.float32)


def _rows(logits, target):
    """Cross-entropy by rows, with the matrices whole."""
    return -(jax.nn.softmax(target) * jax.nn.log_softmax(logits)).sum(-1).mean()


def whole(image, text, teacher_image, teacher_text, scale, teacher_scale):
    """Affinity mimicking as the paper writes it down."""
    logits, target = scale * image @ text.T, teacher_scale * teacher_image @ teacher_text.T
    return (_rows(logits, target) + _rows(logits.T, target.T)) / 2


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)


def test_reference_values():
    np.testing.assert_allclose(_rows(5 * STUDENT, 5 * TEACHER), 0.2562238, atol=1e-6)
    np.testing.assert_allclose(_rows(5 * STUDENT.T, 5 * TEACHER.T), 0.2896519, atol=1e-6)
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


def test_wrong_shapes_are_caught_in_tests():
    """tests/conftest.py checks the shapes of the signatures; a Python float is a scale, a vector is none."""
    rng = np.random.default_rng(7)
    image, text, other = unit(rng, 5, 8), unit(rng, 5, 8), unit(rng, 4, 8)
    assert affinity_mimicking(image, text, image, text, 10.0, jnp.float32(10)).shape == ()
    with pytest.raises(TypeCheckError, match="text"):
        affinity_mimicking(image, other, image, text, 10.0, 10.0)
    with pytest.raises(TypeCheckError, match="teacher_text"):
        affinity_mimicking(image, text, image, other[:, :3], 10.0, 10.0)
    with pytest.raises(TypeCheckError, match="scale"):
        affinity_mimicking(image, text, image, text, jnp.full(5, 10.0), 10.0)


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
        step = jax.jit(
            jax.value_and_grad(loss), in_shardings=(whole, rows), out_shardings=whole, compiler_options=quick
        )
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


@pytest.fixture
def few_rows(monkeypatch):
    """Chunks of up to 5 rows."""
    monkeypatch.setattr(losses, "CHUNK", 5)


def test_in_chunks_and_over_devices_it_is_the_loss_written_down_and_so_are_its_gradients(few_rows):
    rng = np.random.default_rng(3)
    features = [unit(rng, 48, 8), unit(rng, 48, 8), unit(rng, 48, 5), unit(rng, 48, 5)]
    expected, by_hand = jax.value_and_grad(whole, argnums=(0, 1, 4))(*features, 20.0, 7.0)
    mimic = jax.value_and_grad(affinity_mimicking, argnums=(0, 1, 4))
    for shape in [(1, 1, 1), (8, 1, 1), (2, 2, 2)]:
        names, devices = ("data", "fsdp", "tensor"), jax.devices()[: np.prod(shape)]
        mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3, devices=devices)
        placed = jax.device_put(features, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        with jax.set_mesh(mesh):
            value, gradients = jax.jit(mimic)(*placed, 20.0, 7.0)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        for ours, theirs in zip(gradients, by_hand, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * float(jnp.abs(theirs).max()))


def test_groups_that_span_chunks_and_devices(few_rows):
    rng = np.random.default_rng(4)
    image, text, group = unit(rng, 48, 8), unit(rng, 48, 8), jnp.asarray(rng.integers(0, 20, 48))
    target = jnp.where(group[:, None] == group[None], 0, -jnp.inf)
    expected, by_hand = jax.value_and_grad(
        lambda x: (_rows(9 * x @ text.T, target) + _rows(9 * text @ x.T, target)) / 2
    )(image)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        value, gradient = jax.jit(jax.value_and_grad(lambda x: contrastive(x, text, 9.0, group)))(image)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, by_hand, rtol=0, atol=2e-6 * float(jnp.abs(by_hand).max()))


@pytest.mark.parametrize(("n", "devices"), [(47, 1), (56, 8), (12, 1)])
def test_a_last_chunk_that_is_short_is_padded_and_the_padding_counts_for_nothing(few_rows, n, devices):
    """47 rows are prime, 8 devices have 7 each: the fewest chunks of up to 5 rows, whatever divides them."""
    rng = np.random.default_rng(6)
    features = [unit(rng, n, 8), unit(rng, n, 8), unit(rng, n, 5), unit(rng, n, 5)]
    expected, by_hand = jax.value_and_grad(whole, argnums=(0, 1, 4))(*features, 20.0, 7.0)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    placed = jax.device_put(features, NamedSharding(mesh, PartitionSpec("data")))
    with jax.set_mesh(mesh):
        mimic = jax.jit(jax.value_and_grad(affinity_mimicking, argnums=(0, 1, 4))).lower(*placed, 20.0, 7.0).compile()
        value, gradients = mimic(*placed, 20.0, 7.0)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for ours, theirs in zip(gradients, by_hand, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * max(1, float(jnp.abs(theirs).max())))
    rows = {47: 5, 56: 4, 12: 4}[n]
    assert f"f32[{rows},{n}]" in mimic.as_text() and f"f32[1,{n}]" not in mimic.as_text()


def test_padding_is_harmless_where_every_cosine_is_minus_one(few_rows):
    """A padded row has a logit of 0, e^100 times its column's sum: masked, not multiplied by zero."""
    image, text = jnp.ones((7, 1)), -jnp.ones((7, 1))
    value, gradients = jax.value_and_grad(contrastive, argnums=(0, 1, 2))(image, text, 100.0)
    np.testing.assert_allclose(value, np.log(7), atol=8e-6)  # the spacing of f32 at a logit of 100
    assert all(bool(jnp.isfinite(g).all()) for g in gradients)


def test_no_device_ever_holds_all_pairs(few_rows):
    x = jax.ShapeDtypeStruct((48, 8), "float32")
    both = [
        jax.jit(jax.value_and_grad(f, argnums=(0, 1))).lower(x, x, x, x, 50.0, 50.0).compile().as_text()
        for f in (whole, affinity_mimicking)
    ]
    assert ["f32[48,48]" in text for text in both] == [True, False]
    assert "f32[5,48]" in both[1]  # ten chunks, the last padded by two rows
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with jax.set_mesh(mesh):
        mimic = jax.jit(jax.value_and_grad(affinity_mimicking, argnums=(0, 1)), in_shardings=(rows,) * 4 + (None, None))
        text = mimic.lower(x, x, x, x, 50.0, 50.0).compile().as_text()
    # of its six rows three at a time
    assert "f32[3,48]" in text and "f32[48,48]" not in text and "f32[6,48]" not in text
