"""Splits: in the names of folders and files, and in columns."""

import re
from collections.abc import Iterable, Sequence

from heirloom.common.errors import InputError, nearest, remark
from heirloom.common.paths import AnyPath

SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev")


def is_split(name: str) -> bool:
    """Whether a folder or a part of a file name is that of a split: train, Test, val2017 (COCO)."""
    return name.casefold() in SPLITS or bool(re.fullmatch(r"(?i)(train|val|test|unlabeled)\d{4}", name))


def split_of(file: AnyPath) -> str | None:
    """Returns the split in a file's name: cc3m-train-0000.tar, Test_0.parquet, val2017.tar; in lower case.

    In Hugging Face's train_sft-00000-of-00001.parquet the split is what stands before the numbers, whatever its name,
    without the name of the data before it (x-train-00000-of-00002.parquet).
    """
    numbered = re.fullmatch(r"(.+?)[-_]\d+-of-\d+(-\w+)?", file.stem)
    whole = numbered[1] if numbered else file.stem
    first = next((part.start() for part in re.finditer(r"[^-_.]+", whole) if is_split(part[0])), None)
    if first is None:
        return whole.casefold() if numbered else None
    return (whole[first:] if numbered else re.split(r"[-_.]", whole[first:])[0]).casefold()


def of_split(files: Sequence[AnyPath], split: str) -> list[AnyPath]:
    """Returns the files of a split by their names; all files where no split is chosen.

    Raises InputError for a split that no name has, and for names of several splits where none is chosen.
    """
    names = [split_of(file) for file in files]
    known = sorted({name for name in names if name})
    where = files[0] if len(files) == 1 else files[0].parent
    if split and split.casefold() not in known:
        if known:
            raise InputError(f"{where} has no split {split!r}{nearest(split, known)} (it has {', '.join(known)})")
        column = "no column 'split', and " if files[0].suffix == ".parquet" else ""
        needed = f"{column}no file named like {split}-00000-of-00001{files[0].suffix}; leave split empty"
        raise InputError(f"{where} has no splits: {needed}")
    if split:
        return [file for file, name in zip(files, names, strict=True) if name == split.casefold()]
    if len(known) > 1:
        raise InputError(f"{where} has the splits {', '.join(known)}: say which one with split")
    if known and None in names:
        other = f"{files[names.index(None)].name} and others without a split in their names"
        remark(f"{where}: files of the split {known[0]} are read together with {other}; name one with split")
    return list(files)


def all_splits(found: Iterable[str], file: AnyPath) -> str:
    """Returns a remark for data that is read whole though a column has several splits, else an empty string."""
    known = sorted(found)
    names = f"{file}: its column 'split' has {', '.join(known)}, and all of it is read"
    return f"{names}; name one with split" if len(known) > 1 else ""
