"""The demo's counterpart with learned masks: the embedded teacher to 50 and to 25 % of its blocks, on emoji.

    heirloom train tinyclip/emoji_auto --run runs/emoji_auto

Two stages of 200 steps, for two CPU cores; tested for a few steps only. Deviation: the masks' learning rate is ten
times the release's, whose phase has 3,000 steps or more, and without momentum, which would close far too many gates in
such a short phase.
"""

from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.train.optim import OptimConfig
from tinyclip_jax.masks import MaskConfig
from tinyclip_jax.model import ClipConfig, ImageConfig, TextConfig
from tinyclip_jax.train import Config, Stage


def get_config() -> Config:
    whole = ClipConfig(
        image=ImageConfig(size=60, patch=12, width=192, layers=8, heads=3, hidden=768),
        text=TextConfig(context=16, vocab=4096, width=192, layers=4, heads=3, hidden=768),
        joint=256,
    )
    return Config(
        teacher="embedded:emoji",
        donor="embedded:emoji",
        data=SourceConfig(path="emoji", split="train"),
        held_out=SourceConfig(path="emoji", split="test"),
        pipeline=PipelineConfig(batch=128),
        optim=OptimConfig(lr=1e-3),
        log_every=10,
        eval_every=50,
        save_every=100,
        stages=tuple(Stage(student=whole, steps=200, masks=masks) for masks in (FIRST_MASKS, SECOND_MASKS)),
    )


FIRST_MASKS = MaskConfig(prune_step=120, target=0.5, warmup=60, lr=0.2, momentum=0.0)
SECOND_MASKS = MaskConfig(prune_step=120, start=0.5, target=0.75, warmup=60, lr=0.2, momentum=0.0)
