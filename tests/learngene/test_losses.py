"""Distillation and augmentation, by their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from heirloom.common.data.preprocess import Preprocess
from heirloom.common.errors import InputError
from learngene.augment import AugmentConfig, augment, cut_box, erased, mixed, shifted
from learngene.losses import DistillConfig, cross_entropy, distillation
from learngene.randaugment import OPERATIONS, RandAugment

PLAIN = Preprocess(8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture(scope="module")
def logits():
    rng = np.random.default_rng(0)
    return (3 * rng.standard_normal((2, 4, 7))).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_soft_distillation_is_a_divergence_times_the_squared_temperature(logits):
    student, teacher = logits
    p, q = softmax(teacher / 2), softmax(student / 2)
    expected = 4 * (p * (np.log(p) - np.log(q))).sum() / 4
    np.testing.assert_allclose(distillation(student, teacher, DistillConfig(temperature=2.0)), expected, rtol=1e-5)
    assert abs(float(distillation(teacher, teacher, DistillConfig()))) < 1e-6
    per_element = distillation(student, teacher, DistillConfig(temperature=2.0, reduction="numel"))
    np.testing.assert_allclose(per_element, expected / 7, rtol=1e-5)


def test_hard_distillation_learns_the_teachers_choice(logits):
    student, teacher = logits
    expected = -np.log(softmax(student))[np.arange(4), teacher.argmax(1)].mean()
    np.testing.assert_allclose(distillation(student, teacher, DistillConfig(kind="hard")), expected, rtol=1e-5)
    np.testing.assert_allclose(cross_entropy(student, np.eye(7)[teacher.argmax(1)]), expected, rtol=1e-5)


def test_released_reduction_beside_labels_is_refused():
    with pytest.raises(InputError, match="the teacher loss is divided by the number of classes"):
        DistillConfig(alpha=0.5, reduction="numel")
    with pytest.raises(InputError, match="between 0 and 1"):
        DistillConfig(alpha=1.5)


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(1).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)


def test_nothing_asked_for_nothing_changed(pictures):
    seen = augment(AugmentConfig(), PLAIN, pictures, np.array([0, 1, 2, 0, 1, 2]), 3, jax.random.key(0))
    np.testing.assert_allclose(seen.pixels, pictures / np.float32(255))
    np.testing.assert_array_equal(seen.targets, np.eye(3)[[0, 1, 2, 0, 1, 2]])
    assert not AugmentConfig().changes and AugmentConfig(flips=0.5).changes and AugmentConfig(views=3).changes


def test_smoothing_shares_out_its_mass(pictures):
    targets = augment(AugmentConfig(smoothing=0.1), PLAIN, pictures[:1], np.array([2]), 5, jax.random.key(0)).targets
    np.testing.assert_allclose(targets, [[0.02, 0.02, 0.92, 0.02, 0.02]], rtol=1e-6)


def test_shifts_move_and_uncover_black(pictures):
    moved = np.asarray(shifted(pictures, 2, jax.random.key(0)))
    padded = np.pad(pictures, ((0, 0), (2, 2), (2, 2), (0, 0)))
    starts = []
    for image, source in zip(moved, padded, strict=True):
        found = [(r, c) for r in range(5) for c in range(5) if np.array_equal(image, source[r : r + 8, c : c + 8])]
        starts += found[:1]
    assert len(starts) == 6 and len(set(starts)) > 2


def test_mixup_mixes_the_batch_with_itself_reversed(pictures):
    pixels, targets = pictures / np.float32(255), np.eye(6, dtype=np.float32)
    out = mixed(AugmentConfig(mixup=0.8), pixels, targets, jax.random.key(2))
    weight = float(out.targets[0, 0])
    assert 0 < weight < 1
    np.testing.assert_allclose(out.targets, weight * targets + (1 - weight) * targets[::-1], rtol=1e-5)
    np.testing.assert_allclose(out.pixels, weight * pixels + (1 - weight) * pixels[::-1], rtol=1e-4, atol=1e-6)


def test_cutmix_pastes_a_box_and_counts_its_area(pictures):
    pixels, targets = pictures / np.float32(255), np.eye(6, dtype=np.float32)
    areas = set()
    for seed in range(6):
        out = mixed(AugmentConfig(cutmix=1.0), pixels, targets, jax.random.key(seed))
        pasted = (np.asarray(out.pixels) == pixels[::-1]).all((0, 3))
        kept = (np.asarray(out.pixels) == pixels).all((0, 3))
        assert (pasted ^ kept).all()
        np.testing.assert_allclose(out.targets[0, 0], 1 - pasted.mean(), rtol=1e-5)
        rows, cols = np.where(pasted)
        if len(rows):
            assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(cols) + 1)
        areas.add(int(pasted.sum()))
    assert len(areas) > 2


def test_a_box_in_the_middle_has_the_area_it_should():
    box = jax.vmap(lambda key: cut_box(jnp.float32(0.75), 32, 32, key))(jax.random.split(jax.random.key(0), 200))
    area = np.asarray(box.sum((1, 2)))
    assert area.max() == 256 and (area == 256).mean() > 0.2  # a quarter of the picture, where no edge clips it


def test_erasing_puts_unit_noise_in_a_box_of_the_right_size():
    pixels = np.zeros((400, 16, 16, 3), np.float32)
    out = np.asarray(erased(pixels, 0.25, PLAIN, jax.random.key(0)))
    hit = (out != 0).any(3)
    share = hit.any((1, 2)).mean()
    assert 0.18 < share < 0.32
    areas = hit.sum((1, 2))[hit.any((1, 2))] / 256
    assert areas.min() > 0.01 and areas.max() < 0.4 and 0.12 < areas.mean() < 0.23
    noise = (out[hit] - 0.5) / 0.25
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_randaugment_reads_timms_words_and_repeats_itself():
    made = RandAugment.parse("rand-m9-mstd0.5-inc1", (1, 2, 3))
    assert made == RandAugment(9.0, 0.5, 2, (1, 2, 3)) and RandAugment.parse("rand-m7-n3-mstd1-inc1").operations == 3
    with pytest.raises(InputError, match="is not understood"):
        RandAugment.parse("augmix-m3")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 10, 3)).astype(np.uint8))
    once, again = (np.asarray(made(picture, np.random.default_rng(5))) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    same = [np.array_equal(made(picture, np.random.default_rng(s)), picture) for s in range(80)]
    assert 0.15 < np.mean(same) < 0.45  # both operations are left out a quarter of the time, and a few change nothing


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_the_size_and_do_what_they_say(name):
    rng = np.random.default_rng(3)
    ramp = np.broadcast_to(np.linspace(20, 230, 16).astype(np.uint8)[None, :, None], (48, 16, 3)).copy()
    picture = Image.fromarray(ramp)
    out = np.asarray(OPERATIONS[name](picture, 0.9, rng, (7, 8, 9)))
    assert out.shape == ramp.shape
    expected = {
        "invert": 255 - ramp,
        "solarize": np.where(ramp < 26, ramp, 255 - ramp),
        "solarize_add": np.where(ramp < 128, np.minimum(ramp.astype(int) + 99, 255), ramp),
        "posterize": ramp & 0x80,
        "color": ramp,  # a grey picture has no colour to change
    }
    if name in expected:
        np.testing.assert_array_equal(out, expected[name])
    elif name in ("rotate", "shear_x", "translate_x"):
        assert (out == (7, 8, 9)).all(2).any()
    else:
        assert name in ("sharpness", "translate_y", "shear_y") or not np.array_equal(out, ramp)
