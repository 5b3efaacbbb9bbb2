"""What learngene adds to the `heirloom` command. Imports nothing heavy: each verb loads what it needs when it runs."""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from heirloom.common.checkpoint.convert import Donor, Family


def families() -> list["Family"]:
    """Its models and their foreign formats, for convert, inspect and eval."""
    from learngene.zoo import FAMILIES

    return list(FAMILIES)


def demo(seed: int, out: "Path") -> dict[str, Any]:
    """One gene, three depths, beside the same models from scratch, on emoji."""
    from learngene.demo import run

    return run(seed, out)


def evaluate(donor: "Donor", args: Namespace) -> list[dict[str, Any]]:
    """Accuracy on labelled pictures, for `heirloom eval PATH`."""
    from learngene.evaluate import evaluate_folder

    return evaluate_folder(donor, args)


def expand(donor: "Donor", args: Namespace) -> dict[str, Any]:
    """A descendant of a gene as a weights folder, for `heirloom expand`; returns its provenance."""
    from heirloom.common.errors import InputError
    from learngene.train import expand_folder

    for name, value in (("--depth", args.depth), ("--size", args.size), ("--classes", args.classes)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: choose 1 or more")
    return expand_folder(donor, args)


def compare(args: Namespace) -> dict[str, Any]:
    """Methods by depth, for `heirloom compare`."""
    from learngene.compare import compare_command

    return compare_command(args)
