"""4,000 five-way heads on emoji: the zoo of the demo. Not timed by itself; 65 % right on pictures the heads were not
trained on.

heirloom train weightgen/zoo --run runs/zoo
"""

from weightgen.zoo.recipes import ZooRecipe


def get_config() -> ZooRecipe:
    return ZooRecipe()
