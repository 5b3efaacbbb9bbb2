"""Read the config.json of transformers' ViTs, with or without a head, and the names of their tensors."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from heirloom.common.checkpoint.family import Found, Guess, Read
from heirloom.common.checkpoint.fields import Fields
from heirloom.common.checkpoint.flax_files import as_torch
from heirloom.common.checkpoint.weights import Tensors
from heirloom.common.errors import InputError, remark
from heirloom.common.nn.mlp import HF_ACTIVATIONS
from heirloom.common.vit.model import VitConfig
from learngene.hf_models import (
    CLASSIFIERS,
    CLIP,
    CLIP_CLASSIFIER,
    DEIT,
    DINO,
    MAE,
    MODELS,
    REGISTERS,
    SIGLIP,
    SIGLIP_CLASSIFIER,
    TOWERS,
    VIT,
    Model,
    model_of,
    prefix_of,
)

_BLOCKS = re.compile(
    r"(.*\.)?encoder\.layer\.0\.(layernorm_before|norm1)\.weight"
    r"|vision_model\.encoder\.layers\.0\.layer_norm1\.weight"
)
_TOWER = {"encoder.layers.0.layer_norm1.weight", "embeddings.patch_embedding.weight"}  # an image tower without a prefix
_TEXT = ("text_model.", "text_decoder.", "text_encoder.")  # beside an image tower: a CLIP, BLIP or the like
_PREFIX = re.compile(rf"^({'|'.join(sorted({model.prefix for model in MODELS.values()}, key=len, reverse=True))})\.")
_DECODER = "decoder."  # of a masked autoencoder
_UNUSED = "embeddings.mask_token"  # no picture without a mask has one
# transformers' defaults, where they differ from those of ViT.
_DEFAULTS: dict[Model, dict[str, Any]] = {
    DINO: dict(patch_size=14, layer_norm_eps=1e-6),
    REGISTERS: dict(layer_norm_eps=1e-6),
    SIGLIP: dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6),
    CLIP: dict(patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5),
}
_DEFAULTS |= {CLIP_CLASSIFIER: _DEFAULTS[CLIP], SIGLIP_CLASSIFIER: _DEFAULTS[SIGLIP]}
# What these classifiers have from the tower and do not use: they average patches.
_NOT_USED = {CLIP_CLASSIFIER: "post_layernorm.", SIGLIP_CLASSIFIER: "head."}
# Other models of transformers whose blocks have the same names.
_OTHERS = {
    "audio-spectrogram-transformer": "an Audio Spectrogram Transformer (AST)",
    "beit": "a BEiT, which has LayerScale and relative positions",
    "data2vec-vision": "a Data2Vec, which has LayerScale and relative positions",
    "depth_anything": "a Depth Anything, which estimates depth",
    "dpt": "a DPT, which estimates depth or segments",
    "ijepa": "an I-JEPA, which has no class token",
    "siglip2": "a SigLIP 2 for pictures of any aspect ratio (NaFlex)",
    "videomae": "a VideoMAE, which reads videos",
    "vit_hybrid": "a hybrid ViT, which has a convolutional stem",
    "vit_msn": "a masked siamese network (ViT-MSN)",
    "vivit": "a ViViT, which reads videos",
    "yolos": "a YOLOS, which detects objects",
}
_NOT_POOLED = "{} returns all tokens; classifiers read the class token (cls) or the mean of the patches (norm_mean)"


def read(found: Found) -> Read | None:
    """Read the config of a ViT of transformers; None for a model with a text tower, which is another model family."""
    tensors = found.tensors
    if not any(_BLOCKS.fullmatch(key) for key in tensors) and not tensors.keys() >= _TOWER:
        return None
    if any(key.startswith(_TEXT) for key in tensors):
        return None
    fields = found.json("config.json")
    if fields is None:
        raise InputError("a Hugging Face ViT needs its config.json next to the weights; there is none")
    model = _model(fields)
    expected = _class(model, tensors)
    fields.fixed("architectures", [expected], [], None, feature="not the class that has these tensors")
    fields.transformers()
    sizes = _tower_fields(fields) if model in CLASSIFIERS else fields
    readers = {DINO: _dinov2, REGISTERS: _dinov2, CLIP: _clip, SIGLIP: _siglip} | dict.fromkeys(CLASSIFIERS, _averaged)
    cfg = _sizes(sizes, model)
    cfg |= readers.get(model, _vit)(sizes, tensors, cfg, model)
    for part in (sizes, fields):
        part.done()
    classes = cfg.get("classes", 0)
    if classes and (labels := fields.integer("num_labels", None, least=0)) is not None:
        fields.agree("num_labels", labels, classes)
    pooled = cfg.get("pooler") or classes or model not in (VIT, DEIT, MAE)
    guess = Guess("pool", cfg["pool"], _NOT_POOLED.format(expected))
    return Read(VitConfig(**cfg), () if pooled else (guess,))


def read_flax(found: Found) -> Read | None:
    """Read the config of FlaxViTForImageClassification, which is that of ViTForImageClassification."""
    if "vit/embeddings/cls_token" not in found.tensors:
        return None
    if "classifier/kernel" not in found.tensors:
        raise InputError("has no classifier: of Flax, only ViTs that classify are read (FlaxViTForImageClassification)")
    fields = found.json("config.json")
    if fields is not None:
        fields.fixed("model_type", VIT.kind, feature="a Flax model other than ViT")
    return read(replace(found, tensors=as_torch(found.tensors)))


def _model(fields: Fields) -> Model:
    """The model of the config's `model_type`. Raises InputError that names another model."""
    kind = fields.text("model_type")
    if kind not in MODELS:
        what = f", {_OTHERS[kind]}" if kind in _OTHERS else ""
        only = f"of transformers' ViTs, only {', '.join(MODELS)} can be read"
        raise InputError(f"{fields.where}: model_type is {kind!r}{what}: {only}")
    return MODELS[kind]


