"""200 heads on thumbnails of emoji, to see that zoos are built.

heirloom train weightgen/smoke --run runs/smoke
"""

from weightgen.zoo.fit import FitConfig
from weightgen.zoo.nets import NetConfig
from weightgen.zoo.recipes import ZooRecipe


def get_config() -> ZooRecipe:
    return ZooRecipe(
        backend="pixels",
        net=NetConfig(features=32),
        members=200,
        fit=FitConfig(steps=20, lr=0.1, weight_decay=0.03),
        chunk=100,
    )
