"""TinyCLIP-auto-ViT-22M-32-Text-10M (automatic, 100 -> 25 %, in three stages): ViT-B/32 laion2b_e16, by masks.

    heirloom train tinyclip/auto_22m_32 --run runs/auto_22m_32 --data.path "laion400m/{00000..41407}.tar"
    heirloom train tinyclip/auto_22m_32 --run runs/auto_22m_32 --stage 2 ...                # one stage alone

LAION-400M as img2dataset shards, batch 8192, 6, 16 and 25 epochs (lengths of released files; later stages are
inferred). The exact widths come from the masks. Hardware of the release: 32 GPUs. Expected: 53.7 % ImageNet-1k
zero-shot top-1 (README of the release).
"""

from tinyclip_jax.recipes import AUTO_STAGES, laion
from tinyclip_jax.train import Config
from tinyclip_jax.zoo import LAION_B_32


def get_config() -> Config:
    return laion(teacher=LAION_B_32, donor=LAION_B_32, stages=AUTO_STAGES[:3])
