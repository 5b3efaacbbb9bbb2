"""TinyCLIP-ResNet-30M-Text-29M (manual, 100 -> 75 %): leading filters of OpenAI's RN50, on LAION-400M.

    heirloom train tinyclip/rn_30m --run runs/rn_30m --data.path "laion400m/{00000..41407}.tar"

The author names the donor; the teacher of the release is not documented: this recipe takes the donor. AdamW as for
ResNets in the released code. Deviation: statistics of batch norms are over all devices. Author: 588 pairs/s on one
A100-40G. Expected: 59.1 % ImageNet-1k zero-shot top-1 (README of the release).
"""

from tinyclip_jax.recipes import RESNET_OPTIMIZER, STEPS_75, laion
from tinyclip_jax.train import Config
from tinyclip_jax.zoo import OPENAI_RN50, STUDENTS


def get_config() -> Config:
    models = {"student": STUDENTS["rn_30m"], "teacher": OPENAI_RN50, "donor": OPENAI_RN50}
    return laion(**models, optim=RESNET_OPTIMIZER, steps=STEPS_75)
