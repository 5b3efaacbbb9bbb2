"""LiT-XL/2 at 512 px: few-head linear attention, inherited and distilled (LiT, tables 4 to 8).

    heirloom cache lit/xl_2_512 data/imagenet_512 --data.path imagenet/train
    heirloom train lit/xl_2_512 --run runs/lit_xl_2_512

Donor and teacher: the public DiT-XL/2 at 512 px. Expect an FID-50K of 3.69 after 700K steps with guidance 1.5 on three
channels (250 DDPM steps; DiT: 3.04 after 3M). To start from a LiT-XL/2 of 256 px: --donor runs/lit_xl_2_256/model
--keep all. The result has the licence of DiT's weights (CC-BY-NC 4.0).

Deviation: the teacher sees dropped labels as the student does; in the released code, which gave these numbers, it never
does (--distill.dropped student). Deviation: bf16 activations (lit_jax/recipes.py).
"""

from lit_jax.recipes import imagenet
from lit_jax.train import Config
from lit_jax.zoo import DIT_XL_2_512, lit


def get_config() -> Config:
    return imagenet(lit("xl", pixels=512), steps=700_000, batch=128, donor=DIT_XL_2_512, teacher=DIT_XL_2_512)
