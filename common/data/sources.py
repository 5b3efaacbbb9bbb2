"""Where pictures and captions come from: folders, tables, tar shards, parquet, TFDS, and the emoji and digits that live in this package.

A *source* is a random-access sequence of records. A record is a dict with `key` (file and name, for messages), `image`
(encoded bytes, or uint8 [h, w, 3]) and/or `text` (a string, or a list of strings when a picture has several captions),
`label` (int) where the format knows classes, and the further columns asked for. Records that share a `concept` are
positives of one another. Sources are pickled to worker processes, hold positions rather than data, and open files lazily.
"""

import bisect
import csv
import glob
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow
from pyarrow import parquet

from common.data import digits, emoji
from common.data.tar_index import STEM, index_shard, read_span
from common.errors import InputError, nearest

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
SPLITS = ("train", "test", "val", "valid", "validation")
ROW_GROUP_MEMORY = 256 * 2**20  # bytes of decoded parquet row groups a process keeps
Record = dict[str, Any]


@dataclass(frozen=True)
class SourceConfig:
    """Which data to read."""

    path: str = ""
    """emoji | emoji:noto | emoji:fluent | emoji:twemoji | digits (embedded), a folder of pictures, a .csv or .tsv, .tar or .parquet files
    (a file, a folder, a glob, or numbered as in shards/{00000..00127}.tar), a folder of .npy arrays, or tfds:name[:version][@data_dir]"""
    split: str = ""
    """train, test, ... for data that has splits: a parquet column `split`, TFDS, a folder with sub-folders train/ test/"""
    image: str = "image"
    """column of the picture; in a .csv the one with its path, relative to the file; empty: leave pictures out"""
    text: str = "caption"
    """column of the caption; in tar shards a key of the .json, where caption means the .txt member if there is one; empty: leave it out"""
    columns: tuple[str, ...] = ()
    """further columns to carry along, such as tags, concept, label, or embeddings (numbers become float32 and int32 arrays)"""


class Source(Protocol):
    """Random access to records (grain's RandomAccessDataSource)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...


def open_source(cfg: SourceConfig) -> Source:
    """Open what `cfg.path` names.

    Raises InputError when there is nothing, when a file is unreadable or empty, or when a column or split is missing.
    """
    source = _open(cfg)
    if len(source) == 0:
        raise InputError(f"{cfg.path}: there is no sample in it{f' of split {cfg.split!r}' if cfg.split else ''}")
    return source


def _open(cfg: SourceConfig) -> Source:
    scheme, _, rest = cfg.path.partition(":")
    if scheme == "emoji":
        if rest and rest not in emoji.STYLES:
            raise InputError(f"no emoji style {rest!r}{nearest(rest, emoji.STYLES)} ({', '.join(emoji.STYLES)})")
        columns = tuple(dict.fromkeys(("concept", "tags", *cfg.columns)))
        return ParquetSource([emoji.path(style) for style in ([rest] if rest else emoji.STYLES)], replace(cfg, columns=columns))
    if cfg.path == "digits":
        return ParquetSource([digits.PATH], cfg)
    if scheme == "tfds":
        return TfdsSource(rest, cfg)
    if not cfg.path:
        raise InputError("no data given: set path to emoji or digits, a folder, a .csv, .tar or .parquet files, or tfds:NAME")
    files = _files(cfg.path)
    if len(files) == 1 and files[0].is_dir():
        folder = files[0]
        files = sorted(folder.glob("*.parquet")) or sorted(folder.glob("*.tar"))
        if not files:
            return ArraySource(folder, cfg) if any(folder.glob("*.npy")) else FolderSource(folder, cfg)
    kinds: dict[str, type[ParquetSource] | type[TarSource]] = {".parquet": ParquetSource, ".tar": TarSource}
    suffixes = {file.suffix for file in files}
    if len(suffixes) == 1 and (kind := kinds.get(files[0].suffix)):
        return kind(files, cfg)
    if len(files) == 1 and files[0].suffix in (".csv", ".tsv"):
        return CsvSource(files[0], cfg)
    raise InputError(f"{cfg.path}: {', '.join(sorted(suffixes))} is no format read here; give a folder, one .csv or .tsv, .tar or .parquet")


def _files(pattern: str) -> list[Path]:
    """The files a path, a glob or a numbered pattern names, in order. Each must exist."""
    if numbered := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = numbered.groups()
        numbers = range(int(first), int(last) + 1)
        return [f for n in numbers for f in _files(pattern[: numbered.start()] + str(n).zfill(len(first)) + pattern[numbered.end() :])]
    path = Path(pattern).expanduser()
    files = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    if not files:
        raise InputError(f"{pattern} does not exist{nearest(path.name, (p.name for p in path.parent.glob('*')))}")
    return files


def _require(names: Iterable[str], available: Sequence[str], where: object) -> None:
    for name in names:
        if name and name not in available:
            raise InputError(f"{where} has no column {name!r}{nearest(name, available)} (it has {', '.join(available)})")


def _value(value: Any) -> Any:
    """A carried column as the pipeline wants it: numbers as float32 and int32 arrays, text as it is."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list) and (not value or isinstance(value[0], str)):
        return value
    array = np.asarray(value)
    if array.dtype.kind in "iub":
        return array.astype(np.int32)
    return array.astype(np.float32) if array.dtype.kind == "f" else value


