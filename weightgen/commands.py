"""What weightgen adds to the `heirloom` command. Imports nothing heavy: each verb loads what it needs when it runs."""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from heirloom.common.checkpoint.convert import Donor, Family


def families() -> list["Family"]:
    """List the model families of this package, for inspect, eval and generate."""
    from weightgen.formats import FAMILIES

    return FAMILIES


def demo(seed: int, out: "Path") -> dict[str, Any]:
    """Generate classifier heads for classes the zoo never saw, next to every baseline."""
    from weightgen.demo import run

    return run(seed, out)


def evaluate(donor: "Donor", args: Namespace) -> list[dict[str, Any]]:
    """Evaluate generated networks on a folder of pictures by class, for `heirloom eval PATH --data DIR`."""
    from weightgen.generate import evaluate_folder

    return evaluate_folder(donor, args)


def generate(donor: "Donor", args: Namespace) -> dict[str, Any]:
    """Write weights folders for the classes of a data set, for `heirloom generate PATH --dataset DIR`."""
    from weightgen.generate import generate_folder

    return generate_folder(donor, args)
