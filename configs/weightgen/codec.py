"""A token autoencoder over the zoo of heads, to compare with PCA, which needs no training. Minutes on two CPU cores.

heirloom train weightgen/codec --run runs/codec
"""

from weightgen.generator.parts import CodecRecipe


def get_config() -> CodecRecipe:
    return CodecRecipe()
