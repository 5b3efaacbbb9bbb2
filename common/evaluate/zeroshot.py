"""Zero-shot classification: class vectors are means of text features of the class name in templates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from heirloom.common.data.lines import read_lines
from heirloom.common.errors import InputError
from heirloom.common.evaluate.features import finite

TEMPLATES = ("a photo of a {}.",)


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 accuracy: share of examples whose class is first, or among the first five."""

    top1: float
    top5: float


def read_templates(file: Path) -> tuple[str, ...]:
    """Reads templates, one a line. Raises InputError as `check_templates` does."""
    return check_templates(read_lines(file), f"{file}, line")


def check_templates(texts: Sequence[str], where: str) -> tuple[str, ...]:
    """Returns templates with {} for the name of the class; {c}, as CLIP_benchmark writes it, is replaced.

    Raises InputError with `where` and the number for anything else: no place for the name, two places, %s, {0}, other
    braces.
    """
    templates = []
    for number, text in enumerate(texts, 1):
        template = text.replace("{c}", "{}")
        if template.count("{}") != 1 or "{" in template.replace("{}", "") or "}" in template.replace("{}", ""):
            what = "needs one {} for the name of the class, and no other braces"
            raise InputError(f"{where} {number}: {text[:80]!r} {what}")
        templates.append(template)
    return tuple(templates)


def classifier(names: Sequence[str], templates: Sequence[str], encode: Callable[[list[str]], np.ndarray]) -> np.ndarray:
    """Returns a unit vector per class, [classes, joint] f32: the renormalised mean over templates of text features.

    encode: captions -> unit-norm features [captions, joint]. Raises InputError for features that are NaN or infinite.
    """
    features = np.stack([encode([template.replace("{}", name) for template in templates]).mean(0) for name in names])
    finite(features, "the features of the class names")
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def accuracy(image: np.ndarray, classes: np.ndarray, label: np.ndarray) -> Accuracy:
    """Computes top-1 and top-5 accuracy. A tie counts against the right class.

    image: [images, joint], classes: [classes, joint], label: [images] int. Raises InputError for labels without class,
    and for features that are NaN or infinite.
    """
    finite(image, "the features of the pictures")
    finite(classes, "the features of the classes")
    if label.dtype.kind not in "iu" or label.min() < 0:
        raise InputError(f"labels must be whole numbers from 0, one of the data is {label.min()} ({label.dtype})")
    if label.max() >= len(classes):
        raise InputError(f"the data has a label {label.max()}, and {len(classes)} class names: give one per label")
    similarity = image @ classes.T
    right = np.take_along_axis(similarity, label[:, None], axis=1)
    rank = (similarity >= right).sum(1) - 1
    return Accuracy(float(np.mean(rank < 1)), float(np.mean(rank < 5)))
