"""Writing what `heirloom cache` stores: a folder that is complete once it has its name, and its columns."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np

from heirloom.common.errors import InputError
from heirloom.common.files import staged


@contextmanager
def new_cache(folder: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields an empty folder that is renamed to `folder` when the block succeeds.

    Raises InputError when `folder` exists (unless forced), and in a job of several processes.
    """
    if jax.process_count() > 1:
        raise InputError(f"this job has {jax.process_count()} processes, one writes a cache: run this on one host")
    with staged(folder, force=force) as staging:
        staging.mkdir()
        yield staging


def write_columns(folder: Path, rows: int, parts: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Writes an array of `rows` rows for each column, as `ArraySource` reads them. parts: the rows in order."""
    columns: dict[str, np.memmap] = {}
    seen = 0
    for part in parts:
        for name, value in part.items():
            if name not in columns:
                shape = (rows, *value.shape[1:])
                columns[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", value.dtype, shape)
            columns[name][seen : seen + len(value)] = value
        seen += len(value)
    for column in columns.values():
        column.flush()
