"""A small example with classes: a LiT of 8 x 8 digits inherits all but attention from the embedded DiT, its teacher.

    heirloom train lit/digits --run runs/lit                                 # with inheritance and distillation
    heirloom train lit/digits --run runs/scratch --donor "" --teacher ""     # the same from scratch

Two CPU cores, about a minute each. Two heads of 48 replace four of 24.
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
            size=8, channels=3, patch=2, width=96, layers=4, heads=2, hidden=384, classes=10, attention="linear"
        ),
        donor="embedded:digits_dit",
        teacher="embedded:digits_dit",
        data=SourceConfig(path="digits", split="train"),
        held_out=SourceConfig(path="digits", split="test"),
        flips=0.0,
        pipeline=PipelineConfig(batch=64),
        sample=SampleConfig(sampler="ddim", steps=50, guidance=1.5, guided="all"),
        samples=0,
        optim=replace(DIT_OPTIMIZER, lr=1e-3, warmup=20, schedule="cosine"),
        step=StepConfig(ema=0.97),
        steps=300,
        log_every=15,
        eval_every=15,
        save_every=300,
    )
