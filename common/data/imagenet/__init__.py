"""ImageNet-1k for zero-shot CLIPs: class names and the 80 templates (OpenAI CLIP, MIT; see LICENSE in this folder)."""

from collections.abc import Sequence
from pathlib import Path

_HERE = Path(__file__).parent
_LINES = (_HERE / "classes.tsv").read_text().splitlines()
CLASSES: tuple[tuple[str, str], ...] = tuple((i, name) for i, name in (line.split("\t") for line in _LINES))
"""(WordNet identifier, name) of the 1,000 classes, in the order of their labels."""

TEMPLATES: tuple[str, ...] = tuple((_HERE / "templates.txt").read_text().splitlines())
"""80 templates with {} for the name."""


def is_class_list(names: Sequence[str]) -> bool:
    """Whether names are those of the 1,000 classes in their order, as WordNet has them ("tench, Tinca tinca"): the
    first synonym of most is the name here.
    """
    same = (a.split(",")[0].casefold() == b.casefold() for a, (_, b) in zip(names, CLASSES, strict=False))
    return len(names) == len(CLASSES) and 2 * sum(same) > len(CLASSES)
