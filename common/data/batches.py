"""An iterator over training batches that resumes exactly and restarts worker processes that died."""

from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np

from heirloom.common.data.bad import BAD, Delivered, bad_records
from heirloom.common.errors import InputError, remark

Batch = dict[str, Any]
RESTARTS = 3  # of dead worker processes before the next batch
DIED = "Worker process was terminated unexpectedly"  # grain's RuntimeError begins with this


class Batches:
    """An endless, resumable iterator over training batches.

    A batch is a dict of arrays whose first axis is the batch: `image` float32 [b, size, size, 3], `text` int32 [b,
    context], and the numeric columns of the records. Nothing is read before the first `next`.
    """

    def __init__(
        self,
        start: Callable[[int], Iterator[Batch]],
        stream: dict[str, Any],
        *,
        rows: np.ndarray | None = None,
        bad_limit: float = 1.0,
    ):
        """start(n): iterates from batch n on. stream: the settings that the order depends on.

        rows: the rows of the global batch that this host builds, where `stream` has the size of the `batch` and batches
        have a column BAD. bad_limit: share of bad records above which a run stops.
        """
        self._start, self._stream, self._rows, self.bad_limit = start, stream, rows, bad_limit
        self._done = 0
        self._iterator: Any = None
        self.delivered = Delivered()
        """Says which examples of the last batch replace bad records."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch = self._next()
        if self._rows is not None:
            size = self._stream["batch"]
            bad = bad_records(batch.pop(BAD), self._done * size + self._rows)
            self.delivered = Delivered(examples=size, bad=bad)
        self._done += 1
        return batch

    def _next(self) -> Batch:
        for _ in range(RESTARTS + 1):
            if self._iterator is None:
                self._iterator = self._start(self._done)
            try:
                return next(self._iterator)
            except RuntimeError as error:
                if DIED not in str(error):
                    raise
                self.close()
                died = str(error).partition(". ")[0]
                remark(f"a process that prepares batches died and is started again: {died}")
        how = "memory that runs out is the usual cause: lower pipeline.workers or pipeline.prefetch"
        raise InputError(f"the processes that prepare batches died {RESTARTS + 1} times in a row: {died}; {how}")

    def state(self) -> dict[str, Any]:
        """Returns the position in the stream for JSON: the same on every host and for any number of workers."""
        return {"batches": self._done, **self._stream}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state` was taken. Raises InputError when it belongs to another stream."""
        for name, value in self._stream.items():
            if (was := state.get(name, value)) != value:  # an earlier version saved fewer names
                now = f"was {was} and is {value} now; set it back, or start a new run"
                raise InputError(f"the data cannot be resumed: {name} {now}")
        self.close()
        self._done = state["batches"]

    def close(self) -> None:
        """Ends threads and worker processes; the next `next` starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
