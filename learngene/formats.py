"""Configurations of other ViTs, both ways; what shapes cannot tell is read from their JSON, or asked for (convert --set heads=6)."""

import re
from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoint.convert import Format, Found, Read
from common.checkpoint.verify import Check
from common.checkpoint.weights import Tensors, read_json, write_json
from common.errors import InputError
from common.typed import from_json
from learngene import layouts
from learngene.vit import VitConfig

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}  # of published ViTs, by width
_HF_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_SWS_LAYOUTS = {5: (3, 3, 4, 3, 3)}  # released
_SWS_HEADS, _SWS_EPS = 12, 1e-5  # of both released auxiliary nets
_TLEG_DEPTH = 12


def config(saved: Mapping[str, Any]) -> VitConfig:
    """The config of a weights folder of ours."""
    return from_json(VitConfig, saved)


def _sizes(tensors: Tensors, block: str, layers: int) -> dict[str, Any]:
    """What timm's names tell by their shapes; `block` is how the keys of the first one begin and end, around the module's name."""
    try:
        width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
        hidden, classes = len(tensors[block.format("mlp.fc1")]), len(tensors["head.weight"])
        positions = tensors["pos_embed"].shape[1]
    except (KeyError, ValueError) as error:
        raise InputError(f"looks like a ViT, but its tensors do not tell the sizes ({error}); only classifiers are read") from error
    tokens = "cls+dist" if "dist_token" in tensors else "cls" if "cls_token" in tensors else "none"
    grid = isqrt(positions)  # of a square with one or two tokens more, the same root
    mean = "fc_norm.weight" in tensors
    pool = "mean_norm" if mean else "cls+dist" if "head_dist.weight" in tensors else "norm_mean" if tokens == "none" else "cls"
    sizes: dict[str, Any] = dict(size=grid * patch, channels=channels, patch=patch, width=width, layers=layers, hidden=hidden)
    return sizes | dict(classes=classes, heads=HEADS.get(width, 0), tokens=tokens, pool=pool)


def _depth(tensors: Tensors, pattern: str) -> int:
    return 1 + max(int(m[1]) for key in tensors if (m := re.match(pattern, key)))


def _read_timm(tensors: Tensors, folder: Path) -> VitConfig | None:
    """A timm folder, which has a config.json; without one the same tensors are a file of DeiT."""
    if not (folder / "config.json").is_file() or (bare := _read_deit_tensors(tensors)) is None:
        return None
    theirs = read_json(folder / "config.json")
    args: dict[str, Any] = theirs.get("model_args") or {}
    pool = args.get("global_pool", theirs.get("global_pool"))
    if pool not in (None, "", "token", "avg"):
        raise InputError(f"config.json: global_pool {pool!r} is not read here, only 'token' and 'avg'")
    if bare.tokens == "cls" and bare.pool == "cls" and pool == "avg":
        bare = replace(bare, pool="norm_mean")
    if "quickgelu" in theirs.get("architecture", ""):
        bare = replace(bare, activation="quick_gelu")
    return replace(bare, heads=args.get("num_heads", bare.heads))


