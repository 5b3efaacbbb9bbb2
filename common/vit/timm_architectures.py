"""The model timm builds for a ViT's name and arguments, from the table of scripts/make_timm_table.py."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from heirloom.common.checkpoint.fields import Fields
from heirloom.common.errors import InputError, nearest
from heirloom.common.files import read_json
from heirloom.common.vit.model import Positions, VitConfig

FILE = Path(__file__).with_name("timm_architectures.json")
CLASSES = ("VisionTransformer", "VisionTransformerDistilled")
ACTIVATIONS = {
    "gelu": "gelu", "": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu", "SiLU": "silu",
}  # fmt: skip
# timm's LayerNorm has an eps of 1e-6; "eps=" appears only in the table, where timm's function sets another one.
NORMS = {"layernorm": 1e-6, "layer_norm": 1e-6, "LayerNorm": 1e-6, "layernormfp32": 1e-6, "": 1e-6}
# Arguments of VisionTransformer for parts that our ViT does not have: the values without the part, and the part.
PARTS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "proj_bias": ((True,), "projections without biases"),
    "embed_norm_layer": ((None, ""), "a norm of the patches"),
    "pos_embed": (("learn",), "positions that are not learned"),
    "pool_include_prefix": ((False,), "a mean over the tokens in front, too"),
    "embed_layer": (("PatchEmbed",), "a stem that is not one convolution"),
    "block_fn": (("Block",), "other blocks"),
    "mlp_layer": (("Mlp", "SwiGLUPacked"), "another MLP"),
    "attn_layer": (("attn", ""), "another attention"),
    "use_naflex": ((False,), "timm's NaFlexVit"),
}
# Classes of timm that are no VisionTransformer, and what makes them differ.
OTHERS = {
    "Eva": "which has rotary positions",
    "Beit": "which has relative positions",
    "VisionTransformerRelPos": "which has relative positions",
    "VisionTransformerSAM": "which has relative positions and windows",
}
# Fields that only the table has: timm takes no text for them.
_OF_THE_TABLE = ("class", "embed_layer", "block_fn", "mlp_layer")
# Arguments of training, initialisation, variable input sizes and loading, which do not change the function.
HARMLESS = (
    "drop_rate", "*_drop_rate", "drop_path_rate", "drop_block_rate", "weight_init", "fix_init",
    "device", "dtype", "out_indices", "pretrained_strict", "scriptable", "exportable", "no_jit",
)  # fmt: skip


@lru_cache(maxsize=1)
def table() -> Mapping[str, Mapping[str, Any]]:
    """Read the table: by timm's name, the class and the arguments that timm's function of that name sets."""
    return read_json(FILE)["architectures"]


@lru_cache(maxsize=1)
def _preprocessing() -> Mapping[str, Mapping[str, Any]]:
    return {name: shared["fields"] for shared in read_json(FILE)["preprocessing"] for name in shared["of"]}


def preprocessing(name: str) -> Mapping[str, Any]:
    """Fields of timm's preprocessing (mean, std, interpolation, crop_pct, crop_mode) for a name in the table, which may
    have a tag; empty for another name.
    """
    return _preprocessing().get(name) or _preprocessing().get(name.partition(".")[0], {})


def arguments(name: str, given: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None) -> Fields:
    """Arguments with which timm builds a model for `settings`. Raises InputError for parts our ViT does not have.

    given: arguments that override those of timm's function of this name. defaults: values for arguments that neither
    sets.
    """
    if name not in table():
        near = f"{name!r}{nearest(name, table())}; if it is a plain ViT, name one of them"
        write = "such as 'vit_tiny_patch16_224', and write the differences into model_args"
        raise InputError(f"{where}: timm's ViTs have no architecture {near}, {write}")
    built = table()[name]
    if built["class"] not in CLASSES:
        kind = f"{built['class']}{', ' * (built['class'] in OTHERS)}{OTHERS.get(built['class'], '')}"
        raise InputError(f"{where}: timm builds {name!r} as its class {kind}; only its VisionTransformer can be read")
    return _fields({**(defaults or {}), **built}, given, where)


def described(cfg: VitConfig, given: Mapping[str, Any], where: str) -> Fields:
    """As `arguments`, for a model whose name is not timm's: `given` overrides the config inferred from shapes."""
    built: dict[str, Any] = sizes(cfg) | parts(cfg) | dict(num_heads=cfg.heads or 1, act_layer=cfg.activation)
    built |= {"class": CLASSES[cfg.tokens == "cls+dist"], "mlp_layer": "SwiGLUPacked" if cfg.gated else "Mlp"}
    built |= dict(fc_norm=cfg.tokens != "cls+dist" and cfg.pool == "mean_norm")
    return _fields(built, given, where)


