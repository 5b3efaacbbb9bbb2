"""Aux-S: five shared blocks in 16 layers (3, 3, 4, 3, 3), distilled on ImageNet-1K from DeiT-B (SWS; 150 epochs).

    heirloom train learngene/aux_s --run runs/aux_s
    heirloom expand runs/aux_s vit_s_9 --depth 9

Hardware: a v5e-16 with 4 hosts. Estimated, not run: 3.5 hours at 35 % of its peak (72 GFLOP a picture, teacher
included; 1.4e19 in all), if the hosts decode and augment 192 million views in that time. SWS's teacher is LeViT-384;
any classifier over these classes works (--teacher). SWS's tables could not be read, so no accuracy is given here.
"""

from learngene.recipes import imagenet
from learngene.train import Config
from learngene.zoo import TEACHER, auxiliary


def get_config() -> Config:
    return imagenet(auxiliary("s"), epochs=150, lr=5e-4, warmup=5, teacher=TEACHER)
