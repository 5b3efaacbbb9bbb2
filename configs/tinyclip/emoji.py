"""The demo: a student of half the embedded teacher's size inherits its weights and mimics it, on emoji.

    heirloom train tinyclip/emoji --run runs/emoji                 # inherits
    heirloom train tinyclip/emoji --run runs/scratch --donor ""    # the same from scratch

Two CPU cores, under two minutes. Expected: 5.9 % held-out R@1, and 1.7 % from scratch (docs/results-tinyclip.md). The
image tower loses channels, the text tower layers (TinyCLIP §3.3).
"""

from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.train.optim import OptimConfig
from tinyclip_jax.model import ClipConfig, ImageConfig, TextConfig
from tinyclip_jax.train import Config


def get_config() -> Config:
    return Config(
        student=ClipConfig(
            image=ImageConfig(size=60, patch=12, width=128, layers=8, heads=2, hidden=512),
            text=TextConfig(context=16, vocab=4096, width=192, layers=2, heads=3, hidden=768),
            joint=256,
        ),
        teacher="embedded:emoji",
        donor="embedded:emoji",
        data=SourceConfig(path="emoji", split="train"),
        held_out=SourceConfig(path="emoji", split="test"),
        pipeline=PipelineConfig(batch=128),
        optim=OptimConfig(lr=1e-3, warmup=20),
        steps=100,
        log_every=10,
        eval_every=20,
        save_every=100,
    )
