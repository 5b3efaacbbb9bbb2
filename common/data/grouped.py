"""The order of examples whose batches must be of one group each, such as pictures of one size."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Turn(NamedTuple):
    """The group that a batch is taken from, and the position in the group's own stream at which it begins."""

    group: int
    first: int


class Schedule:
    """Which group each batch is taken from: a group of n examples gives n / batch batches an epoch, in random order.

    Each group is an endless stream of its own, in which every example comes once a pass. What does not fill a batch is
    carried over to the next epoch. Any batch is found without counting from the beginning.
    """

    def __init__(self, sizes: Sequence[int], batch: int, seed: int):
        """sizes: examples of each group."""
        self._sizes, self._batch, self._seed = np.array(sizes, np.int64), batch, seed

    def turn(self, number: int) -> Turn:
        """Returns whose turn it is in batch `number`."""
        epoch = max(0, number * self._batch // int(self._sizes.sum()) - 1)
        while number >= self._before(epoch + 1).sum():  # an epoch or so: what is carried over is less than a batch each
            epoch += 1
        groups, ranks = _shuffled(tuple(self._batches_of(epoch)), self._seed, epoch)
        place = number - int(self._before(epoch).sum())
        group = int(groups[place])
        return Turn(group, int(self._before(epoch)[group] + ranks[place]) * self._batch)

    def _before(self, epoch: int) -> np.ndarray:
        """Returns how many batches each group gives before an epoch."""
        return epoch * self._sizes // self._batch

    def _batches_of(self, epoch: int) -> list[int]:
        return [int(count) for count in self._before(epoch + 1) - self._before(epoch)]


@lru_cache(maxsize=8)
def _shuffled(counts: tuple[int, ...], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the group of each batch of an epoch, and its rank among the batches of that group."""
    order = np.random.default_rng((seed, epoch)).permutation(np.repeat(np.arange(len(counts)), counts))
    ranks = np.zeros(len(order), np.int64)
    for group, count in enumerate(counts):
        ranks[order == group] = np.arange(count)
    return order, ranks


class SameGroup:
    """`candidates(index)`: the examples of the same group."""

    def __init__(self, groups: np.ndarray):
        self._groups = groups
        self._members = [np.flatnonzero(groups == group) for group in range(int(groups.max()) + 1)]

    def __call__(self, index: int) -> Sequence[int]:
        return self._members[self._groups[index]]  # type: ignore[return-value]
