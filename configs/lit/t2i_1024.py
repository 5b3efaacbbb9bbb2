"""Text-to-image LiT at 1024 px: PixArt-Sigma with few-head linear self-attention (arXiv 2501.12976).

    heirloom inherit lit/t2i_1024 student
    heirloom inherit lit/t2i_1024 student --donor PixArt-Sigma-XL-2-1024-MS --keep none

Donor: the public PixArt-Sigma-XL-2-1024-MS (OpenRAIL++ licence); --donor also takes a local copy, of the whole
pipeline or of its transformer. Everything is inherited but the queries, keys and values of self-attention and the new
depthwise filters. The output projection of self-attention is inherited, as in the released code; the paper inherits
nothing of self-attention (--keep none). The student draws only noise before it is trained.

The paper starts the model for 1024 px from its model for 512 px: --donor LIT_512 --keep all.
"""

from lit_jax.text_to_image import TextToImageConfig
from lit_jax.zoo import PIXART_1024, text_lit


def get_config() -> TextToImageConfig:
    return TextToImageConfig(student=text_lit(1024), donor=PIXART_1024)
