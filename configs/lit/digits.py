"""The demo: a LiT inherits from the embedded DiT, all but its attention, and is distilled from it, on emoji at 32 px.

    heirloom train lit/emoji --run runs/lit                                 # inherits, and mimics
    heirloom train lit/emoji --run runs/scratch --donor "" --teacher ""     # the same from scratch

Two CPU cores, under two minutes each. Two heads of 64 replace four of 32.
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
        student=DitConfig(size=32, channels=3, patch=4, width=128, layers=6, heads=2, hidden=512, classes=9, attention="linear"),
        donor="embedded:emoji_dit",
        teacher="embedded:emoji_dit",
        data=SourceConfig("emoji", split="train"),
        held_out=SourceConfig("emoji", split="test"),
        label="group",
        flips=0.0,
        pipeline=PipelineConfig(batch=64),
        sample=SampleConfig("ddim", steps=25, guidance=2.0, guided="all"),
        samples=0,
        optim=replace(DIT_OPTIMIZER, lr=1e-3, warmup=10, schedule="cosine"),
        step=StepConfig(ema=0.95),
        steps=100,
        log_every=10,
        eval_every=10,
        save_every=100,
    )
