"""Config of the training of a teacher, a gene or a descendant."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from heirloom.common.checkpoint.family import Family
from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.errors import InputError, between
from heirloom.common.train.optim import OptimConfig
from heirloom.common.train.parts import Parts
from heirloom.common.train.recipe import BaseConfig, unread_captions
from heirloom.common.vit.model import VitConfig
from learngene.augment import AugmentConfig
from learngene.convnet import FAMILY as CONVNET
from learngene.convnet import ConvConfig
from learngene.expand import Head
from learngene.inputs import CROP, IMAGENET
from learngene.losses import DistillConfig
from learngene.relatives import Method
from learngene.zoo import FAMILY

CACHED = "logits"
# DeiT's AdamW. Deviation: the cosine runs per step to 0; the release's per epoch, a step late, to a minimum.
ADAMW = OptimConfig(lr=5e-4, warmup=0, b2=0.999, eps=1e-8, weight_decay=0.05, no_decay=("**position",), clip=None)
CONVNET_ADAMW = replace(ADAMW, no_decay=())  # it has no positions


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """A training: of a teacher from labels, of a gene from a teacher, or of a descendant that starts from a gene."""

    student: VitConfig = field(default_factory=VitConfig)
    method: Method = "expand"
    """How the student is initialised from its donor: expansion of a gene, or another method."""
    layers: tuple[int, ...] = ()
    """Stage of each layer, for method expand; empty: SWS's rule."""
    head: Head = "inherit"
    """The classifier: inherited if the number of classes is the same, or fresh, for other labels of the same number."""
    init: Literal["random", "mimetic"] = "random"
    """Initialisation of a student without donor."""
    teacher: str = ""
    """SOURCE of the model to distil from; "logits": the column teacher_logits of the data; empty: none."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Weight and form of the distillation loss, if there is a teacher."""
    label: str = "label"
    """Column of the class: numbers from 0, or names, which are numbered as the logits of the teacher or of an inherited
    head are, if these name their classes, else in alphabetical order.
    """
    storage: Literal["stream", "device"] = "stream"
    """stream: read pictures when they are needed. device: decode them once and keep them on the devices, for small
    data.
    """
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    preprocess: Preprocess = IMAGENET
    """Mean, standard deviation, interpolation. It is scaled from its size to the student's; without a resize, its
    margin is set by `crop`.
    """
    pipeline: PipelineConfig = field(default_factory=lambda: PipelineConfig(batch=512))
    crop: float = CROP
    """Share of the side in the centre crop of held-out pictures, if preprocess.resize is not set; 1 for small pictures.
    """
    optim: OptimConfig = ADAMW
    log_every: int = 100
    eval_every: int = 2500
    save_every: int = 2500

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, "crop", least=0.01, most=1.0)

    @property
    def family(self) -> Family:
        return FAMILY

    @property
    def pre(self) -> Preprocess:
        pre = self.preprocess.at(self.student.size)
        return pre.cropped(self.crop) if pre.resize is None else pre

    @property
    def pictures(self) -> int:
        """Pictures in a batch, counting every view."""
        return self.pipeline.batch * self.augment.views

    def needs(self) -> dict[str, tuple[str, ...]]:
        loss = ("distill.kind", "distill.temperature", "distill.reduction")  # alpha is 0 then, which may be said
        return {"donor": ("method", "layers", "head"), "teacher": loss}

    def idle(self) -> dict[str, str]:
        """Fields that have no effect in this recipe, and why."""
        out = super().idle() | {"preprocess.scale": "random crops are those of augment; set --augment.scale"}
        out |= unread_captions(self)
        if self.preprocess.resize is not None:
            out["crop"] = "preprocess.resize sets the margin"
            if (own := self.preprocess.size) != self.student.size:
                scaled = f"preprocess.size is {own} and the student's {self.student.size}"
                out["preprocess.resize"] = f"{scaled}; set --preprocess.size {self.student.size} too"
        if self.teacher and not self.distill.alpha:
            out["teacher"] = "distill.alpha is 0; set it above 0"
        if self.teacher and self.distill.alpha == 1:
            out["augment.smoothing"] = "distill.alpha is 1, which uses no labels; set it below 1"
        return out

    def parts(self) -> Parts:
        from learngene.train import parts

        return parts(self)

    def train(self, directory: Path) -> None:
        from learngene.data import forget

        forget()
        super().train(directory)

    def check(self, mesh: Mesh) -> None:
        if getattr(self.student, "channels", 3) != 3:
            raise InputError(f"student.channels is {self.student.channels}, and pictures have 3: set it to 3")
        if isinstance(self.student, VitConfig):
            self.student.filled()
            if not self.student.classes:
                raise InputError("student.classes is 0, a model without a head: set it to the number of classes")
            if self.student.size_width not in (None, self.student.size):
                raise InputError(
                    f"student.size_width is {self.student.size_width}, and pictures are cut to squares: leave it empty"
                )
        if self.init != "random" and (self.donor or self.family is not FAMILY):
            raise InputError("init is 'mimetic', for a ViT without donor: leave donor empty, or set init to 'random'")
        if getattr(self.student, "gene", "none") != "none" and not self.teacher and self.distill.alpha == 1:
            needed = "name a teacher, or set --distill.alpha 0 to learn from labels alone"
            raise InputError(f"teacher is empty, and distill.alpha 1 uses no labels: {needed}")
        if self.teacher == CACHED and self.augment.changes:
            what = "a teacher's cached logits belong to unchanged pictures"
            raise InputError(f"augment is on, and {what}: turn it off, or set teacher to a SOURCE")
        if self.augment.views > 1 and self.storage == "device":
            views = f"augment.views is {self.augment.views}, and storage 'device' has one of each picture"
            raise InputError(f"{views}: set it to 1, or storage to 'stream'")
        if self.storage == "device" and (self.augment.crop == "resized" or self.augment.randaugment):
            what = "resized crops and RandAugment need 'stream'"
            raise InputError(f"storage is 'device', and {what}: set storage to it, or augment.crop to 'shift'")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Config):
    """A training of a convnet: a teacher where no pretrained one exists."""

    student: ConvConfig = field(default_factory=ConvConfig)  # type: ignore[assignment]
    optim: OptimConfig = CONVNET_ADAMW

    @property
    def family(self) -> Family:
        return CONVNET