def _class(model: Model, tensors: Tensors) -> str:
    """The class that has these tensors. Raises InputError where they are those of another model."""
    keys = {_PREFIX.sub("", key) for key in tensors}
    tower = "embeddings.patch_embedding.weight" in keys
    dino = "encoder.layer.0.layer_scale1.lambda1" in keys
    if tower != (model in TOWERS) or dino != (model in (DINO, REGISTERS)):
        needed = "take the config.json of these weights"
        raise InputError(f"model_type is {model.kind!r}, and the tensors are not: {needed}")
    if model in CLASSIFIERS and "classifier.weight" not in keys:
        needed = f"take the config.json of the tower alone ({model.kind}_vision_model)"
        raise InputError(f"model_type is {model.kind!r}, and there is neither a text tower nor a classifier: {needed}")
    if model is DEIT and "distillation_classifier.weight" in keys:
        return f"{model.headed}WithTeacher"
    heads = {MAE: "decoder.decoder_embed.weight", CLIP: "visual_projection.weight"}
    return model.headed if heads.get(model, "classifier.weight") in keys and model.headed else model.name


def _sizes(fields: Fields, model: Model) -> dict[str, Any]:
    """Read what every one of these configs has."""
    usual: dict[str, Any] = dict(patch_size=16, hidden_act="gelu", layer_norm_eps=1e-12) | _DEFAULTS.get(model, {})
    sizes: dict[str, Any] = dict(
        size=fields.square("image_size", 224),
        channels=fields.integer("num_channels", 3),
        patch=fields.square("patch_size", usual["patch_size"]),
        width=fields.integer("hidden_size", 768),
        layers=fields.integer("num_hidden_layers", 12),
        heads=fields.integer("num_attention_heads", 12),
        activation=fields.choice("hidden_act", HF_ACTIVATIONS, usual["hidden_act"], near=False),
        eps=fields.number("layer_norm_eps", usual["layer_norm_eps"]),
    )
    if model not in (DINO, REGISTERS):
        sizes |= dict(hidden=fields.integer("intermediate_size", 3072))
    return sizes


