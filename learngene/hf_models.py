"""The ViTs of transformers that are read and written: their classes, and which of them a config is written as."""

from dataclasses import dataclass

from heirloom.common.vit.model import VitConfig


@dataclass(frozen=True)
class Model:
    """A model of transformers.

    kind: its `model_type`. name: its class without a head. prefix: the attribute under which other classes hold it, and
    with which the names of their tensors begin. headed: its class with a head.
    """

    kind: str
    name: str
    prefix: str
    headed: str = ""


VIT = Model("vit", "ViTModel", "vit", "ViTForImageClassification")
DEIT = Model("deit", "DeiTModel", "deit", "DeiTForImageClassification")
MAE = Model("vit_mae", "ViTMAEModel", "vit", "ViTMAEForPreTraining")
DINO = Model("dinov2", "Dinov2Model", "dinov2", "Dinov2ForImageClassification")
REGISTERS = Model(
    "dinov2_with_registers",
    "Dinov2WithRegistersModel",
    "dinov2_with_registers",
    "Dinov2WithRegistersForImageClassification",
)
CLIP = Model("clip_vision_model", "CLIPVisionModel", "vision_model", "CLIPVisionModelWithProjection")
SIGLIP = Model("siglip_vision_model", "SiglipVisionModel", "vision_model")
# Classifiers made of an image tower alone, whose config is that of both towers: read, not written.
CLIP_CLASSIFIER = Model("clip", "CLIPModel", "vision_model", "CLIPForImageClassification")
SIGLIP_CLASSIFIER = Model("siglip", "SiglipModel", "vision_model", "SiglipForImageClassification")
CLASSIFIERS = (CLIP_CLASSIFIER, SIGLIP_CLASSIFIER)
TOWERS = (*CLASSIFIERS, CLIP, SIGLIP)
MODELS = {model.kind: model for model in (VIT, DEIT, MAE, DINO, REGISTERS, *TOWERS)}


def model_of(cfg: VitConfig) -> Model:
    """The model of transformers that has the parts of this config, and as which it is written if it can be."""
    if cfg.pool == "map":
        return SIGLIP
    if cfg.pre_norm:
        return CLIP_CLASSIFIER if cfg.pool == "norm_mean" and not cfg.final_norm else CLIP
    if cfg.pool == "norm_mean" and cfg.tokens == "none":
        return SIGLIP_CLASSIFIER
    if cfg.layer_scale:
        return REGISTERS if cfg.registers else DINO
    return DEIT if cfg.tokens == "cls+dist" else VIT


def class_of(cfg: VitConfig) -> str:
    """The class of transformers that has the parts of this config."""
    model = model_of(cfg)
    teacher = "WithTeacher" if cfg.pool == "cls+dist" else ""
    return model.headed + teacher if cfg.classes or cfg.joint else model.name


def prefix_of(cfg: VitConfig) -> str:
    """What the names of the tensors begin with: `vit.` of a classifier, `vision_model.` of every image tower."""
    model = model_of(cfg)
    return f"{model.prefix}." if cfg.classes or model in TOWERS else ""
