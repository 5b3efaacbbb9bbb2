"""Pictures in a folder, by class or with captions."""

import bisect
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from heapq import nsmallest
from pathlib import Path

import numpy as np

from heirloom.common.data.sources.record import Record, SourceConfig, caption_lines, captions, read, require
from heirloom.common.data.sources.splits import is_split
from heirloom.common.data.sources.table import way_to_table
from heirloom.common.errors import InputError, remark
from heirloom.common.paths import Address, AnyPath, Entry
from heirloom.common.reading import PICTURES

TABLES = (".txt", ".csv", ".tsv", ".token", ".json", ".jsonl")  # in which captions come
Found = os.DirEntry[str] | Entry


class FolderSource:
    """Pictures in a folder: a sub-folder per class, or one folder; with .txt captions of the same names or none.

    In sub-folders, `label` is the number of the class in alphabetical order, `classes` are the names, and `text` is the
    class name where there are no captions, which a remark says. `tables` are files that may hold captions, at most
    three. Symlinks are followed, hidden files and folders are not read, and a remark counts the files that were left
    out.
    """

    def __init__(self, root: AnyPath, cfg: SourceConfig):
        if cfg.split:
            require([cfg.split], sorted(e.name for e in _entries(root) if _is_open_folder(e)), root, "split")
            root = root / cfg.split
        folders = sorted(entry.name for entry in _entries(root) if _is_open_folder(entry))
        splits = [name for name in folders if is_split(name)]
        if splits and (len(splits) > 1 or splits == folders):
            raise InputError(f"{root} has the splits {', '.join(splits)}: say which one with split")
        left_out: Counter[str] = Counter()
        files = [entry for entry in _entries(root) if not _is_open_folder(entry)]
        texts: set[str] = set()  # files in which captions may come
        flat = _pictures(files, root, left_out, texts)
        if flat and folders:
            raise InputError(f"{root} has pictures and sub-folders: keep one sub-folder per class, or one folder")
        by_class = {name: _pictures(_walk(root / name, (_identity(root),)), root, left_out, texts) for name in folders}
        names = flat or [picture for pictures in by_class.values() for picture in pictures]
        captioned = [name for name in names if _caption(name) in texts]
        left_out[".txt"] -= len({_caption(name) for name in captioned})
        seen = _counts(left_out)
        if not names:
            found = f"only {seen}" if seen else "it is empty"
            needed = f"put pictures ({', '.join(PICTURES)}) there, or into a sub-folder per class"
            raise InputError(f"{root} has no picture, {found}: {needed}")
        if "label" in cfg.columns and not folders:
            raise InputError(f"{root} has no column 'label': its pictures need a sub-folder for each class")
        require(cfg.columns, ["label"] if folders else [], root)
        if captioned and cfg.text and len(captioned) < len(names):
            bare = min(set(names) - set(captioned))
            raise InputError(f"{root / bare} has no caption, though others have: {_caption(bare)} is missing")
        tables = texts - {_caption(name) for name in captioned}
        self.tables = tuple(nsmallest(3, tables, key=lambda name: (name.count("/"), name)))
        if cfg.text and folders and not captioned:
            _check_class_names(root, {name: len(pictures) for name, pictures in by_class.items()}, self.tables)
        if seen:
            remark(f"{root}: left out {seen}; pictures end in {', '.join(PICTURES)}")
        if empty := [name for name, pictures in by_class.items() if not pictures]:
            remark(f"{root}: {len(empty)} of its {len(folders)} classes have no picture ({', '.join(empty)[:80]})")
        self.classes = tuple(folders)
        self._names, self._root, self._captioned, self._cfg = names, root, bool(captioned and cfg.text), cfg

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        """Class names by column."""
        return {"label": self.classes} if self.classes else {}

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        file = self._root / self._names[index]
        record = Record(key=str(file))
        if self._cfg.image:
            record["image"] = read(file)
        if self.classes:
            label = self.label(index)
            record |= {"label": np.int32(label)} | ({"text": self.classes[label]} if self._cfg.text else {})
        if self._captioned:
            try:
                sidecar = file.with_suffix(".json")
                text = read(file.with_suffix(".txt"))
                about = partial(read, sidecar) if sidecar.is_file() else bytes
                record["text"] = captions(caption_lines(text, about, self._root), record["key"])
            except UnicodeDecodeError as error:
                raise InputError(f"{file.with_suffix('.txt')} is not UTF-8 text: {error}; save it as UTF-8") from error
        return record

    def key(self, index: int) -> str:
        """Returns the file of a picture."""
        return str(self._root / self._names[index])

    def label(self, index: int) -> int:
        """Returns the class of a picture without reading it."""
        return bisect.bisect_left(self.classes, self._names[index].split("/")[0])


