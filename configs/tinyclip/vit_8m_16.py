"""TinyCLIP-ViT-8M-16-Text-3M (manual): from the trained 39M/16, on YFCC-15M.

    heirloom train tinyclip/vit_8m_16 --run runs/vit_8m_16 --data.path "yfcc15m/*.tar"

25 epochs at batch 4096 (samples seen as other papers give them); the lineage 12 -> 10 image and 6 -> 3 text layers is
inferred. Expected: 41.1 % ImageNet-1k zero-shot top-1 (README of the release).
"""

from tinyclip_jax.recipes import yfcc
from tinyclip_jax.train import Config
from tinyclip_jax.zoo import OPENAI_B_16, STUDENTS, TINYCLIP_39M


def get_config() -> Config:
    return yfcc(student=STUDENTS["vit_8m_16"], teacher=OPENAI_B_16, donor=TINYCLIP_39M)
