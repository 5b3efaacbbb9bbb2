"""The streams of `pipeline.py` as grain's datasets. Imported when data are read: grain is heavy, and many commands read
none.
"""

import multiprocessing
import os
import threading
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset

from heirloom.common.data.grouped import Schedule


def shuffled(examples: int, seed: int) -> grain.MapDataset:
    """Returns the endless stream of the numbers of examples; each epoch has all of them, in another order."""
    return grain.MapDataset.range(examples).seed(seed).shuffle().repeat()


class GroupedIndices(grain.MapDataset):
    """Indices of examples, position by position; each batch is of one group. groups: the group of every example."""

    def __init__(self, groups: np.ndarray, batch: int, seed: int):
        members = [np.flatnonzero(groups == group) for group in range(int(groups.max()) + 1)]
        if empty := [group for group, rows in enumerate(members) if not len(rows)]:
            raise ValueError(f"group {empty[0]} has no example: number the groups without gaps")
        streams = (grain.MapDataset.source(rows).seed(seed + i) for i, rows in enumerate(members))
        super().__init__([stream.shuffle().repeat() for stream in streams])
        self._schedule, self._batch = Schedule([len(rows) for rows in members], batch, seed), batch

    def __len__(self) -> int:
        return len(self._parents[0])  # endless

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        number, row = divmod(index, self._batch)
        turn = self._schedule.turn(number)
        return int(self._parents[turn.group][turn.first + row])


class HostRows(grain.MapDataset):
    """The rows of each global batch that this host builds, starting with batch `first`."""

    def __init__(self, stream: grain.MapDataset, rows: np.ndarray, batch: int, first: int):
        super().__init__(stream)
        self._rows, self._batch, self._first = rows, batch, first

    def __len__(self) -> int:
        return (len(self._parent) // self._batch - self._first) * len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(index, len(self._rows))
        return self._parent[(self._first + step) * self._batch + int(self._rows[row])]


def in_threads(rows: grain.MapDataset, count: int, prefetch: int) -> grain.IterDataset:
    """Reads examples one by one, so that all threads share a batch (decoding and tokenising release Python's lock)."""
    threads = min(16, os.cpu_count() or 1)
    return rows.to_iter_dataset(grain.ReadOptions(threads, max(threads, prefetch * count))).batch(count)


def in_processes(rows: grain.MapDataset, count: int, workers: int, prefetch: int) -> grain.IterDataset:
    """Reads whole batches, distributed to the workers in turn, so that their number does not change the stream."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, and only absl programs parse them
    whole = rows.batch(count).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=max(1, -(-prefetch // workers)))
    return whole.mp_prefetch(options, worker_init_fn=_end_with_parent)


def _end_with_parent(worker: int, workers: int) -> None:
    """Ends this worker process when its parent has ended, even by SIGKILL, after which no cleanup of grain runs."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def ahead(stream: grain.IterDataset, batches: int) -> grain.IterDataset:
    """Reads so many batches ahead in a thread."""
    return ThreadPrefetchIterDataset(stream, prefetch_buffer_size=batches)
