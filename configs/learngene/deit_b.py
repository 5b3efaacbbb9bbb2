"""A teacher trained from scratch: DeiT-B with a class token, on ImageNet-1K (Touvron et al. 2021; 300 epochs).

    heirloom train learngene/deit_b --run runs/deit_b

Expect 81.8 % top-1, DeiT's figure (with batches of 1024). Hardware: a v5e-64; estimated, not run: 2.6 hours at 35 % of
its peak.
"""

from dataclasses import replace

from learngene.recipes import imagenet
from learngene.train import Config
from learngene.zoo import vit


def get_config() -> Config:
    return imagenet(replace(vit("b"), tokens="cls", pool="cls"), epochs=300, lr=5e-4, warmup=5)