def _vit(fields: Fields, tensors: Tensors, cfg: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """ViT, DeiT and the encoder of ViT-MAE."""
    fields.skip("interpolate_pos_encoding")  # for pictures of other sizes
    fields.skip("encoder_stride")  # of masked modelling
    fields.skip("decoder_*", "mask_ratio", "norm_pix_loss") if model is MAE else None
    tokens = "cls+dist" if model is DEIT else "cls"
    head = {"cls_classifier.weight": "cls+dist", "classifier.weight": "cls"}
    pool = next((pool for key, pool in head.items() if key in tensors), "cls")
    classes = next((len(tensors[key]) for key in head if key in tensors), 0)
    pooler = not classes and any(_PREFIX.sub("", key) == "pooler.dense.weight" for key in tensors)
    if pooler:
        fields.fixed("pooler_act", "tanh")
        fields.fixed("pooler_output_size", cfg["width"], None, feature="a pooler of another size than hidden_size")
    fields.skip("pooler_output_size", "pooler_act")  # no classifier uses a pooler
    return dict(tokens=tokens, pool=pool, classes=classes, pooler=pooler, qkv_bias=_qkv_bias(fields, tensors))


def _dinov2(fields: Fields, tensors: Tensors, cfg: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """DINOv2, with registers or without."""
    # Of backbones, and of training.
    fields.skip("apply_layernorm", "reshape_hidden_states", "out_features", "out_indices", "stage_names")
    fields.skip("use_mask_token", "drop_path_rate")
    # Old configs have them; transformers resamples the positions with these values.
    fields.fixed("interpolate_antialias", model is REGISTERS)
    fields.fixed("interpolate_offset", 0.0)
    gated = fields.boolean("use_swiglu_ffn", False)
    hidden = int(cfg["width"] * fields.number("mlp_ratio", 4.0))
    out: dict[str, Any] = dict(gated=True, hidden=swiglu(hidden), activation="silu") if gated else dict(hidden=hidden)
    out |= dict(layer_scale=fields.number("layerscale_value", 1.0, above=0), qkv_bias=_qkv_bias(fields, tensors))
    if model is REGISTERS:
        registers = fields.integer("num_register_tokens", 4)
        out |= dict(registers=registers, positions="cls")
    classes = len(tensors["classifier.weight"]) if "classifier.weight" in tensors else 0
    # transformers resamples the positions of a DINOv2 to any picture: with antialiasing only if it has registers.
    out |= dict(any_size=True, resample="antialiased" if model is REGISTERS else "plain")
    return out | dict(tokens="cls", pool="cls+mean" if classes else "cls", classes=classes)


def swiglu(hidden: int) -> int:
    """Hidden units of a DINOv2 with SwiGLU: two thirds, rounded up to a multiple of 8."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def _clip(fields: Fields, tensors: Tensors, cfg: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """The image tower of a CLIP."""
    joint = fields.integer("projection_dim", 512) if "visual_projection.weight" in tensors else 0
    fields.skip("projection_dim")
    return dict(tokens="cls", pool="cls", classes=0, pre_norm=True, joint=joint)


def _siglip(fields: Fields, tensors: Tensors, cfg: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """The image tower of a SigLIP."""
    fields.fixed("vision_use_head", True, feature="an image tower without its pooling")
    return dict(tokens="none", pool="map", classes=0)


def _tower_fields(fields: Fields) -> Fields:
    """The config of the image tower in that of a CLIP or a SigLIP with both towers."""
    fields.skip("text_config", "projection_dim", "logit_scale_init_value", "initializer_factor")
    tower = fields.object("vision_config")
    tower.transformers()
    tower.skip("model_type", "projection_dim", "vision_use_head")
    return tower


def _averaged(fields: Fields, tensors: Tensors, cfg: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """An image tower that classifies the mean of its patches: CLIP's before its last norm, SigLIP's after it."""
    clip = model is CLIP_CLASSIFIER
    parts = dict(tokens="cls" if clip else "none", pre_norm=clip, final_norm=not clip)
    return parts | dict(pool="norm_mean", classes=len(tensors["classifier.weight"]))


def _qkv_bias(fields: Fields, tensors: Tensors) -> bool:
    said = fields.boolean("qkv_bias", True)
    has = any(key.endswith("encoder.layer.0.attention.attention.query.bias") for key in tensors)
    fields.agree("qkv_bias", said, has)
    return said


def complete(cfg: VitConfig, tensors: Tensors) -> Tensors:
    """The tensors of the ViT alone, with the prefix that the layout has; what is left out is remarked."""
    if any(key.startswith(_DECODER) for key in tensors):
        remark("the decoder of the masked autoencoder is left out: the ViT alone is read")
    out: Tensors = {}
    for key, value in tensors.items():
        name = _PREFIX.sub("", key)
        unused = name.startswith(_NOT_USED.get(model_of(cfg), _UNUSED))
        unused |= name == _UNUSED or (name.startswith("pooler.") and not cfg.pooler)
        if unused or key.startswith(_DECODER):
            continue
        whole = name.split(".")[0] in ("embeddings", "encoder", "layernorm", "post_layernorm", "pre_layrnorm", "pooler")
        out[f"{prefix_of(cfg)}{name}" if whole or name.startswith("head.") else name] = value
    return out
