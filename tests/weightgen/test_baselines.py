"""What a generator has to beat, where the right answer is known."""

import numpy as np
import pytest

from heirloom.common.errors import InputError
from weightgen import baselines
from weightgen.metrics import head_accuracy


def test_kernel_density_draws_dimensions_independently(rng):
    latents = np.arange(50.0)[:, None] * np.ones((1, 6))
    drawn = np.rint(baselines.kde(latents, 2000, rng)).astype(int)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(6)).max() < 0.08


def test_ridge_is_penalised_by_classes_it_has_not_seen(rng):
    classes = np.repeat(np.arange(20), 30)
    centre, answer = rng.standard_normal((20, 40)), rng.standard_normal((20, 3))
    x = centre[classes] + 0.01 * rng.standard_normal((600, 40))
    unrelated = baselines.Ridge.fit(x, answer[classes], classes, (1e-3, 1e6))
    related = baselines.Ridge.fit(x, x[:, :3], classes, (1e-3, 1e6))
    assert unrelated.penalty == 1e6 and related.penalty == 1e-3


def test_ridge_refuses_rows_of_one_class_alone(rng):
    with pytest.raises(InputError, match='to leave one out; here is one: set prior to "none"'):
        baselines.Ridge.fit(rng.standard_normal((5, 2)), rng.standard_normal((5, 3)), np.full(5, 7))


def test_ridge_falls_back_to_the_mean(rng):
    weights, noise = 5 + rng.standard_normal((50, 3)), rng.standard_normal((50, 4))
    found = baselines.Ridge.fit(noise, weights, np.arange(50), penalties=(1e6,))
    np.testing.assert_allclose(found(noise), np.broadcast_to(weights.mean(0), (50, 3)), rtol=1e-3)


def test_a_hypernetwork_bends_where_ridge_cannot(rng):
    told = rng.uniform(-2, 2, (600, 2)).astype(np.float32)
    weights = np.stack([np.abs(told[:, 0]), told[:, 1], np.full(600, 3)], axis=1)
    unseen, groups = rng.uniform(-2, 2, (200, 2)).astype(np.float32), np.arange(600)
    right = np.stack([np.abs(unseen[:, 0]), unseen[:, 1], np.full(200, 3)], axis=1)
    fits = baselines.hypernetwork(told, weights), baselines.Ridge.fit(told, weights, groups)
    bent, straight = (np.square(fit(unseen) - right).mean() for fit in fits)
    assert bent < 0.01 < 0.1 < straight


def test_prototypes_and_discriminants_are_nearest_means(rng):
    centres = 3 * rng.standard_normal((2, 4, 6))
    x = np.repeat(centres, 10, axis=1) + rng.standard_normal((2, 40, 6))
    y = np.broadcast_to(np.repeat(np.arange(4), 10), (2, 40))
    for heads in (baselines.prototype(centres[:, :, None]), baselines.discriminant(centres[:, :, None], np.eye(6))):
        nearest = np.linalg.norm(x[:, :, None] - centres[:, None], axis=-1).argmin(-1) == y
        np.testing.assert_allclose(head_accuracy(heads, x, y), nearest.reshape(2, 4, 10).mean((1, 2)))
