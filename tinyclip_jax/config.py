"""The recipe of a TinyCLIP: one training, or several stages of progressive distillation."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from heirloom.common.checkpoint.convert import Family
from heirloom.common.data.pipeline import AugmentName
from heirloom.common.errors import InputError, positive
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
    """Affinity mimicking, plain contrastive, or a mixture."""

    alpha: float = 1.0
    """Weight of affinity mimicking; the rest goes to the contrastive loss (the released scripts use 1)."""
    scale: Literal["fixed", "learned"] = "fixed"
    """The student's similarity scale: held at the teacher's `teacher_scale`, or learned and kept below 100."""
    teacher_scale: float | None = 50.0
    """The teacher's similarity scale; None: what its checkpoint says."""
    first_scale: Literal["fixed", "initial"] = "fixed"
    """Scale of the very first step: "initial" is 1/0.07, as in the released code, which fixes it only after a step (with masks the
    donor's, as all else)."""


@dataclass(frozen=True)
class Stage:
    """One stage of progressive distillation: what it has instead of the recipe's own."""

    student: ClipConfig
    steps: int
    warmup: int = 2000
    """Steps of linear warm-up; with masks their phase is the warm-up."""
    masks: MaskConfig = field(default_factory=MaskConfig)

    def __post_init__(self) -> None:
        positive(self, "steps")


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """One run of TinyCLIP, or several stages of it."""

    student: ClipConfig = field(default_factory=ClipConfig)
    teacher: str = ""
    """SOURCE of the model to mimic; "embeddings": columns teacher_image and teacher_text of the data; "cache:DIR": what
    `heirloom cache` stored; empty: none."""
    depth_rule: DepthRule = "interval"
    """Which layers a shallower student takes: every n-th from the front, as released, or spread evenly."""
    tokenizer: str = ""
    """A tokenizer.json or its folder; "fit": fitted to the captions of the data; empty: the donor's or teacher's, or CLIP's."""
    augment: AugmentName = "random"
    """Random crops and a random one of several captions, or none: the centre and the first, which a stored teacher needs."""
    loss: LossConfig = field(default_factory=LossConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    """Automatic inheritance: `student` is the original model, learned masks decide what of it stays."""
    stages: tuple[Stage, ...] = ()
    """Progressive distillation: each stage inherits from the model of the one before it, all have the same teacher. Each has its own
    student, steps, warm-up and masks."""
    stage: int = 0
    """The one stage to run; 0: all in turn, from the first that is not finished."""

    def parts(self) -> Parts:
        from tinyclip_jax import automatic, train

        cfg = self._first()
        return automatic.parts(cfg) if cfg.masks.prune_step else train.parts(cfg)

    def train(self, directory: Path) -> None:
        from tinyclip_jax import automatic, train

        for cfg, folder in self._in_turn(directory):
            if cfg.masks.prune_step:
                automatic.train(cfg, folder)
            else:
                recipe.run(cfg, folder, train.parts(cfg))

    def inherit(self, destination: Path, *, force: bool = False) -> dict[str, Any]:
        if self._first().masks.prune_step:
            raise InputError("automatic inheritance learns what to cut: run the recipe with heirloom train, the cut model is RUN/pruned")
        return super().inherit(destination, force=force)

    def cache(self, destination: Path) -> dict[str, Any]:
        from tinyclip_jax import train

        return train.cache_teacher(self._first(), destination)

    def abstract(self, mesh: Mesh) -> Abstract:
        """Of an automatic recipe the step after the cut, at the size before it."""
        from tinyclip_jax import train

        return recipe.outline(self, train.parts(self._first()), mesh)

    def describe(self) -> tuple[Family, ClipConfig]:
        return FAMILY, self.stages[-1].student if self.stages else self.student

    def idle(self) -> dict[str, str]:
        """Fields that do nothing here, and what to set instead."""
        each = {"student": "student", "steps": "steps", "masks": "masks", "optim.warmup": "warmup"}
        return {field: f"each stage has its own: set --stages.0.{name}" for field, name in each.items()} if self.stages else {}

    def in_stage(self, n: int, donor: str) -> "Config":
        """Stage n = 1, 2, ... as a config of its own."""
        stage = self.stages[n - 1]
        alone = replace(self, donor=donor, stages=(), stage=0)
        return replace(alone, student=stage.student, steps=stage.steps, masks=stage.masks, optim=replace(self.optim, warmup=stage.warmup))

    def _first(self) -> "Config":
        """The recipe, or its first stage: what a command that trains nothing works on."""
        return self.in_stage(1, self.donor) if self.stages else self

    def _in_turn(self, directory: Path) -> Iterator[tuple["Config", Path]]:
        """The config and folder of each stage to run. Raises InputError for an unknown stage, or one whose donor is not there yet."""
        if not self.stages:
            yield self, directory
            return
        if not 0 <= self.stage <= len(self.stages):
            raise InputError(f"there are stages 1 to {len(self.stages)}: stage {self.stage} is none of them")
        for n in [self.stage] if self.stage else range(1, len(self.stages) + 1):
            before = directory / f"stage_{n - 1}" / "model"
            if n > 1 and not before.exists():
                raise InputError(f"stage {n} goes on from {before}, which is not there: run stage {n - 1} first")
            yield self.in_stage(n, self.donor if n == 1 else str(before)), directory / f"stage_{n}"
