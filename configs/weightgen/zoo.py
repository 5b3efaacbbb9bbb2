"""4,000 five-way heads on emoji: the zoo of the demo; 65 % right on pictures not trained on. Not timed by itself.

heirloom train weightgen/zoo --run runs/zoo
"""

from weightgen.zoo.recipes import ZooRecipe


def get_config() -> ZooRecipe:
    return ZooRecipe()
