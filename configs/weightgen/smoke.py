"""200 heads on thumbnails of emoji, to see that zoos are built.

    heirloom train weightgen/smoke --run runs/smoke
"""

from weightgen.nets import NetConfig
from weightgen.recipes import ZooRecipe
from weightgen.zoo import FitConfig


def get_config() -> ZooRecipe:
    return ZooRecipe(
        backend="pixels", net=NetConfig(features=32), members=200, fit=FitConfig(steps=20, lr=0.1, weight_decay=0.03), chunk=100
    )
