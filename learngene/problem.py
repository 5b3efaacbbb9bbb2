"""What the outputs of a classifier are: logits of one class of several, or something that has no softmax.

`problem_type` of transformers' config.json says it; folders of formats without such a field keep it in problem.json.
"""

from pathlib import Path

from heirloom.common.checkpoint.family import Donor
from heirloom.common.errors import InputError, remark
from heirloom.common.files import read_json, write_json

CONFIG, FILE, FIELD = "config.json", "problem.json", "problem_type"
ONE_CLASS = "single_label_classification"
OTHERS = {
    "multi_label_classification": "a picture may have several classes, and each output has a sigmoid of its own",
    "regression": "the outputs are numbers, not logits",
}
_WITH_FIELD = ("hf", "flax", "timm")


def problem_of(donor: Donor) -> str:
    """Read the kind of a checkpoint's outputs, one of OTHERS; "" where a picture has one class of several.

    A single output is a regression, as for transformers. Raises InputError for another kind.
    """
    kind = _said(donor)
    return "regression" if not kind and donor.cfg.classes == 1 else kind


def _said(donor: Donor) -> str:
    file = donor.folder / (CONFIG if donor.format in _WITH_FIELD else FILE)
    kind = read_json(file).get(FIELD) if file.is_file() else None
    if kind not in (None, ONE_CLASS, *OTHERS):
        raise InputError(f"{file}: {FIELD} is {kind!r}; only {', '.join((ONE_CLASS, *OTHERS))} can be read")
    return kind if kind in OTHERS else ""


def said_of(kind: str) -> str:
    """A line for the user about outputs of a kind; "" for one class of several."""
    return f"{FIELD} is {kind!r}: {OTHERS[kind]}" if kind else ""


def check_one_class(kind: str, model: str, purpose: str) -> None:
    """Raise InputError where a picture does not have one class of several. purpose: such as "accuracy needs"."""
    if kind:
        needed = f"{purpose} one class of several for each picture"
        raise InputError(f"{model}: {said_of(kind)}; {needed}: take another model, or use its outputs as they are")


def carry_problem(donor: Donor, destination: Path, format: str) -> None:
    """Write the kind of a checkpoint's outputs into a folder of another format, and say it."""
    kind = _said(donor)
    write_problem(kind, destination, format)
    remark(said_of(kind))


def write_problem(kind: str, folder: Path, format: str) -> None:
    """Write the kind of a model's outputs, if a picture does not have one class of several, in the form of a format."""
    if kind:
        file = folder / (CONFIG if format in _WITH_FIELD else FILE)
        write_json(file, (read_json(file) if file.is_file() else {}) | {FIELD: kind})
