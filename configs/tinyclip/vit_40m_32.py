"""TinyCLIP-ViT-40M-32-Text-19M (manual, 75 -> 50 %): from the trained 61M/32, taught by ViT-B/32 laion2b_e16.

    heirloom train tinyclip/vit_40m_32 --run runs/vit_40m_32 --data.path "laion400m/{00000..41407}.tar"

LAION-400M as img2dataset shards, batch 8192. The epochs of the released file are inferred to be 16, the script says 6:
this recipe takes 16. Hardware of the release: 32 GPUs. Expected: 59.8 % ImageNet-1k zero-shot top-1 (README of the
release).
"""

from tinyclip_jax.recipes import STEPS_50, laion
from tinyclip_jax.train import Config
from tinyclip_jax.zoo import LAION_B_32, STUDENTS, TINYCLIP_61M


def get_config() -> Config:
    return laion(student=STUDENTS["vit_40m_32"], teacher=LAION_B_32, donor=TINYCLIP_61M, steps=STEPS_50)
