"""The model timm builds for a ViT's name and arguments, from the table of scripts/make_timm_table.py."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from heirloom.common.checkpoint.fields import Fields
from heirloom.common.checkpoint.weights import read_json
from heirloom.common.errors import InputError, nearest
from learngene.vit import VitConfig

FILE = Path(__file__).with_name("timm_architectures.json")
CLASSES = ("VisionTransformer", "VisionTransformerDistilled")
ACTIVATIONS = {"gelu": "gelu", "": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
# timm's LayerNorm has an eps of 1e-6; "eps=" appears only in the table, where timm's function sets another one.
NORMS = {"layernorm": 1e-6, "layer_norm": 1e-6, "LayerNorm": 1e-6, "layernormfp32": 1e-6, "": 1e-6}
# Arguments of VisionTransformer for parts that our ViT does not have: the values without the part, and the part.
PARTS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "init_values": ((None, 0), "LayerScale"),
    "reg_tokens": ((0,), "register tokens"),
    "qk_norm": ((False,), "norms of queries and keys"),
    "qkv_bias": ((True,), "queries, keys and values without biases"),
    "proj_bias": ((True,), "projections without biases"),
    "scale_attn_norm": ((False,), "a norm inside the attention"),
    "scale_mlp_norm": ((False,), "a norm inside the MLP"),
    "pre_norm": ((False,), "a norm before the blocks"),
    "final_norm": ((True,), "no norm after the blocks"),
    "embed_norm_layer": ((None, ""), "a norm of the patches"),
    "pos_embed": (("learn",), "positions that are not learned"),
    "pool_include_prefix": ((False,), "a mean over the tokens in front, too"),
    "embed_layer": (("PatchEmbed",), "a stem that is not one convolution"),
    "block_fn": (("Block",), "other blocks"),
    "mlp_layer": (("Mlp",), "another MLP, such as SwiGLU"),
    "attn_layer": (("attn", ""), "another attention"),
    "use_naflex": ((False,), "timm's NaFlexVit"),
}
# Fields that only the table has: timm takes no text for them.
_OF_THE_TABLE = ("class", "embed_layer", "block_fn", "mlp_layer")
# Arguments of training, initialisation, variable input sizes and loading, which do not change the function.
HARMLESS = (
    "drop_rate", "*_drop_rate", "drop_path_rate", "drop_block_rate", "weight_init", "fix_init", "dynamic_img_size",
    "dynamic_img_pad", "device", "dtype", "out_indices", "pretrained_strict", "scriptable", "exportable", "no_jit",
)  # fmt: skip


@lru_cache(maxsize=1)
def table() -> Mapping[str, Mapping[str, Any]]:
    """Read the table: by timm's name, the class and the arguments that timm's function of that name sets."""
    return read_json(FILE)["architectures"]


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
        kind = built["class"]
        raise InputError(f"{where}: timm builds {name!r} as its class {kind}; only its VisionTransformer can be read")
    return _fields({**(defaults or {}), **built}, given, where)


def described(cfg: VitConfig, given: Mapping[str, Any], where: str) -> Fields:
    """As `arguments`, for a model whose name is not timm's: `given` overrides the config inferred from shapes."""
    average = cfg.tokens != "cls+dist" and not cfg.pool.startswith("cls")
    pooling = dict(class_token=cfg.tokens != "none", global_pool="avg" if average else "token")
    mean = cfg.tokens != "cls+dist" and cfg.pool == "mean_norm"
    pooling |= {"class": CLASSES[cfg.tokens == "cls+dist"], "fc_norm": mean}
    return _fields(sizes(cfg) | dict(num_heads=cfg.heads or 1, act_layer=cfg.activation) | pooling, given, where)


def sizes(cfg: VitConfig) -> dict[str, Any]:
    """Sizes of a model as timm's arguments."""
    args: dict[str, Any] = dict(img_size=cfg.size, in_chans=cfg.channels, patch_size=cfg.patch)
    args |= dict(embed_dim=cfg.width, depth=cfg.layers)
    return args | dict(num_heads=cfg.heads, mlp_ratio=_ratio(cfg.hidden, cfg.width))


def _ratio(hidden: int, width: int) -> float:
    """The mlp_ratio with which timm gets `hidden`, rounded down from ratio times width."""
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
    args.agree("mlp_ratio times embed_dim", int(width * args.number("mlp_ratio", 4.0)), cfg.hidden)
    args.agree("img_size", args.square("img_size", cfg.size), cfg.size)
    args.agree("in_chans", args.integer("in_chans", cfg.channels), cfg.channels)
    args.agree("num_classes", args.integer("num_classes", cfg.classes, least=0), cfg.classes)
    args.done()
    return replace(cfg, heads=heads, activation=activation, eps=eps, **pooling)  # type: ignore[arg-type]


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
    if token:
        args.fixed("no_embed_class", False, feature="a class token without a position")
    args.skip("no_embed_class")
    average = args.choice("global_pool", {"token": False, "avg": True}, "token")
    if not average:
        args.fixed("fc_norm", None, False, feature="a norm of the class token alone")
    if (average and distilled) or not (token or (average and not distilled)):
        pool = "avg" if average else "token"
        what = f"class_token {token} and global_pool {pool!r}"
        raise InputError(f"{args.where}: timm builds no {args.text('class')} with {what}")
    if distilled:
        return dict(tokens="cls+dist", pool="cls+dist")
    mean = "mean_norm" if args.boolean("fc_norm", True) else "norm_mean"
    return dict(tokens="cls" if token else "none", pool=mean if average else "cls")
