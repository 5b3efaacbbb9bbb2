"""The donor and teacher of `lit/digits`: a small DiT on the embedded digits, 8 x 8 pixels.

    heirloom train lit/digits_dit --run runs/digits_dit

40 minutes on two CPU cores that also ran other work. lit_jax/digits_dit/README.md says how the embedded weights were
made, and their score.
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
        student=DitConfig(size=8, channels=3, patch=2, width=96, layers=4, heads=4, hidden=384, classes=10),
        data=SourceConfig(path="digits", split="train"),
        held_out=SourceConfig(path="digits", split="test"),
        flips=0.0,
        pipeline=PipelineConfig(batch=64),
        sample=SampleConfig(sampler="ddim", steps=50, guidance=1.5, guided="all"),
        samples=50,
        optim=replace(DIT_OPTIMIZER, lr=2e-3, warmup=200, schedule="cosine"),
        step=StepConfig(ema=0.998),
        steps=10_000,
        log_every=500,
        eval_every=1000,
        save_every=1000,
    )
