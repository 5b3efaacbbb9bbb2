"""A data-set encoder aligned with the zoo's latents. Minutes on two CPU cores.

heirloom train weightgen/encoder --run runs/encoder
"""

from weightgen.generator.parts import EncoderRecipe


def get_config() -> EncoderRecipe:
    return EncoderRecipe()
