"""Shared by all formats: the config, the record, and checks of columns, captions and files."""

import ast
import io
import json
import tokenize
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from heirloom.common.data.lines import split_lines
from heirloom.common.errors import InputError, nearest, remark
from heirloom.common.paths import AnyPath, join
from heirloom.common.reading import retried

# Other names of these columns in published data.
USUAL = {
    "image": ("file_name", "filepath", "filename", "image_path", "path", "file", "img", "jpg", "png"),
    "text": ("text", "captions", "title", "sentence", "sentences", "raw", "alt_text", "description", "prompt"),
}
SHOWN = 40  # names in an error
LONGEST = 2**12  # characters of a path
Record = dict[str, Any]


@dataclass(frozen=True)
class SourceConfig:
    """Which data to read."""

    path: str = ""
    """emoji | emoji:noto | emoji:fluent | emoji:twemoji | digits | icons (embedded), a folder of pictures, a .csv or
    .tsv, .tar or .parquet files (a file, a folder, a glob, or numbered as in shards/{00000..00127}.tar), a folder of
    .npy arrays, or tfds:name[:version][@data_dir]; files and folders may be in a bucket (gs://, s3://)
    """
    split: str = ""
    """train, test, ... for data that has splits: a column `split`, TFDS, sub-folders train/ test/, a part of the names
    of .parquet and .tar files (test-00000-of-00001.parquet, cc3m-train-0000.tar)
    """
    image: str = "image"
    """column of the picture; in a .csv its path, relative to the file; empty: leave pictures out"""
    text: str = "caption"
    """column of the caption; in tar shards a key of the .json, where caption means the .txt member if there is one (a
    caption a line); empty: leave it out
    """
    columns: tuple[str, ...] = ()
    """further columns of the records, such as tags, concept, label, or embeddings (numbers become float32 and int32
    arrays)
    """


class Source(Protocol):
    """Random access to records (grain's RandomAccessDataSource).

    It may have `key(index)`, which names a record without reading it.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record: ...


def key_of(source: Source, index: int) -> str:
    """Returns the name of a record for messages, without reading it: of `source.key(index)` where there is one."""
    return source.key(index) if hasattr(source, "key") else f"record {index}"


def require(names: Iterable[str], available: Sequence[str], where: object, kind: str = "column") -> None:
    """Raises InputError for the first of `names` that is not among `available`. kind: what the names are of."""
    for name in names:
        if name and name not in available:
            more = f", ... ({len(available):,} in all)" if len(available) > SHOWN else ""
            known = f"it has {', '.join(available[:SHOWN])}{more}" if available else "it has none"
            raise InputError(f"{where} has no {kind} {name!r}{nearest(name, available)} ({known})")


def require_columns(cfg: SourceConfig, available: Sequence[str], where: object) -> None:
    """Raises InputError for the first of the config's columns that the data does not have; says the flag to set."""
    for flag, name in (("image", cfg.image), ("text", cfg.text)):
        try:
            require([name], available, where)
        except InputError as error:
            usual = next((other for other in USUAL[flag] if other in available), "NAME")
            flags = f"--data.{flag} {usual} (heirloom eval: --{flag} {usual})"
            raise InputError(f"{error}; name it with {flags}") from error
    require(cfg.columns, available, where)


def value(cell: object, key: str, column: str) -> object:
    """Converts a cell of a further column: numbers to float32 and int32 arrays, bytes to text; text is unchanged.

    Raises InputError for a whole number that does not fit int32, bytes that are not text, and rows of other lengths.
    """
    if isinstance(cell, bytes):
        try:
            return cell.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{key}: {column!r} is not UTF-8 text: {error}") from error
    if isinstance(cell, list) and (not cell or isinstance(cell[0], str)):
        return cell
    try:
        array = np.asarray(cell)
    except ValueError as error:
        needed = "rows of different lengths make no array; leave the column out, or store it as text"
        raise InputError(f"{key}: {column!r} is {str(cell)[:40]}: {needed}") from error
    if array.dtype.kind in "iub":
        whole = array.astype(np.int32)
        if not np.array_equal(whole, array):
            value = str(cell)[:40]
            fits = "which does not fit 32 bits; store it as text or as a smaller number"
            raise InputError(f"{key}: {column!r} is {value}, {fits}")
        return whole
    return array.astype(np.float32) if array.dtype.kind == "f" else cell


