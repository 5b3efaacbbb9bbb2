"""ViT-Ti of 12 layers out of its gene, tuned on ImageNet-1K with labels alone (SWS; 10 epochs).

    heirloom train learngene/vit_ti --run runs/vit_ti
    heirloom train learngene/vit_ti --run runs/vit_ti_9 --student.layers 9

Donor: our own gene (learngene/aux_ti). Hardware: a v5e-16; estimated, not run: 0.03 hours at 35 % of its peak, if the
hosts keep up.
"""

from learngene.recipes import imagenet
from learngene.train import Config
from learngene.zoo import vit


def get_config() -> Config:
    return imagenet(vit("ti"), epochs=10, lr=5e-5, donor="runs/aux_ti/model")
