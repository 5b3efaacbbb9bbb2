"""Parquet files, including those of Hugging Face datasets."""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np

from heirloom.common.data.sources.record import (
    Record,
    SourceConfig,
    captions,
    picture_file,
    read,
    require,
    require_columns,
    starts,
    value,
)
from heirloom.common.data.sources.splits import all_splits, of_split
from heirloom.common.errors import InputError, nearest, remark
from heirloom.common.paths import Address, AnyPath
from heirloom.common.reading import Stamp, retried

if TYPE_CHECKING:  # imported where files are read: it is heavy, and most commands read none
    import pyarrow
    from pyarrow import parquet

ROW_GROUP_MEMORY = 256 * 2**20  # bytes of decoded row groups that a process keeps


class ParquetSource:
    """Parquet files, read by row group: write groups of a few hundred rows, or shuffling is slow.

    A local file is memory-mapped, one in a bucket is read by ranges.

    A picture is a binary column, a column of paths relative to the file, or the struct of `bytes` and `path` that
    Hugging Face datasets write (path where bytes is null). A split is a column `split`, or a part of the names of the
    files.
    """

    def __init__(self, files: Sequence[AnyPath], cfg: SourceConfig):
        import pyarrow

        names = [c for c in (cfg.image, cfg.text, *cfg.columns) if c]
        by_column = "split" in _schema(files[0]).names
        files = files if by_column else of_split(files, cfg.split)
        groups: list[RowGroup] = []
        splits: list[str] = []
        for file in files:
            stamp = Stamp.of(file)
            try:
                with _open(file) as opened:
                    require_columns(cfg, opened.schema_arrow.names, file)
                    require(["split"] if cfg.split and by_column else [], opened.schema_arrow.names, file)
                    counts = [opened.metadata.row_group(g).num_rows for g in range(opened.num_row_groups)]
                    if cfg.split and by_column:
                        splits += opened.read(columns=["split"]).column("split").to_pylist()
                    elif by_column:
                        splits += _extremes(opened.metadata, "split")
            except (OSError, pyarrow.ArrowException) as error:
                raise InputError(f"{file} is not readable as parquet: {error}") from error
            if not sum(counts):
                raise InputError(f"{file} is empty: it has no row")
            for g, count in enumerate(counts):
                groups.append(RowGroup(file=file, stamp=stamp, number=g, first=sum(counts[:g]), rows=count))
        remark(all_splits(set(splits), files[0]) if not cfg.split else "")
        self._starts = starts([group.rows for group in groups])
        self._rows: range | np.ndarray = range(sum(group.rows for group in groups))
        if cfg.split and by_column:
            if cfg.split not in splits:
                known = sorted({str(split) for split in splits})
                near = f"{nearest(cfg.split, known)} (it has {', '.join(known)})"
                raise InputError(f"{files[0]} has no split {cfg.split!r}{near}")
            self._rows = np.flatnonzero(np.array(splits) == cfg.split)
        self.class_names = _class_names(files)
        self._groups, self._decoded, self._cfg = groups, DecodedGroups(names), cfg

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        group, row = self._place(index)
        cfg, key, table = self._cfg, self.key(index), self._decoded.get(group)
        try:
            values = {c: table.column(c)[row].as_py() for c in table.column_names}
        except UnicodeDecodeError as error:
            raise InputError(f"{key} is not UTF-8 text: {error}") from error
        for name, cell in values.items():
            if cell is None:
                raise InputError(f"{key}: the column {name!r} is empty")
        record = Record(key=key) | {c: value(values[c], key, c) for c in cfg.columns}
        if cfg.text:
            record["text"] = captions(values[cfg.text], key)
        if cfg.image:
            picture = _picture(values[cfg.image], group.file, key)
            record |= (
                {"image": picture} if isinstance(picture, bytes) else {"key": str(picture), "image": read(picture)}
            )
        return record

    def key(self, index: int) -> str:
        """Returns the file and the row in it, counted from 0."""
        group, row = self._place(index)
        return f"{group.file} row {group.first + row}"

    def pictures(self) -> list[object]:
        """Returns an identifier of the picture of each row: its path, or a digest of its bytes."""
        found: list[object] = []
        for index in range(len(self)):
            group, row = self._place(index)
            cell = self._decoded.get(group).column(self._cfg.image)[row].as_py()
            picture = _picture(cell, group.file, self.key(index))
            found.append(sha256(picture).digest() if isinstance(picture, bytes) else picture)
        return found

    def _place(self, index: int) -> tuple["RowGroup", int]:
        """Returns the row group of a record, and its row in the group."""
        row = int(self._rows[index])
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._groups[number], row - int(self._starts[number])