def sizes(cfg: VitConfig) -> dict[str, Any]:
    """Sizes of a model as timm's arguments."""
    picture = cfg.size if cfg.size_width is None else list(cfg.picture)
    args: dict[str, Any] = dict(img_size=picture, in_chans=cfg.channels, patch_size=cfg.patch)
    args |= dict(embed_dim=cfg.width, depth=cfg.layers)
    return args | dict(num_heads=cfg.heads, mlp_ratio=ratio_of(cfg.hidden * (1 + cfg.gated), cfg.width))


def parts(cfg: VitConfig) -> dict[str, Any]:
    """Tokens, pooling and options of a model as timm's arguments, where they are not those of its VisionTransformer.

    timm's distilled ViT has its own tokens and pooling.
    """
    args: dict[str, Any] = dict(reg_tokens=cfg.registers, no_embed_class=cfg.positions == "patches")
    args |= dict(init_values=cfg.layer_scale, qkv_bias=cfg.qkv_bias, qk_norm=cfg.qk_norm)
    args |= dict(scale_attn_norm=cfg.inner_norms, scale_mlp_norm=cfg.inner_norms)
    args |= dict(pre_norm=cfg.pre_norm, final_norm=cfg.final_norm, dynamic_img_size=cfg.any_size)
    if cfg.tokens != "cls+dist":
        pool = {"map": "map", "cls": "token", "mean_norm": "avg", "norm_mean": "avg"}[cfg.pool]
        args |= dict(class_token=cfg.tokens == "cls", global_pool=pool)
    usual = dict.fromkeys(args, False) | dict(
        class_token=True, global_pool="token", qkv_bias=True, final_norm=True, reg_tokens=0, init_values=0.0
    )
    args = {name: value for name, value in args.items() if value != usual[name]}
    return args | (dict(fc_norm=False) if cfg.pool == "norm_mean" and cfg.tokens != "cls+dist" else {})


