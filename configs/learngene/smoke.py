"""A minute on a laptop: a tiny gene of two blocks from labels, on the embedded emoji by group, at 16 px.

    heirloom train learngene/smoke --run runs/smoke
    heirloom expand runs/smoke runs/smoke-3 --depth 3

Shows that data, training, evaluation, expansion and resume work; expect a held-out accuracy just above 21 % (the
largest group).
"""

from dataclasses import replace

from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.vit.model import VitConfig
from learngene.augment import AugmentConfig
from learngene.losses import DistillConfig
from learngene.train import ADAMW, Config


def get_config() -> Config:
    return Config(
        student=VitConfig(
            size=16, patch=4, width=32, layers=2, heads=2, hidden=128, classes=9, gene="sws", layout=(2, 2)
        ),
        distill=DistillConfig(alpha=0.0),
        data=SourceConfig(path="emoji", split="train"),
        label="group",
        storage="device",
        augment=AugmentConfig(crop="shift", shift=2, flips=0.5),
        pipeline=PipelineConfig(batch=128),
        held_out=SourceConfig(path="emoji", split="test"),
        crop=1.0,
        optim=replace(ADAMW, lr=1e-3, warmup=10),
        steps=60,
        log_every=10,
        eval_every=30,
        save_every=30,
    )
