"""LiT-S/2 at 256 px: few-head linear attention, inherited and distilled (LiT, tables 4 to 8).

    heirloom cache lit/s_2_256 data/imagenet_256 --data.path imagenet/train
    heirloom train lit/s_2_256 --run runs/lit_s_2_256

Donor: our own DiT-S/2 after 800K steps. Expect an FID-50K of 50.8 and an IS of 29.2 after 400K steps (no guidance, 250
DDPM steps; DiT-S/2 itself: 68.4). The teacher is 87 % of the compute. The result has the licence of DiT's weights
(CC-BY-NC 4.0).

Deviation: the teacher sees dropped labels as the student does; in the released code, which gave these numbers, it never
does (--distill.dropped student). Deviation: bf16 activations (lit_jax/recipes.py).
"""

from lit_jax.recipes import imagenet
from lit_jax.train import Config
from lit_jax.zoo import DIT_XL_2_256, lit


def get_config() -> Config:
    return imagenet(lit("s"), steps=400_000, donor="runs/dit_s_2_256/model", teacher=DIT_XL_2_256)
