"""TinyCLIP-auto-ViT-63M-32-Text-31M (automatic, 100 -> 75 %): ViT-B/32 laion2b_e16, pruned by learned masks.

    heirloom train tinyclip/auto_63m_32 --run runs/auto_63m_32 --data.path "laion400m/{00000..41407}.tar"

LAION-400M as img2dataset shards, batch 8192, 6 epochs (lengths of released files; later stages are inferred). The
exact widths come from the masks. Hardware of the release: 32 GPUs. Expected: 63.9 % ImageNet-1k zero-shot top-1;
64.5 % on LAION+YFCC-400M (README of the release).
"""

from tinyclip_jax.recipes import AUTO_STAGES, laion
from tinyclip_jax.train import Config
from tinyclip_jax.zoo import LAION_B_32


def get_config() -> Config:
    return laion(teacher=LAION_B_32, donor=LAION_B_32, stages=AUTO_STAGES[:1])
