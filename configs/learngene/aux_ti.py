"""A gene of ViT-Ti (not released): five shared blocks in 16 layers, distilled from DeiT-B (SWS; 150 epochs).

The layers are (3, 3, 4, 3, 3); the data is ImageNet-1K.

    heirloom train learngene/aux_ti --run runs/aux_ti
    heirloom expand runs/aux_ti vit_ti_9 --depth 9

Hardware: a v5e-16 with 4 hosts. Estimated, not run: 2.2 hours at 35 % of its peak (45 GFLOP a picture, teacher
included; 8.7e18 in all), if the hosts decode and augment 192 million views in that time. SWS's teacher is LeViT-384;
any classifier over these classes works (--teacher). SWS's tables could not be read, so no accuracy is given here.
"""

from learngene.recipes import imagenet
from learngene.train import Config
from learngene.zoo import TEACHER, auxiliary


def get_config() -> Config:
    return imagenet(auxiliary("ti"), epochs=150, lr=5e-4, warmup=5, teacher=TEACHER)
