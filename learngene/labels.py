"""Class names of a classifier: labels.json of ours, `id2label` of transformers, `label_names` of timm."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from heirloom.common.checkpoint.family import Donor
from heirloom.common.data.labelled import LABELS, read_labels, write_labels
from heirloom.common.errors import InputError
from heirloom.common.files import read_json, write_json

CONFIG = "config.json"


def labels_of(donor: Donor) -> tuple[str, ...] | None:
    """Read a checkpoint's class names, in the order of its logits; None for none, or for LABEL_0, LABEL_1, ...

    Raises InputError when their number is not that of the classes, and when two fields of the checkpoint contradict
    each other.
    """
    file = donor.folder / CONFIG
    if not donor.cfg.classes:
        return None
    if donor.format in ("hf", "flax"):
        names = _of_transformers(read_json(file), file)
    elif donor.format == "timm":
        names = _of_timm(read_json(file), file)
    else:
        file, names = donor.folder / LABELS, read_labels(donor.folder)
    if names is None or (_numbered(enumerate(names)) and len(names) == donor.cfg.classes):
        return None
    if len(names) != donor.cfg.classes:
        given = f"{len(names)} class names, and the model {donor.cfg.classes} classes"
        raise InputError(f"{file} has {given}: give one for each, or none")
    return names


def _numbered(names: Iterable[tuple[Any, str]]) -> bool:
    """Whether the names are LABEL_0, LABEL_1, ..., which transformers writes for classes without names."""
    return all(re.fullmatch(rf"(?i)label_{i}", name) for i, name in names)


def _of_transformers(about: Mapping[str, Any], file: Path) -> tuple[str, ...] | None:
    """Read `id2label`, of which `label2id` must be the inverse; a name of two classes has the number of one of them."""
    given, numbers = about.get("id2label"), about.get("label2id")
    if "id2label" in about and not (isinstance(given, Mapping) and given):
        needed = "must be an object from numbers to names; remove it if there are no names"
        raise InputError(f"{file}: id2label is {given!r}, and {needed}")
    names = _listed(given, f"{file}: id2label")
    if numbers is None or numbers == {}:
        return names
    if isinstance(numbers, Mapping):  # many files have the numbers as text
        numbers = {name: int(i) if isinstance(i, str) and i.isdecimal() else i for name, i in numbers.items()}
    if not isinstance(numbers, Mapping) or not all(type(i) is int for i in numbers.values()):
        raise InputError(f"{file}: label2id must be an object from names to whole numbers; else remove it")
    known = set(enumerate(names or ()))
    odd = next((name for name, i in numbers.items() if (i, name) not in known), None)
    odd = odd or next(iter(set(names or ()) - set(numbers)), None)
    if odd is not None and not _numbered((i, name) for name, i in numbers.items()):
        raise InputError(f"{file}: id2label and label2id contradict each other about {odd!r}; correct or remove one")
    return names


def _of_timm(about: Mapping[str, Any], file: Path) -> tuple[str, ...] | None:
    """Read `label_names`, or `labels`, of the config or its pretrained_cfg."""
    levels = {"": about, "pretrained_cfg: ": about.get("pretrained_cfg") or {}}
    places = ((where, level, name) for where, level in levels.items() for name in ("label_names", "labels"))
    entries = [(where + name, level[name]) for where, level, name in places if level.get(name)]
    found = [(where, _listed(value, f"{file}: {where}")) for where, value in entries]
    for where, names in found:
        if names != found[0][1]:
            raise InputError(f"{file}: {found[0][0]} and {where} name the classes differently; remove the wrong one")
    return found[0][1] if found else None


def _listed(names: Any, where: str) -> tuple[str, ...] | None:
    """Names in order, from a list or from an object {number as text: name}."""
    if not names:
        return None
    if isinstance(names, Mapping):
        if set(names) != {str(i) for i in range(len(names))}:
            raise InputError(f"{where}: its numbers are not 0 to {len(names) - 1}; name every class once")
        names = [names[str(i)] for i in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(f"{where}: class names are texts that are not blank, one for each class")
    return tuple(names)


def carry_labels(donor: Donor, destination: Path, format: str) -> None:
    """Write a checkpoint's class names, if any, into a folder of another format that has its config.json."""
    if (names := labels_of(donor)) is not None:
        write_labels_as(names, destination, format)


def write_labels_as(names: Sequence[str], folder: Path, format: str) -> None:
    """Write class names in the form of a format; as our labels.json if the format has no field for them."""
    if format in ("hf", "flax"):
        numbers = {name: i for i, name in enumerate(names)}
        about = dict(id2label=dict(enumerate(names)), label2id=numbers)
        write_json(folder / CONFIG, read_json(folder / CONFIG) | about)
    elif format == "timm":
        write_json(folder / CONFIG, read_json(folder / CONFIG) | dict(label_names=list(names)))
    else:
        write_labels(folder, names)
