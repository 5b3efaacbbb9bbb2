"""LiT-L/2 at 256 px: few-head linear attention, inherited and distilled (LiT, tables 4 to 8).

    heirloom cache lit/l_2_256 data/imagenet_256 --data.path imagenet/train
    heirloom train lit/l_2_256 --run runs/lit_l_2_256

Donor: our own DiT-L/2. The paper has no table for L; its figure shows LiT-L/2 at 100K steps ahead of DiT-L/2 at 400K
(FID-50K 23.3, no guidance). Four heads are from memory, not checked against its config table. The result has the
licence of DiT's weights (CC-BY-NC 4.0).

Deviation: the teacher sees dropped labels as the student does; in the released code, which gave these numbers, it never
does (--distill.dropped student). Deviation: bf16 activations (lit_jax/recipes.py).
"""

from lit_jax.recipes import imagenet
from lit_jax.train import Config
from lit_jax.zoo import DIT_XL_2_256, lit


def get_config() -> Config:
    return imagenet(lit("l"), steps=400_000, donor="runs/dit_l_2_256/model", teacher=DIT_XL_2_256)
