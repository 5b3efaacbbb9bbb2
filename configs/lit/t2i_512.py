"""Text-to-image LiT at 512 px: PixArt-Sigma with few-head linear self-attention (arXiv 2501.12976).

    heirloom inherit lit/t2i_512 student
    heirloom inherit lit/t2i_512 student --donor PixArt-Sigma-XL-2-512-MS --keep none

Donor: the public PixArt-Sigma-XL-2-512-MS (OpenRAIL++ licence); --donor also takes a local copy, of the whole
pipeline or of its transformer. Everything is inherited but the queries, keys and values of self-attention and the new
depthwise filters. The output projection of self-attention is inherited, as in the released code; the paper inherits
nothing of self-attention (--keep none). The student draws only noise before it is trained.
"""

from lit_jax.text_to_image import TextToImageConfig
from lit_jax.zoo import PIXART_512, text_lit


def get_config() -> TextToImageConfig:
    return TextToImageConfig(student=text_lit(512), donor=PIXART_512)
