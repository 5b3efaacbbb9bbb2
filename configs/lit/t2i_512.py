"""The text-to-image LiT-0.6B at 512 px, inherited from PixArt-Σ (LiT §4.2): all but q, k and v of self-attention.

    heirloom inherit lit/t2i_512 lit_t2i_512
    heirloom sample lit_t2i_512 --prompt "a red apple" --pipeline hf:PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers

It draws noise until it is trained. The donor's licence (CreativeML Open RAIL++-M) passes on to the student.
"""

from lit_jax.text_recipe import TextStudentConfig
from lit_jax.zoo import PIXART_512, text_lit


def get_config() -> TextStudentConfig:
    return TextStudentConfig(student=text_lit(512), donor=PIXART_512)
