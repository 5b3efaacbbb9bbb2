"""TinyCLIP-ViT-39M-16-Text-19M (manual): from OpenAI's ViT-B/16, on YFCC-15M.

    heirloom train tinyclip/vit_39m_16 --run runs/vit_39m_16 --data.path "yfcc15m/*.tar"

25 epochs at batch 4096. The author reports 16 V100 for 35 hours (3,842 pairs/s). The teacher of the release is not
documented: this recipe takes the donor; with ViT-B/32 laion2b_e16 users of the release stalled at 57-60 %. Expected:
63.5 % ImageNet-1k zero-shot top-1 (README of the release).
"""

from tinyclip_jax.recipes import yfcc
from tinyclip_jax.train import Config
from tinyclip_jax.zoo import OPENAI_B_16, STUDENTS


def get_config() -> Config:
    return yfcc(student=STUDENTS["vit_39m_16"], teacher=OPENAI_B_16, donor=OPENAI_B_16)
