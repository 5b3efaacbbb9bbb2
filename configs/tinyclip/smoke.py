"""A minute or two on a laptop: two tiny towers from scratch on the embedded emoji, plain contrastive.

    heirloom train tinyclip/smoke --run runs/smoke

Shows that data, training, evaluation and resume work; expect a held-out R@1 of about 1 % (chance is 0.3 %).
"""

from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.train.optim import OptimConfig
from tinyclip_jax.model import ClipConfig, ImageConfig, TextConfig
from tinyclip_jax.train import Config, LossConfig


def get_config() -> Config:
    return Config(
        student=ClipConfig(
            image=ImageConfig(size=32, patch=8, width=64, layers=2, heads=2, hidden=256),
            text=TextConfig(context=16, vocab=2048, width=64, layers=2, heads=2, hidden=256),
            joint=64,
        ),
        tokenizer="fit",
        data=SourceConfig(path="emoji", split="train"),
        held_out=SourceConfig(path="emoji", split="test"),
        pipeline=PipelineConfig(batch=128),
        loss=LossConfig(alpha=0.0, scale="learned"),
        optim=OptimConfig(lr=1e-3, warmup=20),
        steps=100,
        log_every=10,
        eval_every=50,
        save_every=50,
    )