def _read_deit_tensors(tensors: Tensors) -> VitConfig | None:
    if not {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= tensors.keys():
        return None
    return VitConfig(**_sizes(tensors, "blocks.0.{}.weight", _depth(tensors, r"blocks\.(\d+)\.")))


def _read_deit(tensors: Tensors, folder: Path) -> VitConfig | None:
    return None if (folder / "config.json").is_file() else _read_deit_tensors(tensors)


def _ordinary(cfg: VitConfig, format: str) -> None:
    if cfg.gene != "none":
        raise InputError(f"a gene is no {format} model: expand it first (heirloom expand GENE DEST --depth N)")
    if cfg.activation != "gelu" and format != "hf":
        raise InputError(f"{format} has exact GELU here, this model has {cfg.activation}; keep the heirloom format")


def _write_timm(cfg: VitConfig, folder: Path) -> None:
    _ordinary(cfg, "timm")
    if cfg.eps != 1e-6:
        raise InputError(f"timm's ViT has an eps of 1e-6, this model {cfg.eps:g}: its outputs would differ; keep the heirloom format")
    if cfg.tokens == "cls+dist" and cfg.pool != "cls+dist":
        raise InputError("timm's distilled ViT has two heads, this model one; keep the heirloom format")
    args: dict[str, Any] = dict(img_size=cfg.size, in_chans=cfg.channels, patch_size=cfg.patch, embed_dim=cfg.width, depth=cfg.layers)
    args |= dict(num_heads=cfg.heads, mlp_ratio=cfg.hidden / cfg.width)
    if cfg.tokens != "cls+dist":
        args |= dict(class_token=cfg.tokens == "cls", global_pool="token" if cfg.pool == "cls" else "avg")
    if cfg.pool == "norm_mean":
        args |= dict(fc_norm=False)
    name = "deit_tiny_distilled_patch16_224" if cfg.tokens == "cls+dist" else "vit_tiny_patch16_224"
    pretrained = dict(num_classes=cfg.classes, input_size=[cfg.channels, cfg.size, cfg.size])
    about = dict(architecture=name, num_classes=cfg.classes, num_features=cfg.width, model_args=args, pretrained_cfg=pretrained)
    write_json(folder / "config.json", about)


def _write_deit(cfg: VitConfig, folder: Path) -> None:
    _ordinary(cfg, "DeiT")
    _published_heads(cfg, cfg.heads == HEADS.get(cfg.width))
    if cfg.eps != 1e-6:
        raise InputError(f"DeiT's files have an eps of 1e-6, this model {cfg.eps:g}; keep the heirloom format")
    if (cfg.tokens, cfg.pool) in (("cls", "norm_mean"), ("cls+dist", "cls"), ("cls+dist", "norm_mean")):
        raise InputError(f"a bare file cannot tell that tokens {cfg.tokens!r} are pooled as {cfg.pool!r}; write --to timm")


def _published_heads(cfg: VitConfig, known: bool) -> None:
    if not known:
        raise InputError(
            f"a bare file cannot tell {cfg.heads} heads at a width of {cfg.width}; write --to timm, or keep the heirloom format"
        )


def _read_sws(tensors: Tensors, folder: Path) -> VitConfig | None:
    if "blocks.block.attn.qkv.instances.0.weight" not in tensors:
        return None
    stages = _depth(tensors, r"blocks\.block\.attn\.qkv\.instances\.(\d+)\.")
    sizes = _sizes(tensors, "blocks.block.{}.instances.0.weight", stages)
    # Stages beyond the released five say nothing of their layout: 1 each until told (--set layout=2,2,2).
    layout = _SWS_LAYOUTS.get(stages, (1,) * stages)
    return VitConfig(**sizes | dict(heads=_SWS_HEADS, eps=_SWS_EPS, gene="sws", layout=layout))


def _read_tleg(tensors: Tensors, folder: Path) -> VitConfig | None:
    if "blocks.block.attn.qkv.instances.0.weight_base" not in tensors:
        return None
    sizes = _sizes(tensors, "blocks.block.{}.instances.0.weight_base", 2)
    return VitConfig(**sizes | dict(eps=_SWS_EPS, gene="tleg", layout=(_TLEG_DEPTH,)))


def _write_sws(cfg: VitConfig, folder: Path) -> None:
    _gene(cfg, "sws", cfg.layout == _SWS_LAYOUTS.get(cfg.layers))
    _published_heads(cfg, cfg.heads == _SWS_HEADS)


def _write_tleg(cfg: VitConfig, folder: Path) -> None:
    _gene(cfg, "tleg", cfg.layout == (_TLEG_DEPTH,))
    _published_heads(cfg, cfg.heads == HEADS.get(cfg.width))


def _gene(cfg: VitConfig, kind: str, released: bool) -> None:
    if cfg.gene != kind:
        raise InputError(f"this is no gene of {kind}, and its file can hold nothing else")
    if not released or cfg.eps != _SWS_EPS or cfg.activation != "gelu":
        raise InputError(
            f"a file of {kind} cannot tell layout {cfg.layout} and eps {cfg.eps:g}: it holds released ones; keep the heirloom format"
        )


def _read_hf(tensors: Tensors, folder: Path) -> VitConfig | None:
    model = next((m for m in ("vit", "deit") if f"{m}.embeddings.cls_token" in tensors), None)
    if model is None:
        return None
    if not (folder / "config.json").is_file():
        raise InputError("a Hugging Face ViT needs its config.json beside the weights; there is none")
    defaults: dict[str, Any] = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
    defaults |= dict(hidden_act="gelu", layer_norm_eps=1e-12, image_size=224, patch_size=16, num_channels=3, qkv_bias=True)
    theirs = defaults | read_json(folder / "config.json")
    if not theirs["qkv_bias"]:
        raise InputError("config.json: qkv_bias is false; only ViTs with these biases are read")
    if theirs["hidden_act"] not in _HF_ACTIVATIONS:
        raise InputError(f"config.json: activation {theirs['hidden_act']!r} is not one of {', '.join(_HF_ACTIVATIONS)}")
    two = "distillation_classifier.weight" in tensors
    head = "cls_classifier.weight" if two else "classifier.weight"
    if head not in tensors:
        raise InputError("has no classifier: only ViTs that classify are read (ViTForImageClassification)")
    return VitConfig(
        size=theirs["image_size"],
        channels=theirs["num_channels"],
        patch=theirs["patch_size"],
        width=theirs["hidden_size"],
        layers=theirs["num_hidden_layers"],
        heads=theirs["num_attention_heads"],
        hidden=theirs["intermediate_size"],
        classes=len(tensors[head]),
        tokens="cls+dist" if model == "deit" else "cls",
        pool="cls+dist" if two else "cls",
        activation=_HF_ACTIVATIONS[theirs["hidden_act"]],  # type: ignore[arg-type]
        eps=theirs["layer_norm_eps"],
    )


def _write_hf(cfg: VitConfig, folder: Path) -> None:
    _ordinary(cfg, "hf")
    if cfg.pool not in ("cls", "cls+dist"):
        raise InputError(
            "transformers' ViT puts a class token in front and classifies it, this model averages patches: no file of it computes the "
            "same. Write --to timm, which transformers reads through its timm wrapper, or train with tokens 'cls' and pool 'cls'"
        )
    names = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    model = "deit" if cfg.tokens == "cls+dist" else "vit"
    kind = {"vit": "ViTForImageClassification", "deit": "DeiTForImageClassification"}[model]
    kind += "WithTeacher" if cfg.pool == "cls+dist" else ""
    sizes: dict[str, Any] = dict(image_size=cfg.size, num_channels=cfg.channels, patch_size=cfg.patch, hidden_size=cfg.width)
    sizes |= dict(num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, intermediate_size=cfg.hidden, qkv_bias=True)
    sizes |= dict(hidden_act=names[cfg.activation], layer_norm_eps=cfg.eps, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    labels = {str(i): f"LABEL_{i}" for i in range(cfg.classes)}
    labelled = dict(id2label=labels, label2id={name: int(i) for i, name in labels.items()})
    write_json(folder / "config.json", dict(architectures=[kind], model_type=model) | sizes | labelled)


def _clean_google(key: str) -> str:
    """big_vision's names, and those of training states, as vision_transformer's."""
    key = re.sub(r"^(params|opt/target)/", "", key)
    key = "Transformer/posembed_input/pos_embedding" if key == "pos_embedding" else key
    if "/LayerNorm_1/" in key or "/MlpBlock_0/" in key or "DotProductAttention_0/" in key:
        for theirs, ours in (("LayerNorm_1", "LayerNorm_2"), ("MlpBlock_0", "MlpBlock_3"), ("ProductAttention_0", "ProductAttention_1")):
            key = key.replace(theirs, ours)
    return key


def _read_google(tensors: Tensors, folder: Path) -> VitConfig | None:
    if not {"embedding/kernel", "Transformer/encoder_norm/scale"} <= tensors.keys():
        return None
    try:
        patch, _, channels, width = tensors["embedding/kernel"].shape
        heads = tensors["Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"].shape[1]
        hidden = len(tensors["Transformer/encoderblock_0/MlpBlock_3/Dense_0/bias"])
        grid, classes = isqrt(tensors["Transformer/posembed_input/pos_embedding"].shape[1]), len(tensors["head/bias"])
    except (KeyError, ValueError) as error:
        raise InputError(f"looks like a ViT of google-research, but {error} is missing; only classifiers with learned positions") from error
    cls = "cls" in tensors
    sizes: dict[str, Any] = dict(size=grid * patch, channels=channels, patch=patch, width=width, heads=heads, hidden=hidden)
    sizes |= dict(layers=_depth(tensors, r"Transformer/encoderblock_(\d+)/"), classes=classes)
    # flax's gelu is the tanh form; timm, which reads these files as well, takes the exact one (--set activation=gelu).
    return VitConfig(**sizes, tokens="cls" if cls else "none", pool="cls" if cls else "norm_mean", activation="gelu_tanh")


def _write_google(cfg: VitConfig, folder: Path) -> None:
    if cfg.gene != "none":
        _ordinary(cfg, "google")
    if (cfg.tokens, cfg.pool) not in (("cls", "cls"), ("none", "norm_mean")) or cfg.activation != "gelu_tanh" or cfg.eps != 1e-6:
        raise InputError(
            "google-research's ViT has tanh GELU, eps 1e-6 and one class token, or the mean of normalised tokens; this one differs"
        )


def _plain(read: Any) -> Any:
    def config(found: Found) -> Read | None:
        cfg = read(found.tensors, found.folder)
        return cfg and Read(cfg)

    return config


FORMATS = (
    Format("timm", layouts.timm, "model.safetensors", _plain(_read_timm), _write_timm),
    Format("deit", layouts.timm, "deit.pth", _plain(_read_deit), _write_deit, wrapper="model"),
    Format("hf", layouts.hf, "model.safetensors", _plain(_read_hf), _write_hf),
    Format("sws", layouts.sws, "sws.pth", _plain(_read_sws), _write_sws, wrapper="model"),
    Format("tleg", layouts.tleg, "tleg.pth", _plain(_read_tleg), _write_tleg, wrapper="model"),
    Format("google", layouts.google, "vit.npz", _plain(_read_google), _write_google, clean=_clean_google),
)


def finite(cfg: Any, params: Mapping[str, Any], file: Path, format: str) -> Check:
    """The structural check of a model that has no reference."""
    passed = all(np.isfinite(np.asarray(value)).all() for value in params.values())
    return Check(passed, None, note="structure and finiteness only: this format has no reference")