class FolderSource:
    """Pictures in a folder: a sub-folder per class, or all in one place with a .txt caption of the same name each (or none at all).

    With classes `text` is the class name, `label` its number in alphabetical order, and `classes` the names.
    """

    def __init__(self, root: Path, cfg: SourceConfig):
        if cfg.split:
            _require([cfg.split], sorted(p.name for p in root.iterdir() if p.is_dir()), root)
            root = root / cfg.split
        folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if folders and set(folders) <= set(SPLITS):
            raise InputError(f"{root} has the splits {', '.join(folders)}: say which one with split")
        flat = _pictures(root.iterdir(), root)
        if flat and folders:
            raise InputError(f"{root} has pictures beside sub-folders: keep one sub-folder per class, or all pictures in one folder")
        self.classes = tuple(folders)
        self._names = flat or [name for folder in folders for name in _pictures((root / folder).rglob("*"), root)]
        captions = [] if folders or not cfg.text else [name for name in flat if (root / name).with_suffix(".txt").exists()]
        if captions and len(captions) < len(flat):
            bare = min(set(flat) - set(captions))
            raise InputError(f"{root / bare} has no caption beside it, though others have: {Path(bare).with_suffix('.txt')} is missing")
        _require(cfg.columns, ["label"] if folders else [], root)
        self._root, self._captioned, self._cfg = root, bool(captions), cfg

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        file = self._root / self._names[index]
        record = Record(key=str(file))
        if self._cfg.image:
            record["image"] = _read(file)
        if self._captioned:
            try:
                record["text"] = _read(file.with_suffix(".txt")).decode().strip()
            except UnicodeDecodeError as error:
                raise InputError(f"{file.with_suffix('.txt')} is not UTF-8 text: {error}") from error
        elif self.classes:
            label = self.label(index)
            record |= {"label": np.int32(label)} | ({"text": self.classes[label]} if self._cfg.text else {})
        return record

    def label(self, index: int) -> int:
        """The class of a picture, without reading it."""
        return bisect.bisect_left(self.classes, self._names[index].split("/")[0])


def _pictures(paths: Iterable[Path], root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in paths if p.suffix[1:].lower() in PICTURES and not p.name.startswith("."))