def captions(text: object, key: str) -> str | list[str]:
    """Returns `text` if it is a string or a list of strings. An empty string is a caption, as in CLIP_benchmark.

    A string that holds a list, as a table of Karpathy's splits has it, becomes that list. Raises InputError naming the
    record for anything else: null, a number, an empty list, a list with null, half a list in a string.
    """
    if isinstance(text, str):
        if (several := _list_in(text.strip(), key)) is None:
            return text
        if several:
            remark("captions that are lists written as text, in brackets and quotes, are read as several captions each")
        text = several
    if isinstance(text, list) and text and all(isinstance(caption, str) for caption in text):
        return text
    needed = "a caption must be a string, or a list of strings that is not empty"
    raise InputError(f"{key}: its caption is {str(text)[:60]}; {needed}")


def _list_in(text: str, key: str) -> list[str] | None:
    """Parses a list of strings in the notation of JSON or Python; returns None for other text.

    Raises InputError for what begins and ends as such a list and is none, such as numpy's, which has no commas.
    """
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for parse in (json.loads, _python):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = parse(text)
            if isinstance(found, list) and all(isinstance(caption, str) for caption in found):
                return found
    if text[1:].lstrip()[:1] in ("'", '"'):
        needed = "write a list of strings in JSON, or a caption without brackets and quotes around it"
        raise InputError(f"{key}: the caption looks like a list but cannot be parsed ({text[:40]} ...): {needed}")
    return None


def _python(text: str) -> object:
    """Evaluates a literal of Python. Raises SyntaxError for strings without a comma, which Python would join."""
    found = ast.literal_eval(text)
    strings = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.STRING]
    if len(strings) != len(found):
        raise SyntaxError("strings without a comma")
    return found


def tags_of(record: Record) -> list[str]:
    """Returns the tags of a record. Raises InputError for a record without, and for anything but a list of strings."""
    tags, key = record.get("tags"), record["key"]
    if tags is None:
        raise InputError(f"{key} has no tags to append; add tags to the columns, or set the probability to 0")
    if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        return tags
    raise InputError(f"{key}: its tags are {str(tags)[:40]!r}; store a list of strings (.parquet, or .json in shards)")


def caption_lines(data: bytes, sidecar: Callable[[], bytes], where: AnyPath) -> str | list[str]:
    """Reads the captions of a .txt, one a line without blank lines; one line, or none, is a single caption.

    CLIP_benchmark writes captions this way. img2dataset writes one caption, which may have line breaks, and the same
    string into the .json: several lines are compared with it. sidecar: reads that .json, empty where there is none.
    where: the data, for a remark. An empty file is the empty caption. Raises UnicodeDecodeError for text that is not
    UTF-8.
    """
    lines = _lines(data.decode("utf-8-sig"))
    if len(lines) < 2:
        return "".join(lines)
    try:
        about = json.loads(sidecar() or "null")
    except (ValueError, RecursionError):
        about = None
    whole = about.get("caption") if isinstance(about, dict) else None
    if isinstance(whole, str) and _lines(whole) == lines:
        return whole
    remark(f"{where}: each line of a .txt is one caption of its picture, as CLIP_benchmark writes them")
    return lines


def _lines(text: str) -> list[str]:
    return [line.strip() for line in split_lines(text) if line.strip()]


def picture_file(folder: AnyPath, name: str, key: str) -> AnyPath:
    """Returns the file of a picture that a table in `folder` names. Raises InputError for what cannot be a path."""
    if name.startswith(("http://", "https://")):
        needed = "download the pictures first, with img2dataset for example"
        raise InputError(f"{key}: its picture is on the web ({name[:60]}): {needed}")
    if name.startswith("data:") or len(name) > LONGEST:
        raise InputError(f"{key}: its picture is text ({name[:20]} ...), not a path: store encoded bytes in a .parquet")
    file = join(folder, name)
    if "\\" in name and not file.exists() and (other := join(folder, name.replace("\\", "/"))).exists():
        remark(f"{folder}: its table has paths as Windows writes them; \\ is read as /")
        return other
    return file


def read(file: AnyPath) -> bytes:
    """Reads a file. Raises InputError when it is not readable."""
    try:
        return retried(file.read_bytes, file)
    except ValueError as error:  # a name with a NUL in it
        raise InputError(f"{file} is not readable: {error}") from error


def starts(counts: Sequence[int]) -> np.ndarray:
    """Returns the index of the first sample of each part."""
    return np.cumsum([0, *counts[:-1]])
