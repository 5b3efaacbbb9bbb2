"""TinyCLIP-ViT-61M-32-Text-29M (manual, 100 -> 75 %): from OpenCLIP ViT-B/32 laion2b_e16, which also teaches.

    heirloom train tinyclip/vit_61m_32 --run runs/vit_61m_32 --data.path "laion400m/{00000..41407}.tar"

LAION-400M as img2dataset shards, 6 epochs at batch 8192 (script/*.sh of the release; about 48,800 steps an epoch).
Hardware of the release: 32 GPUs. Expected: 62.4 % ImageNet-1k zero-shot top-1 (README of the release).
"""

from tinyclip_jax.recipes import STEPS_75, laion
from tinyclip_jax.train import Config
from tinyclip_jax.zoo import LAION_B_32, STUDENTS


def get_config() -> Config:
    return laion(student=STUDENTS["vit_61m_32"], teacher=LAION_B_32, donor=LAION_B_32, steps=STEPS_75)
