"""Labelled pictures: the class of each as a number, whatever form its column has."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.data.sources import Record, Source, SourceConfig, open_source
from common.errors import InputError

LABELS = "labels.json"


@dataclass(frozen=True)
class Named:
    """A source whose class names became numbers; `classes` are the names, in alphabetical order."""

    source: Source
    column: str
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        return record | {"label": self.classes.index(record[self.column])}


def open_labelled(cfg: SourceConfig, label: str, classes: int | None = None) -> Source:
    """Records with `label`, a number from 0, out of a column of numbers or of names.

    Raises InputError where the data has no such column, or not as many `classes` as the model.
    """
    cfg = replace(cfg, text="", columns=tuple(dict.fromkeys((*cfg.columns, label))))
    source = open_source(cfg)
    first: Any = source[0].get(label)
    if first is None:
        raise InputError(f"{cfg.path} has no labels: name their column with label")
    if isinstance(first, str):
        names = open_source(replace(cfg, image=""))
        source = Named(source, label, tuple(sorted({names[i][label] for i in range(len(names))})))
    known = getattr(source, "classes", ())
    if classes and known and len(known) != classes:
        raise InputError(f"{cfg.path} has {len(known)} classes ({', '.join(known)[:80]}), the model {classes}: set student.classes")
    return source


def read_labels(folder: Path) -> tuple[str, ...] | None:
    """The class names of a weights folder, in the order of its logits, out of its labels.json; None where it has none.

    Raises InputError when the file is no JSON list of names.
    """
    file = folder / LABELS
    if not file.is_file():
        return None
    try:
        return _checked(json.loads(file.read_text(encoding="utf-8")), file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({error})") from error


def write_labels(folder: Path, names: Sequence[str]) -> None:
    """Write the class names of a model, in the order of its logits, as labels.json. Raises InputError unless they are names.

    Two classes may have the same name: of ImageNet's, a bird and a machine are both a crane.
    """
    file = folder / LABELS
    file.write_text(json.dumps(_checked(list(names), file), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _checked(names: Any, file: Path) -> tuple[str, ...]:
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(f"{file}: class names are a list of strings that are not blank, one for each class")
    return tuple(names)
