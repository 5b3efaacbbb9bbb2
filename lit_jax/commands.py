"""What LiT adds to the `heirloom` command. Imports nothing heavy: each verb loads what it needs when it runs."""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from heirloom.common.checkpoint.convert import Donor, Family


def families() -> list["Family"]:
    """Its models and their foreign formats, for convert, inspect and eval."""
    from lit_jax import autoencoder_layouts, zoo

    return [zoo.FAMILY, autoencoder_layouts.FAMILY]


def demo(seed: int, out: "Path") -> dict[str, Any]:
    """A LiT inherits from the embedded DiT and is distilled from it, beside the same LiT from scratch."""
    from lit_jax.demo import run

    return run(seed, out)


def evaluate(donor: "Donor", args: Namespace) -> list[dict[str, Any]]:
    """FID and its relatives, for `heirloom eval PATH`."""
    from lit_jax.evaluate import evaluate_folder

    return evaluate_folder(donor, args)


def sample(donor: "Donor", args: Namespace) -> dict[str, Any]:
    """A grid of pictures, for `heirloom sample PATH`."""
    from lit_jax.generate import sample_folder

    return sample_folder(donor, args)


def doctor() -> str:
    """What computes linear attention here, and why."""
    from lit_jax.kernels import choice

    implementation, reason = choice()
    return f"linear attention by {implementation}: {reason}"
