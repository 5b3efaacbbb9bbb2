"""DiT-B/2 at 256 px, the donor of LiT-B/2: softmax attention, from scratch, as in the DiT paper.

    heirloom cache lit/dit_b_2_256 data/imagenet_256 --data.path imagenet/train
    heirloom train lit/dit_b_2_256 --run runs/dit_b_2_256

Its weights were never published. One TPU v5e-8 or 8 GPUs. Expect an FID-50K of 43.5 after 400K steps
(no guidance, 250 DDPM steps); LiT's ablations inherit from 800K.
"""

from lit_jax.recipes import imagenet
from lit_jax.train import Config
from lit_jax.zoo import dit


def get_config() -> Config:
    return imagenet(dit("b"), steps=800_000)
