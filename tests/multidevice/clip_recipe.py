"""The recipe of the runs that these tests stop, spread and move; flags name teacher, donor, held-out pairs."""

from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.train.optim import OptimConfig
from tinyclip_jax.model import ClipConfig, ImageConfig, TextConfig
from tinyclip_jax.train import Config, LossConfig


def get_config() -> Config:
    return Config(
        # The smallest that has something to split in every kernel of a block and in the table: 64 Ki elements.
        student=ClipConfig(
            ImageConfig(size=16, patch=8, width=192, layers=2, heads=4, hidden=768),
            TextConfig(context=8, vocab=640, width=192, layers=2, heads=4, hidden=768),
            joint=32,
        ),
        data=SourceConfig("emoji:noto", split="train"),
        pipeline=PipelineConfig(batch=16),
        loss=LossConfig(alpha=0.5, scale="learned"),
        # A large eps: Adam would make whole steps of what is only rounding, such as the gradient of the keys' biases.
        optim=OptimConfig(lr=1e-3, warmup=2, eps=1e-2),
        steps=16,
        log_every=1,
        eval_every=8,
        save_every=2,
    )
