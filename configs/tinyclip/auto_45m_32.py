"""TinyCLIP-auto-ViT-45M-32-Text-18M (automatic, 100 -> 50 %, in two stages): ViT-B/32 laion2b_e16, by masks.

    heirloom train tinyclip/auto_45m_32 --run runs/auto_45m_32 --data.path "laion400m/{00000..41407}.tar"
    heirloom train tinyclip/auto_45m_32 --run runs/auto_45m_32 --stage 2 ...                # one stage alone

LAION-400M as img2dataset shards, batch 8192, 6 and 16 epochs (lengths of released files; later stages are inferred).
The exact widths come from the masks. Hardware of the release: 32 GPUs. Expected: 61.4 % ImageNet-1k zero-shot top-1;
62.7 % on LAION+YFCC-400M (README of the release).
"""

from tinyclip_jax.recipes import AUTO_STAGES, laion
from tinyclip_jax.train import Config
from tinyclip_jax.zoo import LAION_B_32


def get_config() -> Config:
    return laion(teacher=LAION_B_32, donor=LAION_B_32, stages=AUTO_STAGES[:2])
