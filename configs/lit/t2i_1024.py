"""The text-to-image LiT-0.6B at 1024 px, inherited from PixArt-Σ (LiT §4.2).

    heirloom inherit lit/t2i_1024 lit_t2i_1024

To start from a LiT of 512 px, as the paper does: --donor runs/lit_t2i_512/model --keep all. It draws noise until it is
trained. The donor's licence (CreativeML Open RAIL++-M) passes on to the student.
"""

from lit_jax.text_recipe import TextStudentConfig
from lit_jax.zoo import PIXART_1024, text_lit


def get_config() -> TextStudentConfig:
    return TextStudentConfig(student=text_lit(1024), donor=PIXART_1024)
