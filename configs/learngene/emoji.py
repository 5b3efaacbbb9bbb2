"""The demo: a gene of three blocks, distilled from a convnet, against models from scratch, on emoji at 32 px.

Classes are groups of emoji.

    heirloom compare learngene/emoji --run runs/emoji                                   # or heirloom demo learngene
    heirloom compare learngene/emoji --run runs/all --methods sws,shuffled,tleg,kd,scratch --epochs 3
    heirloom train learngene/emoji --run runs/emoji                                     # the same as compare

Two CPU cores, about five minutes as it stands. Nine groups; the largest has 21 % of the pictures.
"""

from dataclasses import replace

from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.vit.model import VitConfig
from learngene.augment import AugmentConfig
from learngene.compare import Comparison
from learngene.convnet import ConvConfig
from learngene.losses import DistillConfig
from learngene.train import ADAMW, CONVNET_ADAMW, Config, TeacherConfig

EPOCH = 61  # steps of 64 pictures


def get_config() -> Comparison:
    gene = Config(
        student=VitConfig(
            size=32, patch=8, width=64, layers=3, heads=2, hidden=256, classes=9, gene="sws", layout=(2, 2, 2)
        ),
        distill=DistillConfig(),
        data=SourceConfig(path="emoji", split="train"),
        label="group",
        storage="device",
        augment=AugmentConfig(crop="shift", shift=2, flips=0.5),
        pipeline=PipelineConfig(batch=64),
        held_out=SourceConfig(path="emoji", split="test"),
        crop=1.0,
        optim=replace(ADAMW, lr=1e-3, warmup=EPOCH // 2),
        steps=8 * EPOCH,
        log_every=EPOCH,
        eval_every=4 * EPOCH,
        save_every=8 * EPOCH,
    )
    teacher = TeacherConfig(
        student=ConvConfig(size=32, widths=(16, 32, 64), blocks=1, classes=9),
        data=gene.data,
        label=gene.label,
        storage=gene.storage,
        augment=gene.augment,
        pipeline=gene.pipeline,
        held_out=gene.held_out,
        crop=gene.crop,
        optim=replace(CONVNET_ADAMW, lr=2e-3, warmup=EPOCH // 2),
        steps=5 * EPOCH,
        log_every=EPOCH,
        eval_every=EPOCH,
        save_every=5 * EPOCH,
    )
    return Comparison(
        gene=gene,
        teacher=teacher,
        depths=(4, 6, 8),
        methods=("sws", "scratch"),
        epochs=1,
        tune=replace(ADAMW, lr=5e-4, warmup=EPOCH // 10),
        scratch=replace(ADAMW, lr=1e-3, warmup=EPOCH // 10),
    )
