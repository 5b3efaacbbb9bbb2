"""The generator of the demo: heads for the classes of a folder, from 1 to 5 pictures of each.

The demo trains two and scores them in 250 s.

heirloom train weightgen/generator --run runs/generator
heirloom generate runs/generator/model --dataset pictures -n 8 --reduce mean
"""

from weightgen.generator.train import GeneratorRecipe


def get_config() -> GeneratorRecipe:
    return GeneratorRecipe()
