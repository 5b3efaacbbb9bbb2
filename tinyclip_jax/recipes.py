"""What the published recipes have in common.

Deviation: activations are bf16, where the release has fp16 under autocast with a loss scaler; similarities and losses are f32 in both.
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

# Each stage of automatic inheritance takes another quarter of the original.
AUTO_STAGES = (
    Stage(VIT_B_32, STEPS_75, masks=MaskConfig(prune_step=3000, start=0.0, target=0.25)),
    Stage(VIT_B_32, STEPS_50, masks=MaskConfig(prune_step=5000, start=0.25, target=0.5)),
    Stage(VIT_B_32, STEPS_25, masks=MaskConfig(prune_step=8000, start=0.5, target=0.75)),
)

# The released code decides by the model's name: without "vit" in it these betas and this epsilon.
RESNET_OPTIMIZER = OptimConfig(lr=1e-4, warmup=2000, b2=0.999, eps=1e-8)


def laion(**fields: Any) -> Config:
    """On LAION-400M as img2dataset shards, batch 8192."""
    return _published("laion400m/*.tar", 8192, **fields)


def yfcc(**fields: Any) -> Config:
    """On YFCC-15M, batch 4096 (as users of the release have it), 25 epochs."""
    return _published("yfcc15m/*.tar", 4096, steps=91_552, **fields)


def _published(data: str, batch: int, **fields: Any) -> Config:
    settings: dict[str, Any] = {
        "data": SourceConfig(data),
        "pipeline": PipelineConfig(batch=batch, workers=16),
        "optim": OptimConfig(lr=1e-4, warmup=2000),
        "step": StepConfig(compute="bfloat16"),
    }
    cfg = Config(**settings | fields)
    if cfg.stages:
        return replace(cfg, stages=tuple(replace(stage, student=recomputed(stage.student)) for stage in cfg.stages))
    return replace(cfg, student=recomputed(cfg.student))


def recomputed(student: ClipConfig) -> ClipConfig:
    """Each block again in the backward pass, as in the release. Where memory is left, `--student.remat none` (of a stage
    `--stages.0.student.remat none`) is a quarter less work."""
    return replace(student, remat="full")