class CsvSource:
    """A table of paths and captions with a header line, separated by commas or tabs. Rows are found again by byte offset."""

    def __init__(self, file: Path, cfg: SourceConfig):
        self._file, self._cfg = file, cfg
        try:
            with open(file, "rb") as data:
                self._tab = b"\t" in data.readline()
                data.seek(0)
                rows, starts = self._rows(data), []
                self._header = next(rows, [])
                wanted = [c for c in (cfg.image, cfg.text, *cfg.columns) if c]
                _require(wanted, self._header, file)
                self._kinds: dict[str, type] = dict.fromkeys(cfg.columns, int)
                start = data.tell()
                for row in rows:
                    if row and len(row) != len(self._header):
                        raise InputError(f"{file}: the row at byte {start} has {len(row)} cells, the header {len(self._header)}")
                    if row:
                        starts.append(start)
                        cells = dict(zip(self._header, row, strict=True))
                        self._kinds = {c: _narrowest(cells[c], kind) for c, kind in self._kinds.items()}
                    start = data.tell()
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{file} is not readable as a table: {error}") from error
        self._starts = np.array(starts, np.int64)

    def _rows(self, data: BinaryIO) -> Iterator[list[str]]:
        # readline rather than iteration, so that `tell` stays exact; a quoted cell may span lines.
        return csv.reader((line.decode("utf-8-sig") for line in iter(data.readline, b"")), delimiter="\t" if self._tab else ",")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        with open(self._file, "rb") as data:
            data.seek(int(self._starts[index]))
            cells = dict(zip(self._header, next(self._rows(data)), strict=True))
        cfg, record = self._cfg, Record(key=f"{self._file} row {index + 1}")
        record |= {c: _value(kind(cells[c])) for c, kind in self._kinds.items()}
        if cfg.text:
            record["text"] = cells[cfg.text]
        if cfg.image:
            file = self._file.parent / cells[cfg.image]
            record |= {"key": str(file), "image": _read(file)}
        return record


def _narrowest(cell: str, kind: type) -> type:
    """`kind`, or the next of int, float, str that can hold `cell` too: a column is numbers when every cell is one."""
    for wider in (int, float):
        if kind in (int, wider):
            try:
                wider(cell)
                return wider
            except ValueError:
                continue
    return str


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} is not readable: {error.strerror}") from error


class TarSource:
    """Tar shards in webdataset's form: members of one sample share a name up to the first dot (000012.jpg, 000012.txt, 000012.json).

    A .cls member becomes `label`.
    """

    def __init__(self, shards: Sequence[Path], cfg: SourceConfig):
        self._shards, self._cfg = [Shard(shard, index_shard(shard)) for shard in shards], cfg
        counts = []
        for shard in self._shards:
            table = shard.table()
            if not len(table):
                raise InputError(f"{shard.file} is empty: it has no member with a name like 000012.jpg")
            counts.append(len(table))
            if cfg.image:
                _complete(shard, table, "picture", PICTURES)
            if cfg.text:
                _complete(shard, table, "caption", ("txt", "json"))
        self._starts, self._length = _starts(counts), sum(counts)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        shard = self._shards[number]
        row = shard.table()[index - self._starts[number]]
        members = {e: row[e] for e in row.dtype.names[1:] if row[e]["size"] >= 0}
        cfg, record = self._cfg, Record(key=f"{shard.file}:{row[STEM].decode()}")
        if cfg.image:
            record["image"] = read_span(shard.file, next(members[e] for e in PICTURES if e in members))
        plain = cfg.text == SourceConfig.text and "txt" in members
        try:
            asks_json = cfg.columns or (cfg.text and not plain)
            fields = json.loads(read_span(shard.file, members["json"])) if asks_json and "json" in members else {}
            if plain:
                fields[cfg.text] = read_span(shard.file, members["txt"]).decode().strip()
            if "cls" in members:
                record["label"] = np.int32(read_span(shard.file, members["cls"]))
        except ValueError as error:
            raise InputError(f"{record['key']}: its .json, .txt or .cls is not readable: {error}") from error
        _require([cfg.text, *cfg.columns], list(fields), record["key"])
        return record | ({"text": fields[cfg.text]} if cfg.text else {}) | {c: _value(fields[c]) for c in cfg.columns}


@dataclass(frozen=True)
class Shard:
    """A tar and its index file."""

    file: Path
    index: Path

    def table(self) -> np.ndarray:
        return np.load(self.index, mmap_mode="r")


