"""Write the config.json of transformers' ViTs; what their classes do not have is refused."""

from pathlib import Path
from typing import Any

from heirloom.common.errors import InputError
from heirloom.common.files import write_json
from heirloom.common.nn.mlp import HF_NAMES
from heirloom.common.vit.model import VitConfig
from learngene.bare_files import ordinary
from learngene.hf_folder import swiglu
from learngene.hf_models import CLIP, DEIT, DINO, REGISTERS, SIGLIP, VIT, Model, class_of, model_of

_ADVICE = "write --to timm, or keep the heirloom format"
# Fields that a class fixes, or has a field for; of the others of these names each class has VitConfig's default.
_CHECKED = ("size_width", "any_size", "tokens", "pool")
_WITH_HEAD = (VIT, DEIT, DINO, REGISTERS)


def write(cfg: VitConfig, folder: Path) -> None:
    """Write transformers' config.json. Raises InputError, with nothing written, for a model it has no class for."""
    ordinary(cfg, "hf")
    _refuse_averages(cfg)
    model = model_of(cfg)
    has = _parts(cfg, model)
    for name in (*_CHECKED, *cfg.options):
        if (value := getattr(cfg, name)) != has.get(name, getattr(VitConfig, name)):
            raise InputError(f"{name} is {value!r}, which transformers' {model.name} does not hold; {_ADVICE}")
    if cfg.gated and cfg.activation != "silu":
        raise InputError(f"activation is {cfg.activation!r} in a gated MLP, and DINOv2's has silu; {_ADVICE}")
    if cfg.classes and (model not in _WITH_HEAD or cfg.pooler):
        what = "a pooler and a head" if cfg.pooler else f"a head, and transformers' {model.name} has none"
        raise InputError(f"classes is {cfg.classes}: the model has {what}; {_ADVICE}")
    sizes: dict[str, Any] = dict(image_size=cfg.size, num_channels=cfg.channels, patch_size=cfg.patch)
    sizes |= dict(hidden_size=cfg.width, num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads)
    activation = "gelu" if cfg.gated else HF_NAMES[cfg.activation]  # transformers' SwiGLU does not read it
    sizes |= dict(hidden_act=activation, layer_norm_eps=cfg.eps)
    labels = {str(i): f"LABEL_{i}" for i in range(cfg.classes)}
    labelled = dict(id2label=labels, label2id={name: int(i) for i, name in labels.items()}) if labels else {}
    about = dict(architectures=[class_of(cfg)], model_type=model.kind)
    write_json(folder / "config.json", about | sizes | _fields(cfg, model) | labelled)


def write_flax(cfg: VitConfig, folder: Path) -> None:
    """Write the config.json of transformers' Flax ViT. Raises InputError as `write`, and for all but its classifier."""
    _refuse_averages(cfg)
    model = model_of(cfg)
    if model is not VIT or not cfg.classes:
        why = "transformers had no Flax DeiT" if model is DEIT else "of Flax, only a ViT that classifies is written"
        raise InputError(f"{why}: write this model --to hf, or keep the heirloom format")
    write(cfg, folder)


def _refuse_averages(cfg: VitConfig) -> None:
    if cfg.pool in ("norm_mean", "mean_norm"):
        raise InputError(
            "transformers' ViT puts a class token in front and classifies it, this model averages patches: no file of"
            " it computes the same. Write --to timm, which transformers reads through its timm wrapper, or train with"
            " tokens 'cls' and pool 'cls'"
        )


def _parts(cfg: VitConfig, model: Model) -> dict[str, Any]:
    """What a class of transformers has, by our names: fixed values, and the config's own where it has a field."""
    if model is SIGLIP:
        return dict(tokens="none", pool="map")
    if model is CLIP:
        return dict(tokens="cls", pool="cls", pre_norm=True, joint=cfg.joint)
    if model in (VIT, DEIT):
        tokens, pool = ("cls", "cls") if model is VIT else ("cls+dist", cfg.pool)
        return dict(tokens=tokens, pool=pool, pooler=cfg.pooler, qkv_bias=cfg.qkv_bias)
    has = dict(tokens="cls", pool="cls+mean" if cfg.classes else "cls", layer_scale=cfg.layer_scale)
    has |= dict(gated=cfg.gated, qkv_bias=cfg.qkv_bias, registers=cfg.registers)
    has |= dict(positions="cls") if model is REGISTERS else {}
    # On pictures of the model's own size any_size changes nothing.
    resamples = cfg.resample == ("antialiased" if model is REGISTERS else "plain")
    return has | dict(any_size=cfg.any_size and resamples)


def _fields(cfg: VitConfig, model: Model) -> dict[str, Any]:
    """The fields that not every model of transformers has."""
    if model is SIGLIP:
        return dict(intermediate_size=cfg.hidden, vision_use_head=True, attention_dropout=0.0)
    if model is CLIP:
        joint = dict(projection_dim=cfg.joint) if cfg.joint else {}
        return dict(intermediate_size=cfg.hidden, attention_dropout=0.0) | joint
    fields: dict[str, Any] = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, qkv_bias=cfg.qkv_bias)
    if model in (VIT, DEIT):
        pooler = dict(pooler_act="tanh", pooler_output_size=cfg.width) if cfg.pooler else {}
        return fields | dict(intermediate_size=cfg.hidden) | pooler
    fields |= dict(mlp_ratio=_ratio(cfg), use_swiglu_ffn=cfg.gated, layerscale_value=cfg.layer_scale)
    return fields | (dict(num_register_tokens=cfg.registers) if model is REGISTERS else dict(use_mask_token=False))


def _ratio(cfg: VitConfig) -> int:
    """DINOv2's `mlp_ratio`, a whole number. Raises InputError for hidden units that no ratio gives."""
    guess = round(cfg.hidden * (1.5 if cfg.gated else 1) / cfg.width)
    for ratio in (guess, guess - 1, guess + 1):
        if ratio > 0 and cfg.hidden == (swiglu(cfg.width * ratio) if cfg.gated else cfg.width * ratio):
            return ratio
    multiple = "two thirds of a multiple of the width, rounded up to 8" if cfg.gated else "a multiple of the width"
    raise InputError(f"hidden is {cfg.hidden}, and transformers' DINOv2 has {multiple}; {_ADVICE}")
