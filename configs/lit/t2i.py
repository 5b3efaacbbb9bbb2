"""The text-to-image LiT-0.6B in the two stages of the paper: 512 px, then 1024 px (LiT §4.2).

    heirloom train lit/t2i --run runs/lit_t2i --data.path data/t2i_512/train --stages.0.data data/t2i_1024/train

The same as lit/t2i_512, then lit/t2i_1024 from its result. Expected: GenEval 0.47, then 0.48.
"""

from dataclasses import replace

from heirloom.configs.lit.t2i_512 import get_config as first
from lit_jax.text_recipe import Config, Stage
from lit_jax.zoo import PIXART_1024


def get_config() -> Config:
    later = Stage(size=128, teacher=PIXART_1024, data="data/t2i_1024/train", steps=155_000, batch=96)
    return replace(first(), stages=(later,))
