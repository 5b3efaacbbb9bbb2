"""Aux-B: five shared blocks in 16 layers (3, 3, 4, 3, 3), distilled on ImageNet-1K from DeiT-B (SWS; 100 epochs).

    heirloom train learngene/aux_b --run runs/aux_b
    heirloom expand runs/aux_b vit_b_9 --depth 9

Hardware: a v5e-16 with 4 hosts. Estimated, not run: 5.7 hours at 35 % of its peak (175 GFLOP a picture with the
teacher; 2.2e19 in all), if the hosts decode and augment 128 million views in that time. SWS's teacher is LeViT-384; any
classifier over these classes works (--teacher). SWS's tables could not be read, so no accuracy is given here.
"""

from learngene.recipes import imagenet
from learngene.train import Config
from learngene.zoo import TEACHER, auxiliary


def get_config() -> Config:
    return imagenet(auxiliary("b"), epochs=100, lr=5e-4, warmup=5, teacher=TEACHER)
