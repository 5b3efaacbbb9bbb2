"""D2NWG as released, sizes included, on the zoo of heads: 141 million parameters, for a GPU. Not yet run at this size.

heirloom train weightgen/d2nwg --run runs/d2nwg
heirloom generate runs/d2nwg/model --dataset pictures -n 8
"""

from weightgen.d2nwg.train import D2nwgRecipe


def get_config() -> D2nwgRecipe:
    return D2nwgRecipe()
