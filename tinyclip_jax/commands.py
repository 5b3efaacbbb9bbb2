"""What TinyCLIP adds to the `heirloom` command. Imports nothing heavy: each verb loads what it needs when it runs."""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from heirloom.common.checkpoint.convert import Donor, Family


def families() -> list["Family"]:
    """Its models and their foreign formats, for convert, inspect and eval."""
    from tinyclip_jax.zoo import FAMILY

    return [FAMILY]


def demo(seed: int, out: "Path") -> dict[str, Any]:
    """A student inherits from the embedded teacher and races the same student from scratch."""
    from tinyclip_jax.demo import run

    return run(seed, out)


def suite(donor: "Donor", beside: "Donor | None", args: Namespace) -> list[dict[str, Any]]:
    """Every data set of a folder, for `heirloom eval PATH --suite DIR`, of another model beside it if asked for."""
    from tinyclip_jax.evaluate import no_flags
    from tinyclip_jax.suite import run_suite

    no_flags(args)
    return run_suite(donor, beside, args.suite)


def evaluate(donor: "Donor", args: Namespace) -> list[dict[str, Any]]:
    """Retrieval on pairs or zero-shot on classes, for `heirloom eval PATH`."""
    from tinyclip_jax.evaluate import evaluate_folder

    return evaluate_folder(donor, args)
