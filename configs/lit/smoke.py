"""A tiny LiT from scratch on the embedded emoji, pixels of 16 x 16; a minute on a laptop.

    heirloom train lit/smoke --run runs/smoke

Shows that data, training, sampling and resume work; its samples are coloured blobs.
"""

from dataclasses import replace

from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.train.step import StepConfig
from lit_jax.dit import DitConfig
from lit_jax.sample import SampleConfig
from lit_jax.train import DIT_OPTIMIZER, Config


def get_config() -> Config:
    return Config(
        student=DitConfig(
            size=16, channels=3, patch=4, width=64, layers=2, heads=2, hidden=256, classes=9, attention="linear"
        ),
        data=SourceConfig(path="emoji", split="train"),
        held_out=SourceConfig(path="emoji", split="test"),
        label="group",
        flips=0.0,
        pipeline=PipelineConfig(batch=64),
        sample=SampleConfig(sampler="ddim", steps=20, guidance=2.0, guided="all"),
        samples=9,
        optim=replace(DIT_OPTIMIZER, lr=1e-3, warmup=20),
        step=StepConfig(ema=0.95),
        steps=100,
        log_every=10,
        eval_every=50,
        save_every=50,
    )
