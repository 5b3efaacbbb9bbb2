"""Config of a TinyCLIP training: one stage, or several stages of progressive distillation."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from heirloom.common.checkpoint.family import Family
from heirloom.common.data.pipeline import AugmentName
from heirloom.common.errors import InputError, between, positive
from heirloom.common.train import recipe
from heirloom.common.train.abstract import Abstract
from heirloom.common.train.parts import Parts
from heirloom.common.train.recipe import BaseConfig
from tinyclip_jax.inherit import DepthRule
from tinyclip_jax.masks import MaskConfig
from tinyclip_jax.model import ClipConfig
from tinyclip_jax.zoo import FAMILY


@dataclass(frozen=True)
class LossConfig:
    """The loss: affinity mimicking, contrastive, or a weighted sum of both."""

    alpha: float = 1.0
    """Weight of affinity mimicking; the contrastive loss has weight 1 - alpha (the released scripts use 1)."""
    scale: Literal["fixed", "learned"] = "fixed"
    """The student's similarity scale: fixed at `teacher_scale`, or learned and clipped to 1..100."""
    teacher_scale: float | None = 50.0
    """The teacher's similarity scale; None: the scale of its checkpoint."""
    first_scale: Literal["fixed", "initial"] = "fixed"
    """Scale in the first step: "fixed" is `teacher_scale`. "initial" is 1/0.07, as in the released code, which fixes
    the scale only after a step; with masks it is the donor's.
    """

    def __post_init__(self) -> None:
        between(self, "alpha", most=1.0)
        between(self, "teacher_scale", least=1e-3)

    def idle(self) -> dict[str, str]:
        """Fields that have no effect, and why."""
        learned = {"first_scale": "loss.scale is learned; set it to fixed"} if self.scale == "learned" else {}
        unread = {"teacher_scale": "loss.alpha is 0 and loss.scale learned"} if learned and not self.alpha else {}
        return learned | unread


@dataclass(frozen=True)
class Stage:
    """One stage of progressive distillation: fields that replace those of the recipe."""

    student: ClipConfig
    steps: int
    warmup: int = 2000
    """Steps of linear warm-up; with masks, the mask phase is the warm-up."""
    masks: MaskConfig = field(default_factory=MaskConfig)

    def __post_init__(self) -> None:
        positive(self, "steps")
        between(self, "warmup")


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """A TinyCLIP training, of one or several stages."""

    student: ClipConfig = field(default_factory=ClipConfig)
    teacher: str = ""
    """SOURCE of the model to mimic; "embeddings": columns teacher_image and teacher_text of the data; "cache:DIR":
    embeddings that `heirloom cache` stored; empty: none.
    """
    depth_rule: DepthRule = "interval"
    """Which layers a shallower student takes: every n-th from the front, as released, or spread evenly."""
    tokenizer: str = ""
    """A tokenizer.json or its folder; "fit": train one on the captions of the data; empty: the donor's, else the
    teacher's, else CLIP's.
    """
    augment: AugmentName = "random"
    """random: random crops, and a random one of several captions. none: centre crop and first caption, which stored
    embeddings need.
    """
    loss: LossConfig = field(default_factory=LossConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    """Automatic inheritance: `student` is the original model, and learned masks decide which parts of it remain."""
    stages: tuple[Stage, ...] = ()
    """Progressive distillation: each stage inherits from the model of the previous stage; the teacher is the same in
    all. Each has its own student, steps, warm-up and masks.
    """
    stage: int = 0
    """Number of the one stage to run; 0: all stages in order, from the first that is not finished."""

    def parts(self) -> Parts:
        from tinyclip_jax import automatic
        from tinyclip_jax.train import parts

        cfg = self._first_stage()
        return automatic.parts(cfg) if cfg.masks.prune_step else parts(cfg)

    def train(self, directory: Path) -> None:
        from tinyclip_jax import automatic
        from tinyclip_jax.train import parts

        for cfg, folder in self._stages_to_run(directory):
            if cfg.masks.prune_step:
                automatic.train(cfg, folder)
            else:
                recipe.run(cfg, folder, parts(cfg))

    def inherit(self, destination: Path, *, force: bool = False) -> dict[str, Any]:
        if self._first_stage().masks.prune_step:
            run = "run heirloom train, the pruned model is RUN/pruned"
            raise InputError(f"this recipe prunes with learned masks, which need training: {run}")
        return super().inherit(destination, force=force)

    def cache(self, destination: Path) -> dict[str, Any]:
        from tinyclip_jax.train import cache_teacher

        return cache_teacher(self._first_stage(), destination)

    def abstract(self, mesh: Mesh) -> Abstract:
        """Abstract training step for `heirloom compile`; with masks, the step after pruning at the unpruned size."""
        from tinyclip_jax.train import parts

        return recipe.outline(self, parts(self._first_stage()), mesh)

    def describe(self) -> tuple[Family, ClipConfig]:
        return FAMILY, self.stages[-1].student if self.stages else self.student

    def needs(self) -> dict[str, tuple[str, ...]]:
        return {"donor": ("depth_rule",)}

    def idle(self) -> dict[str, str]:
        """Fields that have no effect in this recipe, and the field to set instead."""
        if self.stages:
            per_stage = {"student": "student", "steps": "steps", "masks": "masks", "optim.warmup": "warmup"}
            out = {name: f"each stage has its own; set --stages.0.{own}" for name, own in per_stage.items()}
            later = {"donor": f"stage {self.stage} inherits from the model of stage {self.stage - 1}"}
            return out | (later if self.stage > 1 else {})
        masked = {"depth_rule": "learned masks choose the layers"} if self.masks.prune_step else {}
        return super().idle() | masked | {"stage": "it has no stages"}

    def in_stage(self, n: int, donor: str) -> "Config":
        """Config of stage n = 1, 2, ... alone."""
        stage = self.stages[n - 1]
        single = replace(self, donor=donor, stages=(), stage=0)
        optim = replace(self.optim, warmup=stage.warmup)
        return replace(single, student=stage.student, steps=stage.steps, masks=stage.masks, optim=optim)

    def _first_stage(self) -> "Config":
        """The recipe, or its first stage, for commands that do not train."""
        return self.in_stage(1, self.donor) if self.stages else self

    def _stages_to_run(self, directory: Path) -> Iterator[tuple["Config", Path]]:
        """Yield config and folder of each stage to run. Raises InputError for an unknown stage or a missing donor."""
        if not self.stages:
            yield self, directory
            return
        if not 0 <= self.stage <= len(self.stages):
            raise InputError(f"stage is {self.stage}: choose 1 to {len(self.stages)}, or 0 for all")
        for n in [self.stage] if self.stage else range(1, len(self.stages) + 1):
            previous = directory / f"stage_{n - 1}" / "model"
            if n > 1 and not previous.exists():
                raise InputError(f"stage {n} starts from {previous}, which does not exist: run stage {n - 1} first")
            yield self.in_stage(n, self.donor if n == 1 else str(previous)), directory / f"stage_{n}"