def ratio_of(hidden: int, width: int) -> float:
    """The mlp_ratio with which timm and open_clip get `hidden`, rounded down from ratio times width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _fields(built: Mapping[str, Any], given: Mapping[Any, Any], where: str) -> Fields:
    given = {key: value for key, value in given.items() if value is not None}  # timm drops None
    for key, value in given.items():
        if not isinstance(key, str) or not isinstance(value, str | int | float | list | tuple):
            kind = type(value).__name__
            raise InputError(f"{where}: {key!r} is of type {kind}; only numbers, texts and lists can be read")
        if key in _OF_THE_TABLE:
            raise InputError(f"{where}: {key} is {value!r}, which timm builds no VisionTransformer with; remove it")
    if "norm_layer" in given:
        _norm(Fields(given, where).text("norm_layer"), where)
    args = Fields({**built, **given}, where)
    for argument, (values, part) in PARTS.items():
        args.fixed(argument, *values, feature=part)
    args.skip(*HARMLESS)
    return args


def settings(args: Fields, cfg: VitConfig) -> VitConfig:
    """Complete `cfg`, inferred from shapes, with `arguments`. Raises InputError when their sizes differ."""
    pooling, eps = _pooling(args), _eps(args)
    heads, activation = args.integer("num_heads", 12), args.choice("act_layer", ACTIVATIONS, "gelu")
    width = args.integer("embed_dim", 768)
    args.agree("embed_dim", width, cfg.width)
    args.agree("depth", args.integer("depth", 12), cfg.layers)
    args.agree("patch_size", args.square("patch_size", 16), cfg.patch)
    gated = args.text("mlp_layer", "Mlp") == "SwiGLUPacked"
    hidden = int(width * args.number("mlp_ratio", 4.0))
    args.agree("mlp_ratio times embed_dim", hidden, cfg.hidden * (1 + cfg.gated))
    args.agree("mlp_layer", "SwiGLUPacked" if gated else "Mlp", "SwiGLUPacked" if cfg.gated else "Mlp")
    args.agree("in_chans", args.integer("in_chans", cfg.channels), cfg.channels)
    args.agree("num_classes", args.integer("num_classes", cfg.classes, least=0), cfg.classes)
    options = _options(args, cfg)
    said = replace(cfg, heads=heads, activation=activation, eps=eps, **pooling, **options)  # type: ignore[arg-type]
    said = _placed(args, said, cfg)
    args.done()
    return said


def _options(args: Fields, cfg: VitConfig) -> dict[str, Any]:
    """Read the options, which the tensors must have, too."""
    scale, any_size = args.number("init_values", 0.0) or 0.0, args.boolean("dynamic_img_size", False)
    if bool(scale) != bool(cfg.layer_scale):  # a file does not hold the initial value
        args.agree("init_values", scale, cfg.layer_scale)
    args.agree("reg_tokens", args.integer("reg_tokens", 0, least=0), cfg.registers)
    args.agree("qkv_bias", args.boolean("qkv_bias", True), cfg.qkv_bias)
    args.agree("qk_norm", args.boolean("qk_norm", False), cfg.qk_norm)
    args.agree("pre_norm", args.boolean("pre_norm", False), cfg.pre_norm)
    args.agree("final_norm", args.boolean("final_norm", True), cfg.final_norm)
    args.agree("scale_attn_norm", args.boolean("scale_attn_norm", False), cfg.inner_norms)
    args.agree("scale_mlp_norm", args.boolean("scale_mlp_norm", False), cfg.inner_norms)
    # timm pads pictures that patches do not fill; the ViT here would cut them, so that it reads none of other sizes.
    return dict(layer_scale=scale, any_size=any_size and not args.boolean("dynamic_img_pad", False))


def _placed(args: Fields, said: VitConfig, cfg: VitConfig) -> VitConfig:
    """Read the size of the input and which tokens have positions; `cfg` has as many positions as the weights."""
    alone = args.boolean("no_embed_class", False) and cfg.prefix > 0
    placed: Positions = "patches" if alone else "cls" if cfg.positions == "cls" else "all"
    height, width = args.sides("img_size", cfg.picture)
    across = None if width == height else width
    said = replace(said, positions=placed, size=height, size_width=across)
    if args.boolean("dynamic_img_pad", False) and (height % cfg.patch or width % cfg.patch):
        fill = f"patches of {cfg.patch} px do not fill pictures of {height} x {width} px"
        raise args.refusal("dynamic_img_pad", f"{fill}, and a ViT that pads them is not read")
    if said.count != cfg.count:
        if cfg.size_width is None:
            args.agree("no_embed_class", placed == "patches", cfg.positions == "patches")
            args.agree("img_size", list(said.picture) if across else height, cfg.size)
        given = f"img_size {height} x {width} with patches of {cfg.patch} and {said.placed} tokens in front"
        raise InputError(f"{args.where}: {given} needs {said.count} positions, and the weights have {cfg.count}")
    return said


def _eps(args: Fields) -> float:
    norm = args.text("norm_layer", "layernorm")
    name, _, eps = norm.partition(" eps=")
    return float(eps) if eps else _norm(name, args.where)


def _norm(name: str, where: str) -> float:
    """Epsilon of a norm, by timm's name."""
    if name not in NORMS:
        raise InputError(f"{where}: norm_layer is {name!r}; only models where it is 'layernorm' can be read")
    return NORMS[name]


def _pooling(args: Fields) -> dict[str, Any]:
    """Read the learned tokens and the pooling."""
    token, distilled = args.boolean("class_token", True), args.text("class") == CLASSES[1]
    pool = args.choice("global_pool", {"token": "token", "avg": "avg", "map": "map"}, "token")
    if pool != "avg":
        what = "the class token" if pool == "token" else "the pooled features"
        args.fixed("fc_norm", None, False, feature=f"a norm of {what} alone")
    if (distilled and (pool != "token" or args.value("reg_tokens"))) or (not token and (distilled or pool == "token")):
        what = f"class_token {token} and global_pool {pool!r}"
        raise InputError(f"{args.where}: timm builds no {args.text('class')} with {what}")
    if distilled:
        return dict(tokens="cls+dist", pool="cls+dist")
    mean = "mean_norm" if args.boolean("fc_norm", True) else "norm_mean"
    return dict(tokens="cls" if token else "none", pool={"token": "cls", "avg": mean, "map": "map"}[pool])
