from collections import Counter

import numpy as np
import pytest

from heirloom.common.data.grouped import Schedule
from heirloom.common.data.pipeline import PipelineConfig, training_batches
from heirloom.common.data.stream import GroupedIndices

GROUPS = np.repeat([0, 1, 2], [50, 13, 2])  # the last one fills no batch of 4 in an epoch
BATCH = 4


class Numbers:
    def __len__(self):
        return len(GROUPS)

    def __getitem__(self, index):
        return {"key": str(index), "index": index}


def example(record, rng):
    """An array whose shape depends on the group, as latents of pictures of several sizes."""
    index = record["index"]
    return {"index": np.int32(index), "pixels": np.full((2, 3 + GROUPS[index]), rng.integers(2**31))}


def opened(seed=0, **options):
    return training_batches(Numbers(), PipelineConfig(batch=BATCH, seed=seed, **options), example, groups=GROUPS)


def test_a_batch_is_of_one_group_and_has_its_shape():
    for _, batch in zip(range(60), opened(), strict=False):
        (group,) = set(GROUPS[batch["index"]])
        assert batch["pixels"].shape == (BATCH, 2, 3 + group)


def test_every_example_comes_once_in_each_pass_over_its_group():
    seen = [[], [], []]
    for _, batch in zip(range(200), opened(), strict=False):
        seen[GROUPS[batch["index"][0]]] += batch["index"].tolist()
    for group, size in enumerate((50, 13, 2)):
        assert len(seen[group]) >= 2 * size
        passes = [seen[group][i : i + size] for i in range(0, len(seen[group]) - size + 1, size)]
        assert all(Counter(rows) == Counter(np.flatnonzero(group == GROUPS).tolist()) for rows in passes)
        assert size == 2 or passes[0] != passes[1]


def test_groups_take_turns_by_their_size():
    counts = Counter(Schedule([50, 13, 2], BATCH, seed=0).turn(i).group for i in range(650))
    # 65 examples, 16.25 batches an epoch: 650 batches are 40 epochs
    assert counts == {0: 500, 1: 130, 2: 20}


def test_turns_follow_one_another_without_a_gap():
    schedule = Schedule([50, 13, 2], BATCH, seed=3)
    due = [0, 0, 0]
    for number in range(400):
        turn = schedule.turn(number)
        assert turn.first == due[turn.group]
        due[turn.group] += BATCH


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [4], [3, 9], [1000, 1]])
def test_every_batch_number_has_a_turn(sizes):
    schedule = Schedule(sizes, 4, seed=0)
    assert {schedule.turn(i).group for i in range(5000)} == set(range(len(sizes)))


def test_order_is_random_and_depends_on_the_seed():
    orders = [[Schedule([50, 50], 5, seed).turn(i).group for i in range(20)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:10] != orders[0][10:]


@pytest.mark.parametrize("options", [{}, {"workers": 2}])
def test_a_stream_resumes_where_it_stopped(options):
    whole = [batch for _, batch in zip(range(30), opened(), strict=False)]
    first = opened()
    for _ in range(17):
        next(first)
    resumed = opened(**options)
    resumed.restore(first.state())
    for expected in whole[17:]:
        found = next(resumed)
        np.testing.assert_array_equal(found["index"], expected["index"])
        np.testing.assert_array_equal(found["pixels"], expected["pixels"])
    resumed.close()


def test_a_group_without_examples_is_a_mistake():
    with pytest.raises(ValueError, match="group 1 has no example"):
        GroupedIndices(np.array([0, 2]), 1, 0)
