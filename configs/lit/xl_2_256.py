"""LiT-XL/2 at 256 px: few-head linear attention, inherited and distilled (LiT, tables 4 to 8).

    heirloom cache lit/xl_2_256 data/imagenet_256 --data.path imagenet/train
    heirloom train lit/xl_2_256 --run runs/lit_xl_2_256

Donor and teacher: the public DiT-XL/2. Expect an FID-50K of 12.9 and an IS of 95.8 after 100K steps without guidance,
and of 2.32 and 265 after 1.4M with guidance 1.5 on three channels (250 DDPM steps). 0.24 PFLOP a step: 17 hours for
100K at 400 TFLOP/s. The result has the licence of DiT's weights (CC-BY-NC 4.0).

Deviation: the teacher sees dropped labels as the student does; in the released code, which gave these numbers, it never
does (--distill.dropped student). Deviation: bf16 activations (lit_jax/recipes.py).
"""

from lit_jax.recipes import imagenet
from lit_jax.train import Config
from lit_jax.zoo import DIT_XL_2_256, lit


def get_config() -> Config:
    return imagenet(lit("xl"), steps=1_400_000, donor=DIT_XL_2_256, teacher=DIT_XL_2_256)