def _complete(shard: Shard, table: np.ndarray, what: str, extensions: Sequence[str]) -> None:
    """Every sample has a member with one of `extensions`."""
    fields = table.dtype.names or ()
    there = np.zeros(len(table), bool)
    for extension in set(extensions) & set(fields):
        there |= table[extension]["size"] >= 0
    if not there.any():
        raise InputError(f"{shard.file} has no {what}s ({', '.join(extensions)}), only {', '.join(fields[1:])}")
    if not there.all():
        raise InputError(f"{shard.file}: {(~there).sum()} samples have no {what}, the first is {table[STEM][there.argmin()].decode()}")


class ParquetSource:
    """Parquet files, memory-mapped. The unit of reading is the row group: write groups of a few hundred rows, or shuffling is slow.

    A picture is a binary column, or the struct of `bytes` and `path` that Hugging Face datasets write.
    """

    def __init__(self, files: Sequence[Path], cfg: SourceConfig):
        names = [c for c in (cfg.image, cfg.text, *cfg.columns) if c]
        groups: list[RowGroup] = []
        splits: list[str] = []
        for file in files:
            try:
                with parquet.ParquetFile(file, memory_map=True) as opened:
                    _require([*names, *(["split"] if cfg.split else [])], opened.schema_arrow.names, file)
                    counts = [opened.metadata.row_group(g).num_rows for g in range(opened.num_row_groups)]
                    if cfg.split:
                        splits += opened.read(columns=["split"]).column("split").to_pylist()
            except (OSError, pyarrow.ArrowException) as error:
                raise InputError(f"{file} is not readable as parquet: {error}") from error
            if not sum(counts):
                raise InputError(f"{file} is empty: it has no row")
            groups += [RowGroup(file, g, sum(counts[:g]), count) for g, count in enumerate(counts)]
        self._starts = _starts([group.rows for group in groups])
        self._rows: range | np.ndarray = range(sum(group.rows for group in groups))
        if cfg.split:
            if cfg.split not in splits:
                there = sorted(set(splits))
                raise InputError(f"{files[0]} has no split {cfg.split!r}{nearest(cfg.split, there)} (it has {', '.join(there)})")
            self._rows = np.flatnonzero(np.array(splits) == cfg.split)
        self._groups, self._decoded, self._cfg = groups, DecodedGroups(names), cfg

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = int(self._rows[index])
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        group, row = self._groups[number], row - int(self._starts[number])
        table = self._decoded.get(group)
        values = {c: table.column(c)[row].as_py() for c in table.column_names}
        cfg, record = self._cfg, Record(key=f"{group.file} row {group.first + row}")
        for name, value in values.items():
            if value is None:
                raise InputError(f"{record['key']}: the column {name!r} is empty")
        if cfg.image:
            image = values[cfg.image]
            record["image"] = image["bytes"] if isinstance(image, dict) else image
        if cfg.text:
            record["text"] = values[cfg.text]
        return record | {c: _value(values[c]) for c in cfg.columns}


@dataclass(frozen=True)
class RowGroup:
    """One row group of a parquet file: its number there, its first row in the file and how many rows it has."""

    file: Path
    number: int
    first: int
    rows: int


class DecodedGroups:
    """The row groups this process decoded last, up to ROW_GROUP_MEMORY bytes (one at least). Arrives empty in another process."""

    def __init__(self, columns: Sequence[str]):
        self._columns, self._lock = list(columns), threading.Lock()
        self._tables: OrderedDict[RowGroup, pyarrow.Table] = OrderedDict()

    def __reduce__(self) -> Any:
        return DecodedGroups, (self._columns,)

    def get(self, group: RowGroup) -> pyarrow.Table:
        with self._lock:
            if group not in self._tables:
                with parquet.ParquetFile(group.file, memory_map=True) as opened:
                    self._tables[group] = opened.read_row_group(group.number, columns=self._columns)
                while len(self._tables) > 1 and sum(t.nbytes for t in self._tables.values()) > ROW_GROUP_MEMORY:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(group)
            return self._tables[group]


