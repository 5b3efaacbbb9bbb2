"""Two stages of a few steps, the second from the first: what a job of two processes trains into a bucket."""

from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.train.optim import OptimConfig
from tinyclip_jax.model import ClipConfig, ImageConfig, TextConfig
from tinyclip_jax.train import Config, LossConfig, Stage


def student(layers: int) -> ClipConfig:
    image = ImageConfig(size=16, patch=8, width=32, layers=layers, heads=2, hidden=64)
    return ClipConfig(image, TextConfig(context=8, vocab=640, width=32, layers=layers, heads=2, hidden=64), joint=16)


def get_config() -> Config:
    return Config(
        stages=(Stage(student=student(2), steps=4, warmup=1), Stage(student=student(1), steps=40, warmup=1)),
        tokenizer="fit",
        data=SourceConfig("emoji:noto", split="train"),
        pipeline=PipelineConfig(batch=8, workers=0),
        loss=LossConfig(alpha=0.0, scale="learned"),
        optim=OptimConfig(lr=1e-3, warmup=1),
        log_every=1,
        save_every=10,
    )
