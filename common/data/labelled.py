"""Labelled pictures: class numbers from 0, from a column of numbers or names, and the class names of a model."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from heirloom.common.data.bad import WrongData, first_good
from heirloom.common.data.class_names import Names, as_words, match, natural
from heirloom.common.data.imagenet import is_class_list
from heirloom.common.data.sources import Record, Source, SourceConfig, open_source
from heirloom.common.data.sources.record import key_of
from heirloom.common.errors import InputError, nearest, remark
from heirloom.common.paths import AnyPath

LABELS = "labels.json"
KINDS = "labels must be all whole numbers from 0, or all names"
SHOWN = 80  # characters of a list of classes in a message


@dataclass(frozen=True)
class Labelled:
    """A source whose records have `label`, int32 from 0 to below `count`.

    classes: names in the order of the labels, empty where unknown. numbers: the label of each value of the column;
    None: the column has the labels.
    """

    source: Source
    column: str
    classes: tuple[str, ...]
    numbers: Mapping[Any, int] | None
    count: int | None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        return record | {"label": np.int32(self._number(record))}

    def key(self, index: int) -> str:
        """Returns the name of a record without reading it."""
        return key_of(self.source, index)

    def _number(self, record: Record) -> int:
        """Returns the label of a record. Raises InputError naming the record when it is not a class, WrongData for
        a number beyond the classes.
        """
        label, where = record.get(self.column), f"{record['key']}: its {self.column}"
        given = label if isinstance(label, str) else _whole(label)
        number = given if self.numbers is None else self.numbers.get(given)
        if number is None and self.numbers is not None and given is not None:
            raise InputError(f"{where} is {given!r}, which is not one of the classes ({_shown(self.numbers)})")
        if not isinstance(number, int):
            raise InputError(f"{where} is {str(label)[:40]!r}; {KINDS}")
        if number < 0 or (self.count is not None and number >= self.count):
            known = "start at 0" if self.count is None else f"are 0 to {self.count - 1}"
            fault = InputError if number < 0 else WrongData  # -1 marks a picture without label; 1..N shifts all classes
            raise fault(f"{where} is {number}, the classes {known}; number the labels from 0")
        return number


def open_labelled(cfg: SourceConfig, label: str, classes: int | None = None, names: Names | None = None) -> Labelled:
    """Opens a source whose records have `label`, the number of a class of the model, from a column of numbers or names.

    classes: number of classes of the model. names: their names. Class names of the data (of folders, a column, or a
    list that comes with the data) are matched to these, see `match`. If they do not match but are as many, they are
    numbered in the order of the data, which is alphabetical for folders and columns, and a remark says so. Without
    `names`, or with names like LABEL_0, that order is used.

    Raises InputError where the data has no such column, or class names that the model does not have. A label that is
    not a class is refused when its record is read.
    """
    cfg = replace(cfg, text="", columns=tuple(dict.fromkeys((*cfg.columns, label))))
    source = open_source(cfg)
    first: Any = first_good(source, lambda record: record.get(label))
    if first is None:
        raise InputError(f"{cfg.path} has no labels; set label to their column")
    names = _real_names(names, classes)
    known = getattr(source, "class_names", {}).get(label, ())
    if isinstance(first, str):
        used = sorted(set(_column(cfg, label)))
        numerals = not known and all(re.fullmatch(r"0|[1-9]\d*", name) for name in used)
        if numerals and (names is None or set(match(used, names)) == {None}):
            numbers = {name: int(name) for name in used}  # numbers, stored as text
            return Labelled(source=source, column=label, classes=(), numbers=numbers, count=classes)
        known = known or used
        if doubled := [name for name, n in Counter(known).items() if n > 1]:
            raise InputError(f"{cfg.path} has two classes called {doubled[0]!r}, an ambiguous label; use numbers")
    if not known:
        return Labelled(source=source, column=label, classes=(), numbers=None, count=classes)
    called = tuple(known) if names is None else tuple(name or "" for name in names)
    keys = known if isinstance(first, str) else range(len(known))
    by_value = dict(zip(keys, _assign(known, classes, names, cfg.path), strict=True))
    return Labelled(source=source, column=label, classes=called, numbers=by_value, count=classes or len(known))


def _column(cfg: SourceConfig, label: str) -> Iterator[str]:
    """Yields the names in a column without reading pictures."""
    plain = open_source(replace(cfg, image=""))
    for record in (plain[i] for i in range(len(plain))):
        name = record.get(label)
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"{record['key']}: its {label} is {str(name)[:40]!r}; {KINDS}")
        yield name


def _real_names(names: Names | None, classes: int | None) -> Names | None:
    """Returns the names unless they are placeholders like LABEL_0, LABEL_1, ..."""
    anonymous = r"(?i)(label|class)[ _-]?{}"
    if names is None or all(name is None or re.fullmatch(anonymous.format(i), name) for i, name in enumerate(names)):
        return None
    if classes is not None and len(names) != classes:
        given = f"{len(names)} class names ({_shown(names)})"
        raise InputError(f"there are {given} for the {classes} classes of the model; give one for each")
    return names


def _assign(known: Sequence[str], classes: int | None, names: Names | None, path: str) -> list[int]:
    """Returns the model's number of each class of the data."""
    in_order = list(range(len(known)))
    if names is None:
        if classes is not None and len(known) != classes:
            given = f"{len(known)} classes ({_shown(known)}), the model {classes}"
            expand = "heirloom expand --classes; in a recipe the field classes of its student"
            needed = f"give data with the model's classes, or a model with {len(known)} ({expand})"
            raise InputError(f"{path} has {given}: {needed}")
        of_timm = sorted(in_order, key=lambda i: natural(known[i]))
        moved = [i for i, j in enumerate(of_timm) if i != j]
        # Without a model's classes no number has a meaning; in another order, the data has one of its own.
        if moved and classes is not None and list(known) == sorted(known):
            first = f"{known[moved[0]]!r} is class {moved[0]}"
            theirs = f"{known[of_timm[moved[0]]]!r}, as timm sorts numbers by value and ignores capitals"
            remark(f"{path}: its classes are numbered in alphabetical order, so {first}; for timm that is {theirs}")
        return in_order
    if list(known) == list(names):  # two classes may have the same name, which matches neither
        return in_order
    if is_class_list(known) and is_class_list([name or "" for name in names]):  # some synonyms are of two classes
        return in_order
    found = match(known, names)
    if None in found and None not in (plain := match(as_words(known), names)):  # 002.Laysan_Albatross, of all
        found = plain
    numbers = [number for number in found if number is not None]
    if twice := [number for number, n in Counter(numbers).items() if n > 1]:
        both = [name for name, number in zip(known, found, strict=True) if number == twice[0]]
        twins = f"{both[0]!r} and {both[1]!r} both match {names[twice[0]]!r}"
        raise InputError(f"{path}: its classes {twins}; join them, or rename one")
    if len(numbers) == len(known):
        return numbers
    if not numbers and all(name.isdecimal() for name in known):  # numbers that name folders: 10 comes after 9
        values = [int(name) for name in known]
        if len(set(values)) < len(values) or max(values) >= len(names):
            given = f"its classes are called {_shown(known)}, and the model has {len(names)}"
            raise InputError(f"{path}: {given}: number them from 0 to {len(names) - 1}, or name them")
        return values
    unknown = known[found.index(None)]
    if len(known) != len(names) or any(number not in (None, i) for i, number in enumerate(found)):
        near = nearest(unknown, [name for name in names if name])
        matched = f"exactly one of the {len(names)} known ({_shown(names)}){near}"
        raise InputError(f"{path}: its class {unknown!r} does not match {matched}")
    unlike = f"class names do not match ({unknown!r} is not one of {_shown(names)})"
    order = f"both have {len(names)} classes, so the data's order is used ({_shown(known)})"
    remark(f"{path}: {unlike}, but {order}")
    return in_order


def _whole(label: Any) -> int | None:
    """Returns a label that is one whole number as int, else None."""
    array = np.asarray(label)
    return int(array) if array.ndim == 0 and (array.dtype.kind in "iub" or type(label) is int) else None


def _shown(names: Iterable[Any]) -> str:
    text = ", ".join(str(name) for name in names)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


def read_labels(folder: AnyPath) -> tuple[str, ...] | None:
    """Reads the class names of a folder of weights or latents from labels.json, by number; None without the file.

    Raises InputError when the file is not a JSON list of names.
    """
    file = folder / LABELS
    if not file.is_file():
        return None
    try:
        return _checked(json.loads(file.read_text(encoding="utf-8")), file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({error})") from error


def write_labels(folder: Path, names: Sequence[str]) -> None:
    """Writes class names, in the order of the logits, as labels.json. Raises InputError unless they are names.

    Two classes may have the same name: ImageNet has two classes "crane", a bird and a machine.
    """
    file = folder / LABELS
    file.write_text(json.dumps(_checked(list(names), file), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _checked(names: Any, file: AnyPath) -> tuple[str, ...]:
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(f"{file}: class names must be a list of strings that are not blank, one for each class")
    return tuple(names)