class ArraySource:
    """A folder of .npy arrays of one length, a column each, memory-mapped: rows come as they are stored, in any shape and dtype."""

    def __init__(self, folder: Path, cfg: SourceConfig):
        if cfg.split:
            raise InputError(f"{folder} holds arrays, which have no splits; leave split empty")
        _require([cfg.image, cfg.text, *cfg.columns], sorted(file.stem for file in folder.glob("*.npy")), folder)
        self._folder, self._cfg = folder, cfg
        lengths = {name: len(self._array(name)) for name in (cfg.image, cfg.text, *cfg.columns) if name}
        if not lengths:
            raise InputError(f"{folder}: no array is asked for; name some with columns")
        if len(set(lengths.values())) > 1:
            raise InputError(f"{folder}: its arrays have different lengths ({', '.join(f'{n} {k:,}' for n, k in lengths.items())})")
        self._length = next(iter(lengths.values()))

    def _array(self, name: str) -> np.ndarray:
        file = self._folder / f"{name}.npy"
        try:
            return np.load(file, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise InputError(f"{file} is not readable as an array: {error}") from error

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        cfg, record = self._cfg, Record(key=f"{self._folder} row {index}")
        if cfg.image:
            record["image"] = np.array(self._array(cfg.image)[index])
        if cfg.text:
            record["text"] = str(self._array(cfg.text)[index])
        return record | {name: np.array(self._array(name)[index]) for name in cfg.columns}


class TfdsSource:
    """A data set that TensorFlow Datasets prepared in a random-access format. TensorFlow itself is not needed to read it.

    When `text` names a class feature the caption is the name of the class; a class feature `label` always comes along as a number.
    """

    def __init__(self, name: str, cfg: SourceConfig):
        try:
            import tensorflow_datasets as tfds  # an optional and heavy package, asked for by few
        except ImportError as error:
            raise InputError("reading tfds: data needs tensorflow-datasets; pip install tensorflow-datasets array-record") from error
        self._name, self._cfg = name, cfg
        name, _, folder = name.partition("@")
        prepare = f"prepare it with: tfds build {name.partition(':')[0]} --file_format=array_record"
        try:
            builder = tfds.builder(name, data_dir=folder or None)
        except (ValueError, AttributeError) as error:
            raise InputError(f"tfds:{name}: {str(error).splitlines()[0]} Name its folder with @DIR, or {prepare}") from error
        splits = list(builder.info.splits)
        if not splits:
            raise InputError(f"tfds:{name} is not prepared{f' in {folder}' if folder else ''}; {prepare}")
        if cfg.split.partition("[")[0] not in splits:
            raise InputError(f"tfds:{name} has no split {cfg.split!r}{nearest(cfg.split, splits)} (it has {', '.join(splits)})")
        features = builder.info.features
        _require([cfg.image, cfg.text, *cfg.columns], list(features), f"tfds:{name}")
        self._classes = {n: tuple(f.names) for n, f in features.items() if isinstance(f, tfds.features.ClassLabel) and f.names}
        self.classes = self._classes.get("label", ())
        try:
            decoders = {cfg.image: tfds.decode.SkipDecoding()} if cfg.image else None
            self._records = builder.as_data_source(split=cfg.split, decoders=decoders)
        except NotImplementedError as error:
            raise InputError(f"tfds:{name} is stored as {builder.info.file_format.value}, without random access; {prepare}") from error

    def __reduce__(self) -> Any:
        return TfdsSource, (self._name, self._cfg)  # reopened there: its readers hold file handles

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        values, cfg = self._records[index], self._cfg
        record = Record(key=f"tfds:{self._name} {cfg.split} {index}") | {c: _value(values[c]) for c in cfg.columns}
        if "label" in self._classes:
            record["label"] = np.int32(values["label"])
        if cfg.image:
            record["image"] = values[cfg.image]
        if cfg.text in self._classes:
            record["text"] = self._classes[cfg.text][int(values[cfg.text])]
        elif cfg.text:
            text = values[cfg.text]
            record["text"] = text.decode() if isinstance(text, bytes) else [t.decode() for t in text]
        return record


def _starts(counts: Sequence[int]) -> np.ndarray:
    """The index of the first sample of each part."""
    return np.cumsum([0, *counts[:-1]])
