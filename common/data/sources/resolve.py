"""Opens a source by path: selects the format."""

import glob
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from heirloom.common.data import digits, emoji, icons
from heirloom.common.data.sources.arrays import ArraySource
from heirloom.common.data.sources.folder import FolderSource
from heirloom.common.data.sources.parquet import ParquetSource
from heirloom.common.data.sources.record import Source, SourceConfig
from heirloom.common.data.sources.splits import is_split, of_split
from heirloom.common.data.sources.table import CsvSource, is_table, way_to_table
from heirloom.common.data.sources.tar import TarSource
from heirloom.common.data.sources.tfds import TfdsSource
from heirloom.common.errors import InputError, nearest
from heirloom.common.paths import Address, AnyPath, place

EMBEDDED = {"digits": digits.PATH, "icons": icons.PATH}


def open_source(cfg: SourceConfig) -> Source:
    """Opens the source of `cfg.path`.

    Raises InputError when the path does not exist, a file is unreadable or empty, or a column or split is missing.
    """
    for part in cfg.path.split("::"):
        place(part)
    source = _open(cfg)
    if len(source) == 0:
        raise InputError(f"{cfg.path} has no sample{f' in the split {cfg.split!r}' if cfg.split else ''}")
    return source


def shards_of(cfg: SourceConfig) -> list[AnyPath]:
    """Returns the tar shards of `cfg.path`, of a split if one is chosen; none where the data has another format.

    Raises InputError for no data, and for a split that it does not have.
    """
    scheme = cfg.path.partition(":")[0]
    if not cfg.path or scheme in ("emoji", "tfds") or cfg.path in EMBEDDED:
        return []
    files = _files(cfg.path)
    if len(files) == 1 and files[0].is_dir():
        folder = files[0]
        if _parquet(folder):
            return []
        if not (files := _visible(folder, "*.tar")):
            split = folder / cfg.split
            return _visible(split, "*.tar") if cfg.split and split.is_dir() else []
    shards = {file.suffix for file in files} == {".tar"}
    return of_split(files, cfg.split) if shards and cfg.split else files if shards else []


def _open(cfg: SourceConfig) -> Source:
    scheme, _, rest = cfg.path.partition(":")
    if scheme == "emoji":
        if rest and rest not in emoji.STYLES:
            raise InputError(f"no emoji style {rest!r}{nearest(rest, emoji.STYLES)} ({', '.join(emoji.STYLES)})")
        columns = tuple(dict.fromkeys(("concept", "tags", *cfg.columns)))
        paths = [emoji.path(style) for style in ([rest] if rest else emoji.STYLES)]
        return ParquetSource(paths, replace(cfg, columns=columns))
    if cfg.path in EMBEDDED:
        return ParquetSource([EMBEDDED[cfg.path]], cfg)
    if scheme == "tfds":
        return TfdsSource(rest, cfg)
    if not cfg.path:
        known = "emoji, digits, icons, a folder, .csv, .tar or .parquet, or tfds:NAME"
        raise InputError(f"no data given: set path to {known}")
    files = _files(cfg.path)
    if len(files) == 1 and files[0].is_dir():
        return _folder(files[0], cfg)
    kinds: dict[str, type[ParquetSource] | type[TarSource]] = {".parquet": ParquetSource, ".tar": TarSource}
    suffixes = {file.suffix for file in files}
    if len(suffixes) == 1 and (kind := kinds.get(files[0].suffix)):
        return kind(files, cfg)
    if len(files) == 1 and is_table(files[0], cfg):
        return CsvSource(files[0], cfg)
    found, way = ", ".join(sorted(suffixes)), way_to_table(files[0])
    needed = f"give a folder, one .csv or .tsv, .tar or .parquet{way and f'; {way}'}"
    raise InputError(f"{cfg.path}: {found} cannot be read; {needed}")


def _folder(folder: AnyPath, cfg: SourceConfig) -> Source:
    """Opens a folder of parquet (in it, or in data/ as at Hugging Face), tar shards, arrays, pictures or splits.

    Or a clone of Hugging Face's hub, with its parquet in the folder of a configuration, or in one for each split there.
    """
    if files := _parquet(folder):
        return ParquetSource(files, cfg)
    if files := _visible(folder, "*.tar"):
        return TarSource(files, cfg)
    if _visible(folder, "*.npy"):
        return ArraySource(folder, cfg)
    if (splits := (folder / "dataset_dict.json").is_file()) or _visible(folder, "*.arrow"):
        one = f"datasets.load_from_disk({str(folder)!r}){'[SPLIT]' if splits else ''}"
        what = "is what datasets.save_to_disk writes, which cannot be read"
        raise InputError(f"{folder} {what}: write {one}.to_parquet('data.parquet') in Python")
    if cfg.split and (part := folder / cfg.split).is_dir():
        return _folder(part, replace(cfg, split=""))
    try:
        return FolderSource(folder, cfg)
    except InputError:
        found = [*_visible(folder, "*/*.parquet"), *_visible(folder, "*/*/*.parquet")]
        names = sorted({file.relative_to(folder).parts[0] for file in found})
        names = [name for name in names if not name.startswith(".") and not is_split(name)]
        if not names:
            raise
    if len(names) > 1:
        one = f"give the folder of one, such as {folder / names[0]}"
        raise InputError(f"{folder} has the configurations {', '.join(names)}: {one}")
    return _folder(folder / names[0], cfg)


def _parquet(folder: AnyPath) -> list[Any]:
    """Returns the parquet files of a folder, except those of img2dataset, next to shards or folders of their names."""
    shards = {shard.stem for shard in _visible(folder, "*.tar")}
    files = [f for f in _visible(folder, "*.parquet") if f.stem not in shards and not (folder / f.stem).is_dir()]
    return files or _visible(folder, "data/*.parquet")


def _visible(folder: AnyPath, pattern: str) -> list[Any]:
    if isinstance(folder, Address):
        return folder.glob(pattern)
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))


def _files(pattern: str) -> list[Any]:
    """Returns the files of a path, a glob, a pattern with {first..last} or {a,b}, or several, joined by ::, in order.

    Raises InputError for a missing one.
    """
    parts, listed = pattern.split("::"), re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
    if len(parts) == 1 and listed and not place(pattern).exists():
        parts = [f"{pattern[: listed.start()]}{name}{pattern[listed.end() :]}" for name in listed[1].split(",")]
    if len(parts) > 1:
        return [file for part in parts for file in _files(part)]
    if numbered := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = numbered.groups()
        before, after = pattern[: numbered.start()], pattern[numbered.end() :]
        names = [f"{before}{n:0{len(first)}}{after}" for n in range(int(first), int(last) + 1)]
        if names and after.endswith(".tar") and not glob.has_magic(before + after) and "{" not in before + after:
            return [place(name) for name in names]  # opening them says which are missing
        with ThreadPoolExecutor() as pool:  # a look-up in a bucket takes long
            return [file for files in pool.map(_files, names) for file in files]
    path = place(pattern)
    if path.exists():
        return [path]
    if isinstance(path, Address):
        files: list[Any] = path.matches()
    else:
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    if not files:
        raise InputError(f"{pattern} does not exist{nearest(path.name, (p.name for p in path.parent.glob('*')))}")
    return files
