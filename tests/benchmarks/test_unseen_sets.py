"""Zoos of several data sets: what is kept apart, and the starts that do not come from a zoo."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from benchmarks import unseen_sets as sets
from benchmarks.weightgen import worlds
from weightgen.zoo.nets import NetConfig, net


def made_up(seed, classes=6, train=20, test=6):
    rng = np.random.default_rng(seed)

    def part(n):
        return rng.uniform(-1, 1, (classes * n, 28 * 28 * 3)).astype(np.float32), np.repeat(np.arange(classes), n)

    return worlds.Pictures(part(train), part(test), tuple("abcdefghij"[:classes]))


def test_features_know_nothing_of_the_data_set_that_is_left_out():
    a, b, c = (made_up(seed) for seed in range(3))
    other = replace(c, train=(-3 * c.train[0], c.train[1]))
    (one, classes), (two, _) = (worlds.world({"a": a, "b": b, "c": found}, "c") for found in (c, other))
    mine = slice(one.train.starts[classes["a"].start], one.train.starts[classes["b"].stop])
    np.testing.assert_array_equal(one.train.features[mine], two.train.features[mine])
    assert not np.array_equal(one.train.features, two.train.features)


def test_a_task_is_of_one_data_set_and_the_sets_take_turns():
    classes = {"a": range(6), "b": range(6, 12), "c": range(12, 18)}
    found = worlds.tasks(classes, ["a", "c"], 5, np.random.default_rng(0))
    assert (found // 6).tolist() == [[name] * 5 for name in (0, 2, 0, 2, 0)]
    assert all(len(set(row)) == 5 for row in found.tolist())


@pytest.mark.parametrize("test", [2, 6, 40])
def test_no_picture_both_selects_and_tests(test):
    world, classes = worlds.world({"a": made_up(0, test=test), "b": made_up(1)}, "b")
    size = replace(sets.SIZES["smoke"], pictures=9)
    found = sets.Tasks.draw(size, world, worlds.tasks(classes, ["a"], 3, np.random.default_rng(0)), [0])
    for task in range(3):
        x, chosen, tested = found.test[0][task], found.select[1][task] >= 0, found.test[1][task] >= 0
        assert not set(map(bytes, x[chosen])) & set(map(bytes, x[tested]))
        assert set(found.test[1][task][tested]) == set(range(5))  # every class is tested


def test_variants_of_a_concept_stand_on_one_side(monkeypatch):
    monkeypatch.setattr(worlds, "thumbnails", lambda records, channels: np.array([r["concept"] for r in records]))
    found = worlds.read(worlds.sources("", "")["emoji"], 10**6)
    assert len(found.names) > 80 and len(found.train[0]) > 2 * len(found.test[0]) > 1000
    assert not set(found.train[0].tolist()) & set(found.test[0].tolist())


def test_prototypes_of_hidden_units_choose_the_nearest_class():
    cfg = NetConfig("mlp", features=8, hidden=6, classes=5)
    params = {path: np.asarray(leaf) for path, leaf in net(cfg).init(jax.random.key(0)).items()}
    rng = np.random.default_rng(0)
    told = rng.standard_normal((3, 5, 4, 8)).astype(np.float32)

    class Known:
        pretrained = params

    class Told:
        classes = np.zeros((3, 5))

    Told.told = told
    found = sets.transferred(Known, Told, "prototype")
    x = rng.standard_normal((3, 7, 8)).astype(np.float32)
    hidden = np.maximum(x @ params["up/kernel"] + params["up/bias"], 0)
    means = np.maximum(told @ params["up/kernel"] + params["up/bias"], 0).mean(2)
    nearest = np.square(hidden[:, :, None] - means[:, None]).sum(-1).argmin(-1)
    np.testing.assert_array_equal(sets.labels(cfg, found, x), nearest)
    assert (sets.labels(cfg, sets.transferred(Known, Told, "zero"), x) == 0).all()


def test_reptile_makes_a_start_from_which_its_tasks_are_learned_sooner():
    rng, cfg = np.random.default_rng(0), NetConfig("mlp", features=4, hidden=8, classes=2)
    x = rng.standard_normal((8, 64, 4)).astype(np.float32)
    y = (x[..., 0] * x[..., 1] > 0).astype(np.int32)  # all tasks are one task
    size = replace(sets.SIZES["smoke"], rounds=60)
    learned = sets.reptile(size, cfg, x, y, seed=0)
    before = {path: np.asarray(leaf) for path, leaf in net(cfg).init(jax.random.key(0)).items()}
    right = [(np.asarray(net(cfg).apply(p, x[0])).argmax(-1) == y[0]).mean() for p in (before, learned)]
    assert right[0] < 0.7 < 0.9 < right[1]


def test_a_rate_is_chosen_by_the_validation_tasks_alone():
    tried = {"start": {"0": {"": 0.2}, "more, 5": {"0.003": 0.5, "0.03": 0.7}}}
    found = {"start": {"0": {"": 0.3}, "more, 5": {"0.003": 0.9, "0.03": 0.4}}}
    assert sets.chosen(found, tried) == {"start": {"0": 0.3, "more, 5": 0.4}}
