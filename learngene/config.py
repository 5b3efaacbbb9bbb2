"""The recipe of a teacher, a gene or a descendant."""

from dataclasses import dataclass, field, replace
from typing import Literal

from jax.sharding import Mesh

from heirloom.common.checkpoint.convert import Family
from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.errors import InputError
from heirloom.common.train.optim import OptimConfig
from heirloom.common.train.parts import Parts
from heirloom.common.train.recipe import BaseConfig
from learngene.augment import AugmentConfig
from learngene.convnet import FAMILY as CONVNET
from learngene.convnet import ConvConfig
from learngene.expand import Head
from learngene.inputs import CROP, IMAGENET
from learngene.losses import DistillConfig
from learngene.relatives import Method
from learngene.vit import VitConfig
from learngene.zoo import FAMILY

CACHED = "logits"
# DeiT's AdamW. Deviation: the cosine runs per step and ends at 0; the release steps per epoch, a step late, and ends at a minimum.
ADAMW = OptimConfig(lr=5e-4, warmup=0, b2=0.999, eps=1e-8, weight_decay=0.05, no_decay=("**position",), clip=None)
CONVNET_ADAMW = replace(ADAMW, no_decay=())  # it has no positions


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """One run: a teacher learns from labels, a gene from a teacher, a descendant starts from a gene."""

    student: VitConfig = field(default_factory=VitConfig)
    method: Method = "expand"
    """How the student comes from its donor: a gene's expansion, or a relative of it."""
    layers: tuple[int, ...] = ()
    """Stage of each layer, for the method expand; empty: SWS's rule."""
    head: Head = "inherit"
    """The classifier: inherited where the number of classes is the same, or fresh, for other labels of the same number."""
    init: Literal["random", "mimetic"] = "random"
    """Initial values of a student without donor."""
    teacher: str = ""
    """SOURCE of the model to distil from; "logits": the column teacher_logits of the data; empty: none."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Weight and form of distillation, where there is a teacher."""
    label: str = "label"
    """Column of the class: numbers from 0, or names, which are numbered in alphabetical order."""
    storage: Literal["stream", "device"] = "stream"
    """Read pictures as they are needed, or decode them once and keep them on the devices, as fits small data."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    preprocess: Preprocess = IMAGENET
    """Mean, standard deviation, interpolation; its size is the student's, and its margin, where it has none, that of `crop`."""
    pipeline: PipelineConfig = field(default_factory=lambda: PipelineConfig(batch=512))
    crop: float = CROP
    """Share of the side that a held-out picture's centre crop keeps, where preprocess.resize is not set; 1 for small pictures."""
    optim: OptimConfig = ADAMW
    log_every: int = 100
    eval_every: int = 2500
    save_every: int = 2500

    @property
    def family(self) -> Family:
        return FAMILY

    @property
    def pre(self) -> Preprocess:
        pre = self.preprocess.at(self.student.size)
        return pre.cropped(self.crop) if pre.resize is None else pre

    @property
    def pictures(self) -> int:
        """In a batch, every view counted."""
        return self.pipeline.batch * self.augment.views

    def parts(self) -> Parts:
        from learngene import train

        return train.parts(self)

    def check(self, mesh: Mesh) -> None:
        if getattr(self.student, "channels", 3) != 3:
            raise InputError(f"pictures are read with 3 channels, the student has {self.student.channels}: set student.channels to 3")
        if self.init != "random" and (self.donor or self.family is not FAMILY):
            raise InputError("init 'mimetic' is for a ViT without donor: leave donor empty, or init 'random'")
        if getattr(self.student, "gene", "none") != "none" and not self.teacher and self.distill.alpha == 1:
            raise InputError("this gene would learn from labels alone: name a teacher, or say so with --distill.alpha 0")
        if self.teacher == CACHED and self.augment.changes:
            raise InputError(
                "a teacher's cached logits belong to unchanged pictures: turn augmentation off, or let the teacher look (a SOURCE)"
            )
        if self.augment.views > 1 and self.storage == "device":
            raise InputError("data on the devices has one view of each picture: set augment.views to 1, or storage to 'stream'")
        if self.storage == "device" and (self.augment.crop == "resized" or self.augment.randaugment):
            raise InputError("resized crops and RandAugment happen while reading: set storage to 'stream', or augment.crop to 'shift'")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Config):
    """The same run with a convnet: a teacher where there is no pretrained one."""

    student: ConvConfig = field(default_factory=ConvConfig)  # type: ignore[assignment]
    optim: OptimConfig = CONVNET_ADAMW

    @property
    def family(self) -> Family:
        return CONVNET
