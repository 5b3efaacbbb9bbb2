"""Settings that the published recipes share.

Deviation: activations are bf16, where the release has fp16 under autocast with a loss scaler; similarities and losses
are f32 in both.
"""

from dataclasses import replace
from typing import Any

from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.train.optim import OptimConfig
from heirloom.common.train.step import StepConfig
from tinyclip_jax.masks import MaskConfig
from tinyclip_jax.model import ClipConfig
from tinyclip_jax.train import Config, Stage
from tinyclip_jax.zoo import VIT_B_32

# 292,968 steps are 6 epochs of LAION-400M at batch 8192. The lengths of later stages are inferred: 16 and 25 epochs.
STEPS_75, STEPS_50, STEPS_25 = 292_968, 781_248, 1_220_700

# Each stage of automatic inheritance removes another quarter of the original parameters.
AUTO_STAGES = (
    Stage(student=VIT_B_32, steps=STEPS_75, masks=MaskConfig(prune_step=3000, start=0.0, target=0.25)),
    Stage(student=VIT_B_32, steps=STEPS_50, masks=MaskConfig(prune_step=5000, start=0.25, target=0.5)),
    Stage(student=VIT_B_32, steps=STEPS_25, masks=MaskConfig(prune_step=8000, start=0.5, target=0.75)),
)

# The released code uses these betas and this epsilon when the model's name does not contain "vit".
RESNET_OPTIMIZER = OptimConfig(lr=1e-4, warmup=2000, b2=0.999, eps=1e-8)


def laion(**fields: Any) -> Config:
    """Config of a training on LAION-400M as img2dataset shards, batch 8192."""
    return _published("laion400m/*.tar", 8192, **fields)


def yfcc(**fields: Any) -> Config:
    """Config of a training on YFCC-15M, batch 4096 (as users of the release have it), 25 epochs."""
    return _published("yfcc15m/*.tar", 4096, steps=91_552, **fields)


def _published(data: str, batch: int, **fields: Any) -> Config:
    settings: dict[str, Any] = {
        "data": SourceConfig(path=data),
        "pipeline": PipelineConfig(batch=batch, workers=16),
        "optim": OptimConfig(lr=1e-4, warmup=2000),
        "step": StepConfig(compute="bfloat16"),
    }
    cfg = Config(**settings | fields)
    if cfg.stages:
        return replace(cfg, stages=tuple(replace(stage, student=rematerialised(stage.student)) for stage in cfg.stages))
    return replace(cfg, student=rematerialised(cfg.student))


def rematerialised(student: ClipConfig) -> ClipConfig:
    """Recompute each block in the backward pass, as in the release.

    Where memory suffices, `--student.remat none` (for a stage `--stages.0.student.remat none`) takes a quarter less
    work.
    """
    return replace(student, remat="full")
