"""The donor and teacher of the demo: a small DiT on the embedded emoji at 32 px, a class for each CLDR group.

    heirloom train lit/emoji_dit --run runs/emoji_dit

Two CPU cores, half an hour. The embedded weights had 3,000 steps more, as lit_jax/emoji_dit/README.md says, with their score.
"""

from dataclasses import replace

from common.data.pipeline import PipelineConfig
from common.data.sources import SourceConfig
from common.train.step import StepConfig
from lit_jax.dit import DitConfig
from lit_jax.sample import SampleConfig
from lit_jax.train import DIT_OPTIMIZER, Config


def get_config() -> Config:
    return Config(
        student=DitConfig(size=32, channels=3, patch=4, width=128, layers=6, heads=4, hidden=512, classes=9),
        data=SourceConfig("emoji", split="train"),
        label="group",
        flips=0.0,
        pipeline=PipelineConfig(batch=64),
        sample=SampleConfig("ddim", steps=50, guidance=2.0, guided="all"),
        samples=36,
        optim=replace(DIT_OPTIMIZER, lr=1e-3, warmup=100, schedule="cosine"),
        step=StepConfig(ema=0.998),
        steps=2000,
        log_every=50,
        eval_every=500,
        save_every=500,
    )
