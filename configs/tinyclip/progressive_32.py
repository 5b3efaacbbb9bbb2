"""ViT-B/32 -> 61M -> 40M by hand (100 -> 75 -> 50 %): both published stages, with the original as teacher of both.

    heirloom train tinyclip/progressive_32 --run runs/progressive --data.path "laion400m/{00000..41407}.tar"
    heirloom train tinyclip/progressive_32 --run runs/progressive --stage 2 ...

The same as tinyclip/vit_61m_32, then tinyclip/vit_40m_32 from its result. Expected: 62.4 %, then 59.8 % ImageNet-1k
zero-shot top-1 (README of the release). Hardware of the release: 32 GPUs.
"""

from tinyclip_jax.recipes import STEPS_50, STEPS_75, laion
from tinyclip_jax.train import Config, Stage
from tinyclip_jax.zoo import LAION_B_32, STUDENTS


def get_config() -> Config:
    stages = (
        Stage(student=STUDENTS["vit_61m_32"], steps=STEPS_75),
        Stage(student=STUDENTS["vit_40m_32"], steps=STEPS_50),
    )
    return laion(teacher=LAION_B_32, donor=LAION_B_32, stages=stages)
