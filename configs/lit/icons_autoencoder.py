"""The autoencoder of the small text-to-image models: pictures of 64 pixels to latents of 16 x 16 x 4.

    heirloom train lit/icons_autoencoder --run runs/icons_autoencoder

34 minutes on two CPU cores beside other work. `lit_jax/icons/README.md` says how the embedded weights were made, and
what they keep.
"""

from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.train.step import StepConfig
from lit_jax.autoencoder import AutoencoderConfig
from lit_jax.train_autoencoder import Config


def get_config() -> Config:
    pictures = SourceConfig(path="icons", split="train", text="")
    return Config(
        student=AutoencoderConfig(channels=(16, 32, 64), resnets=1, latent=4, groups=8, scaling_factor=1.0, size=64),
        data=pictures,
        held_out=SourceConfig(path="icons", split="test", text=""),
        flips=0.0,
        pipeline=PipelineConfig(batch=8),
        step=StepConfig(ema=0.995),
        steps=3600,
        log_every=100,
        eval_every=600,
        save_every=600,
    )
