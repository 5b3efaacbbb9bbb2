"""What LiT adds to the `heirloom` command. Imports nothing heavy: each verb loads what it needs when it runs."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.checkpoint.convert import Family


def families() -> list["Family"]:
    """Its models and their foreign formats, for convert, inspect and eval."""
    from lit_jax import autoencoder_layouts, zoo

    return [zoo.FAMILY, autoencoder_layouts.FAMILY]
