"""Class names that travel with a classifier: labels.json of ours, `id2label` of transformers, `label_names` of timm."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.checkpoint.convert import Donor
from common.checkpoint.weights import read_json, write_json
from common.data.labelled import LABELS, read_labels, write_labels
from common.errors import InputError

CONFIG = "config.json"


def labels_of(donor: Donor) -> tuple[str, ...] | None:
    """The class names of a checkpoint of any format, in the order of its logits; None where it has none, or LABEL_0, LABEL_1, ...

    Raises InputError when they are not as many as the classes.
    """
    file = donor.folder / CONFIG
    if donor.format == "hf":
        names = _listed(read_json(file).get("id2label"), f"{file}: id2label")
    elif donor.format == "timm":
        about = read_json(file)
        pretrained = about.get("pretrained_cfg") or {}
        found = (level.get(name) for level in (about, pretrained) for name in ("label_names", "labels"))
        names = _listed(next((value for value in found if value), None), f"{file}: label_names")
    else:
        file, names = donor.folder / LABELS, read_labels(donor.folder)
    if names is None or all(re.fullmatch(rf"(?i)label_{i}", name) for i, name in enumerate(names)):
        return None
    if len(names) != donor.cfg.classes:
        raise InputError(f"{file} has {len(names)} class names, and the model {donor.cfg.classes} classes: give one for each, or none")
    return names


def _listed(names: Any, where: str) -> tuple[str, ...] | None:
    """A list of names, or an object from their numbers, which JSON writes as texts, in the order of the numbers."""
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
    """Write a checkpoint's class names, where it has any, into a folder of another format, whose config.json is there already."""
    if (names := labels_of(donor)) is not None:
        write_labels_as(names, destination, format)


def write_labels_as(names: Sequence[str], folder: Path, format: str) -> None:
    """Write class names as a format has them; next to a file that has no place for them, as ours."""
    if format == "hf":
        numbers = {name: i for i, name in enumerate(names)}
        write_json(folder / CONFIG, read_json(folder / CONFIG) | dict(id2label=dict(enumerate(names)), label2id=numbers))
    elif format == "timm":
        write_json(folder / CONFIG, read_json(folder / CONFIG) | dict(label_names=list(names)))
    else:
        write_labels(folder, names)