def _picture(cell: Any, file: AnyPath, key: str) -> bytes | AnyPath:
    """Returns the encoded picture of a cell, or its path."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, str) and cell:
        return picture_file(file.parent, cell, key)
    needed = "a picture must be bytes, a path, or a struct of bytes and path"
    raise InputError(f"{key}: its picture is {str(cell)[:60]}; {needed}")


@contextmanager
def _open(file: AnyPath) -> Iterator["parquet.ParquetFile"]:
    """Opens a file: memory-mapped, or in a bucket read by ranges."""
    from pyarrow import parquet

    if isinstance(file, Address):
        with file.open(ahead=False) as data, parquet.ParquetFile(data, pre_buffer=True) as opened:
            yield opened
    else:
        with parquet.ParquetFile(file, memory_map=True) as opened:
            yield opened


def _schema(file: AnyPath) -> "pyarrow.Schema":
    import pyarrow

    try:
        with _open(file) as opened:
            return opened.schema_arrow
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not readable as parquet: {error}") from error


def _extremes(about: "parquet.FileMetaData", name: str) -> list[str]:
    """Returns the least and the largest value of a column in each row group, where the file tells."""
    groups = [about.row_group(g) for g in range(about.num_row_groups)]
    columns = (group.column(c) for group in groups for c in range(group.num_columns))
    found = (c.statistics for c in columns if c.path_in_schema == name)
    return [str(value) for known in found if known and known.has_min_max for value in (known.min, known.max)]


def _class_names(files: Sequence[AnyPath]) -> dict[str, tuple[str, ...]]:
    """Returns Hugging Face's class names in the schema, by column. Raises InputError when files disagree."""
    found = [_features(file) for file in files]
    for file, names in zip(files, found, strict=True):
        if names != found[0]:
            raise InputError(f"{file} and {files[0]} have different class names; read them separately")
    return found[0]


def _features(file: AnyPath) -> dict[str, tuple[str, ...]]:
    about = (_schema(file).metadata or {}).get(b"huggingface")
    try:
        features = json.loads(about)["info"]["features"] if about else {}
        labels = {n: f for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
        return {name: tuple(label["names"]) for name, label in labels.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: the schema's description by Hugging Face is damaged: {error!r}") from error


@dataclass(frozen=True)
class RowGroup:
    """A row group of a parquet file: its number in the file, its first row in the file, and its number of rows."""

    file: AnyPath
    stamp: Stamp
    number: int
    first: int
    rows: int


class DecodedGroups:
    """A cache of the last decoded row groups, up to ROW_GROUP_MEMORY bytes (at least one); never pickled."""

    def __init__(self, columns: Sequence[str]):
        self._columns, self._lock = list(columns), threading.Lock()
        self._tables: OrderedDict[RowGroup, Any] = OrderedDict()

    def __reduce__(self) -> Any:
        return DecodedGroups, (self._columns,)

    def get(self, group: RowGroup) -> "pyarrow.Table":
        """Reads a row group, from the cache if possible. Raises InputError when it is not readable."""
        import pyarrow

        try:
            return retried(lambda: self._read(group), group.file)  # waits between tries without the lock
        except pyarrow.ArrowException as error:
            raise InputError(f"{group.file} is not readable as parquet: {error}") from error

    def _read(self, group: RowGroup) -> "pyarrow.Table":
        with self._lock:
            if group not in self._tables:
                group.stamp.check(group.file)
                with _open(group.file) as opened:
                    self._tables[group] = opened.read_row_group(group.number, columns=self._columns)
                while len(self._tables) > 1 and sum(t.nbytes for t in self._tables.values()) > ROW_GROUP_MEMORY:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(group)
            return self._tables[group]
