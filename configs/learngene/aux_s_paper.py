"""Aux-S with the released code's oddities: 12 heads, eps 1e-5, divergence / (batch x classes) (SWS; T1, T3, T8).

Deviation: the teacher is DeiT-B distilled, where the release has LeViT-384; batch, schedule and precision are those of
`learngene.recipes.imagenet`.

    heirloom train learngene/aux_s_paper --run runs/aux_s_paper

Hardware and time as learngene/aux_s.
"""

from learngene.losses import DistillConfig
from learngene.recipes import imagenet
from learngene.train import Config
from learngene.zoo import TEACHER, paper_auxiliary


def get_config() -> Config:
    distill = DistillConfig(reduction="numel")
    return imagenet(paper_auxiliary("s"), epochs=150, lr=5e-4, warmup=5, teacher=TEACHER, distill=distill)