def _check_class_names(root: AnyPath, counts: Mapping[str, int], tables: Sequence[str]) -> None:
    """Says that the names of sub-folders are the captions. counts: of pictures by sub-folder.

    Raises InputError where that is a mistake: one sub-folder has all pictures, or a table may hold their captions.
    """
    filled = [name for name, n in counts.items() if n]
    needed = "put a .txt next to each picture, or give a .csv or .tsv with a header that has their captions"
    way = way_to_table(root / tables[0]) if tables and tables[0].endswith(".jsonl") else ""
    beside = f", and {tables[0]}, which is not read{way and f' ({way})'}" if tables else ""
    if len(filled) == 1:
        raise InputError(f"{root}: one folder of pictures without captions{beside}: {needed}")
    shown = ", ".join(filled[:3]) + ("" if len(filled) < 4 else ", ...")
    if any(not name.endswith(".txt") for name in tables):
        them = f"{len(filled)} folders ({shown}) of pictures without captions{beside}"
        raise InputError(f"{root}: {them}: {needed}, or move the file away: then the names of the folders are captions")
    remark(f"{root}: captions are the names of its sub-folders ({shown}){beside}")


def _entries(folder: AnyPath | str) -> list[Found]:
    try:
        if isinstance(folder, Address):
            return list(folder.scandir())
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise InputError(f"{folder} is not readable: {error.strerror}") from error


def _is_open_folder(entry: Found) -> bool:
    """Returns whether an entry is a folder, or a symlink to one, that is not hidden."""
    if entry.name.startswith(".") or entry.name == "__MACOSX":
        return False
    if isinstance(entry, os.DirEntry) and entry.is_symlink():
        return os.path.isdir(entry.path)
    return entry.is_dir()


def _identity(folder: AnyPath | str) -> object:
    """Returns what two ways to a folder have in common."""
    if isinstance(folder, Address):
        return folder
    about = os.stat(folder)
    return about.st_dev, about.st_ino


def _walk(folder: AnyPath | str, above: tuple[object, ...]) -> Iterator[Found]:
    """Yields all files below a folder, and hidden folders as entries; follows no symlink to a folder of `above`."""
    identity = _identity(folder)
    if identity in above:
        return
    for entry in _entries(folder):
        if _is_open_folder(entry):
            yield from _walk(entry.path, (*above, identity))
        else:
            yield entry


def _caption(picture: str) -> str:
    return Path(picture).with_suffix(".txt").as_posix()


def _pictures(entries: Iterable[Found], root: AnyPath, left_out: Counter[str], texts: set[str]) -> list[str]:
    """Returns the pictures among `entries` by path from `root`, sorted; counts other files in `left_out`, and adds
    those that may hold captions to `texts`.
    """
    found = []
    for entry in entries:
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):
            left_out["hidden"] += 1
        # Reading a broken link raises an error that names it.
        elif suffix[1:] in PICTURES and (entry.is_symlink() or entry.is_file()):
            found.append(_below(entry.path, root))
        else:
            left_out[suffix or "without extension"] += 1
            if suffix in TABLES:
                texts.add(_below(entry.path, root))
    return sorted(found)


def _below(path: Address | str, root: AnyPath) -> str:
    """Returns a path from `root` on, with slashes."""
    if isinstance(path, Address):
        return path.key.removeprefix(f"{root}/".partition("://")[2])
    assert isinstance(root, Path)
    return Path(path).relative_to(root).as_posix()


def _counts(left_out: Counter[str]) -> str:
    return ", ".join(f"{n:,} {kind}" for kind, n in left_out.most_common() if n > 0)
