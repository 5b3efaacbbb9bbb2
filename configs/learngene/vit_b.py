"""ViT-B of 12 layers out of its gene, tuned on ImageNet-1K with labels alone (SWS; 10 epochs).

    heirloom train learngene/vit_b --run runs/vit_b
    heirloom train learngene/vit_b --run runs/vit_b_9 --student.layers 9

Donor: our own gene (learngene/aux_b). Hardware: a v5e-16; estimated, not run: 0.35 hours at 35 % of its peak, if the
hosts keep up.
"""

from learngene.recipes import imagenet
from learngene.train import Config
from learngene.zoo import vit


def get_config() -> Config:
    return imagenet(vit("b"), epochs=10, lr=1e-5, donor="runs/aux_b/model")
