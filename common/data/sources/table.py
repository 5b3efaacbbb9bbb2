"""Tables of paths and captions: .csv, .tsv, and .txt with a header."""

import csv
import os
import re
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from heirloom.common.data.sources.record import (
    Record,
    SourceConfig,
    captions,
    picture_file,
    read,
    require,
    require_columns,
    value,
)
from heirloom.common.data.sources.splits import all_splits
from heirloom.common.errors import InputError, nearest, remark
from heirloom.common.fetch import fetch
from heirloom.common.paths import Address, AnyPath
from heirloom.common.reading import Stamp, retried


class CsvSource:
    """A table of paths and captions with a header, separated by commas or tabs; keeps the byte offsets of rows.

    A table in a bucket is downloaded, its pictures are read from there when they are used.
    """

    def __init__(self, file: AnyPath, cfg: SourceConfig):
        self._file, self._cfg = file, cfg
        self._table = fetch(file) if isinstance(file, Address) else file
        self._stamp = Stamp.of(self._table)
        splits, starts, numbers, start = set(), list[int](), list[int](), 0
        try:
            with open(self._table, "rb") as data:
                self._tab = b"\t" in _header_line(data, file)
                data.seek(0)
                rows = self._rows(data)
                self._header = next(rows, [])
                if len(self._header) == 1 and (other := next((c for c in ";|" if c in self._header[0]), "")):
                    raise InputError(f"{file}: its columns are separated by {other!r}; save it with commas or tabs")
                wanted = (cfg.image, cfg.text, *cfg.columns, "split" if cfg.split else "")
                require_columns(cfg, self._header, file)
                require(["split"] if cfg.split else [], self._header, file)
                if doubled := [column for column in wanted if column and self._header.count(column) > 1]:
                    raise InputError(f"{file} has {doubled[0]!r} twice in its header: rename one of the columns")
                self._kinds: dict[str, type] = dict.fromkeys(cfg.columns, int)
                start, number = data.tell(), 0
                for row in rows:
                    if row and len(row) != len(self._header):
                        has = f"has {len(row)} cells, the header {len(self._header)}"
                        raise InputError(f"{file}: the row at byte {start} {has}")
                    number += bool(row)
                    cells = dict(zip(self._header, row, strict=False))
                    splits.add(cells.get("split", ""))
                    if row and (not cfg.split or cells["split"] == cfg.split):
                        starts.append(start)
                        numbers.append(number)
                        self._kinds = {c: _narrowest(cells[c], kind) for c, kind in self._kinds.items()}
                    start = data.tell()
        except csv.Error as error:
            quotes = "a cell with quotes or line breaks is in quotes, and quotes inside it are doubled"
            raise InputError(f"{file}: the row at byte {start} is not readable: {error}; {quotes}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is not readable as a table: {error}; save it as UTF-8") from error
        except OSError as error:
            raise InputError(f"{file} is not readable as a table: {error}") from error
        if cfg.split and not starts:
            known = sorted(splits - {""})
            near = f"{nearest(cfg.split, known)} (it has {', '.join(known) or 'none'})"
            raise InputError(f"{file} has no split {cfg.split!r}{near}")
        remark(all_splits(splits - {""}, file) if not cfg.split else "")
        self._starts, self._numbers = np.array(starts, np.int64), np.array(numbers, np.int64)

    def _rows(self, data: BinaryIO) -> Iterator[list[str]]:
        # readline, because iteration makes `tell` inexact; a quoted cell may span lines.
        lines = (line.decode("utf-8-sig") for line in iter(data.readline, b""))
        return csv.reader(lines, delimiter="\t" if self._tab else ",", strict=True)

    def __len__(self) -> int:
        return len(self._starts)

    def key(self, index: int) -> str:
        """Returns the file and the row, counted from 1 without the header."""
        return f"{self._file} row {self._numbers[index]}"

    def __getitem__(self, index: int) -> Record:
        cfg, key, cells = self._cfg, self.key(index), retried(lambda: self._row(index), self._file)
        record = Record(key=key) | {c: value(kind(cells[c]), key, c) for c, kind in self._kinds.items()}
        if cfg.text:
            record["text"] = captions(cells[cfg.text], key)
            if not cells[cfg.text].strip():
                raise InputError(f"{key}: the column {cfg.text!r} is empty; it needs a caption")
        if cfg.image and not cells[cfg.image]:
            raise InputError(f"{key}: the column {cfg.image!r} is empty; it needs the path of a picture")
        if cfg.image:
            file = picture_file(self._file.parent, cells[cfg.image], key)
            record |= {"key": str(file), "image": read(file)}
        return record

    def pictures(self) -> list[str]:
        """Returns the path of the picture of each row, which identifies it."""
        with open(self._table, "rb") as data:
            return [os.path.normpath(self._cells(data, index)[self._cfg.image]) for index in range(len(self))]

    def _row(self, index: int) -> dict[str, str]:
        with open(self._table, "rb") as data:
            self._stamp.check(data.fileno())
            return self._cells(data, index)

    def _cells(self, data: BinaryIO, index: int) -> dict[str, str]:
        data.seek(int(self._starts[index]))
        return dict(zip(self._header, next(self._rows(data)), strict=True))


def is_table(file: AnyPath, cfg: SourceConfig) -> bool:
    """Returns whether a file is a table: a .csv, a .tsv, or a .txt whose first line names the columns of the config."""
    if file.suffix != ".txt":
        return file.suffix in (".csv", ".tsv")

    def header() -> bytes:
        with file.open("rb") as data:
            return data.readline()

    names = re.split(r"[,\t]", retried(header, file).decode("utf-8-sig", "replace").strip())
    return {cfg.image, cfg.text, *cfg.columns} - {""} <= set(names)


def way_to_table(file: AnyPath) -> str:
    """Returns what makes a file of another form readable; an empty string where nothing is known."""
    # Next to the file, because paths in a table count from there.
    quoted, table = repr(str(file)), repr(str(file.with_suffix(".csv")))
    return {
        ".txt": "a table needs a first line that names its columns, such as image,caption",
        ".arrow": f"write datasets.Dataset.from_file({quoted}).to_parquet('{file.stem}.parquet') in Python",
        ".jsonl": f"write pandas.read_json({quoted}, lines=True).to_csv({table}, index=False) in Python",
        ".json": f"if it is a list of rows, write pandas.read_json({quoted}).to_csv({table}, index=False) in Python",
    }.get(file.suffix, "")


def _header_line(data: BinaryIO, file: AnyPath) -> bytes:
    """Reads the first line. Raises InputError for UTF-16, and for lines that end in a carriage return alone."""
    line = data.readline()
    if b"\0" in line:
        raise InputError(f"{file} is UTF-16, or no text: save it as UTF-8")
    if b"\r" in line.rstrip(b"\r\n"):
        raise InputError(f"{file}: its lines end in carriage returns: save it with line ends of Unix")
    return line


def _narrowest(cell: str, kind: type) -> type:
    """Returns `kind`, or the next of int, float, str that fits `cell` too: a column of numbers has nothing else."""
    if "_" in cell:  # Python reads 1_0 as 10
        return str
    for wider in (int, float):
        if kind in (int, wider):
            try:
                wider(cell)
                return wider
            except ValueError:
                continue
    return str
