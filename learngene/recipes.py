"""Settings that the ImageNet recipes share: DeiT's augmentation, and learning rates for 512 pictures a step."""

from dataclasses import replace
from typing import Any

from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.train.step import StepConfig
from heirloom.common.vit.model import VitConfig
from learngene.augment import AugmentConfig
from learngene.train import ADAMW, Config

TRAIN = 1_281_167  # pictures
VIEWS, RECORDS = 3, 176  # divisible by 16 devices
EPOCH = TRAIN // (VIEWS * RECORDS)  # steps
DEIT = AugmentConfig(
    crop="resized",
    flips=0.5,
    randaugment="rand-m9-mstd0.5-inc1",
    views=VIEWS,
    erase=0.25,
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
)


def imagenet(student: VitConfig, *, epochs: int, lr: float, warmup: int = 0, **fields: Any) -> Config:
    """Config of a training on ImageNet-1K in `imagenet/train` and `imagenet/val`; epochs of 1.28 million views.

    Deviation: 528 pictures a step, three views of 176, where the release has 512; a cosine per step that ends at 0;
    bfloat16, where it has float16 with a loss scaler; one draw of mixup or cutmix for the 528 pictures of a step, where
    the release has one for the 128 of each GPU; views of all pictures in turn, where the release draws another third of
    them for every epoch.
    """
    return Config(
        student=student,
        data=SourceConfig(path="imagenet", split="train"),
        augment=DEIT,
        pipeline=PipelineConfig(batch=RECORDS, workers=16),
        held_out=SourceConfig(path="imagenet", split="val"),
        optim=replace(ADAMW, lr=lr, warmup=warmup * EPOCH),
        step=StepConfig(compute="bfloat16"),
        steps=epochs * EPOCH,
        eval_every=5 * EPOCH,
        save_every=EPOCH,
        **fields,
    )
