"""TinyCLIP-ResNet-19M-Text-19M (manual, 75 -> 50 %): leading filters of the trained ResNet-30M, on LAION-400M.

    heirloom train tinyclip/rn_19m --run runs/rn_19m --data.path "laion400m/{00000..41407}.tar"

The hub has no file of the 30M: train tinyclip/rn_30m first, or give its released .pt with --donor. Lineage and teacher
are inferred; released after 12 epochs. AdamW as for ResNets in the released code. Expected: 56.4 % ImageNet-1k
zero-shot top-1 (README of the release).
"""

from tinyclip_jax.recipes import RESNET_OPTIMIZER, STEPS_75, laion
from tinyclip_jax.train import Config
from tinyclip_jax.zoo import OPENAI_RN50, STUDENTS


def get_config() -> Config:
    models = {"student": STUDENTS["rn_19m"], "teacher": OPENAI_RN50, "donor": "runs/rn_30m/model"}
    return laion(**models, optim=RESNET_OPTIMIZER, steps=2 * STEPS_75)
