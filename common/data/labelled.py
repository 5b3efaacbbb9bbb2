"""Labelled pictures: the class of each as a number, whatever form its column has."""

from dataclasses import dataclass, replace
from typing import Any

from common.data.sources import Record, Source, SourceConfig, open_source
from common.errors import InputError


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
