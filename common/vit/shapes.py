"""The config of a ViT as far as the names and shapes of its tensors tell it, in timm's names."""

import re
from fnmatch import fnmatchcase
from math import isqrt
from typing import Any

from heirloom.common.checkpoint.weights import Tensors
from heirloom.common.errors import InputError
from heirloom.common.vit.model import VitConfig

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16}  # of published ViTs, by width
LAYER_SCALE = 1e-5  # initial value; a file holds the learned factors alone
# Tensors of parts that this ViT does not have, by globs of timm's names and the original repositories'.
_PARTS = {
    "*relative_position*": "relative positions",
    "*.rel_pos.*": "relative positions",
    "*rope*": "rotary positions",
    "patch_embed.backbone.*": "a convolutional stem",
    "patch_embed.norm.*": "a norm of the patches",
    "pre_logits.*": "a layer before the head (pre_logits)",
    "decoder_blocks.*": "the decoder of a masked autoencoder",
    "*.mlp.fc1_g.*": "a gated MLP with a tensor of its own for the gate",
    "*.attn.lambda_*": "differential attention",
    "*.attn.gate.*": "a gated attention",
    "blocks.*.attns.*": "parallel attentions",
    "blocks.*.in_proj.*": "parallel attention and MLP",
}


def refuse_other_parts(tensors: Tensors) -> None:
    """Raises InputError when the tensors contain a part that this ViT does not have, with its name."""
    for glob, part in _PARTS.items():
        if key := next((key for key in tensors if fnmatchcase(key, glob)), None):
            raise InputError(f"has {part} ({key}), which the ViT here does not have")
    if key := next((key for key in tensors if re.match(r"head\.\d+\.", key)), None):
        only = "only one linear layer, head.weight and head.bias, is read"
        raise InputError(f"has a head of several layers ({key}): {only}; leave head.* out to get the backbone")


def depth(tensors: Tensors, pattern: str) -> int:
    """Number of blocks, from the largest index that `pattern` finds in the keys."""
    return 1 + max((int(m[1]) for key in tensors if (m := re.match(pattern, key))), default=0)


def shapes(tensors: Tensors, block: str, layers: int) -> VitConfig:
    """Infer the config from names and shapes. block: pattern of the first block's keys, {} for the module.

    A number of positions that is not a square of patches, with or without the tokens before them, becomes one row of
    patches: only a config can tell the rectangle.
    """
    try:
        width, channels, patch, across = tensors["patch_embed.proj.weight"].shape
        hidden = tensors[block.format("mlp.fc2")].shape[1]
        up = len(tensors[block.format("mlp.fc1")])
        positions = tensors["pos_embed"].shape[1]
        registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    except (KeyError, ValueError, IndexError) as error:
        refuse_other_parts(tensors)
        needed = "a ViT with learned positions is needed"
        raise InputError(f"looks like a ViT, but its tensors do not give the sizes ({error}): {needed}") from error
    if patch != across:
        raise InputError(f"its patches are {patch} x {across} px; only square ones are read")
    tokens = "cls+dist" if "dist_token" in tensors else "cls" if "cls_token" in tensors else "none"
    cfg: dict[str, Any] = dict(channels=channels, patch=patch, width=width, layers=layers, hidden=hidden)
    cfg |= dict(heads=HEADS.get(width, 0), tokens=tokens, registers=registers, pool=_pool(tokens, tensors))
    cfg |= dict(classes=len(tensors["head.weight"]) if "head.weight" in tensors else 0)
    cfg |= dict(gated=True, activation="silu") if up == 2 * hidden else {}
    return VitConfig(**cfg, **_options(tensors, block), **_place(positions, **cfg))


def _pool(tokens: str, tensors: Tensors) -> str:
    if "attn_pool.latent" in tensors:
        return "map"
    if "fc_norm.weight" in tensors:
        return "mean_norm"
    if "head_dist.weight" in tensors:
        return "cls+dist"
    return "norm_mean" if tokens == "none" else "cls"


def _options(tensors: Tensors, block: str) -> dict[str, Any]:
    """Read the options that the presence of a tensor tells."""
    within = block.partition("{}")[0]
    return dict(
        pre_norm="norm_pre.weight" in tensors,
        final_norm="norm.weight" in tensors or "fc_norm.weight" in tensors,
        qkv_bias=block.replace("weight", "bias").format("attn.qkv") in tensors,
        qk_norm=f"{within}attn.q_norm.weight" in tensors,
        inner_norms=f"{within}attn.norm.weight" in tensors,
        layer_scale=LAYER_SCALE if f"{within}ls1.gamma" in tensors else 0.0,
    )


def _place(positions: int, *, patch: int, tokens: str, registers: int, **others: Any) -> dict[str, Any]:
    """Size of the input and tokens with positions, from the number of positions."""
    learned = {"none": 0, "cls": 1, "cls+dist": 2}[tokens]
    front = {"all": learned + registers, "cls": learned, "patches": 0}
    for placed, count in front.items():
        side = isqrt(max(positions - count, 0))
        if side and side * side == positions - count:
            return dict(size=side * patch, positions=placed)
    # As many patches in a row, with positions of the tokens where there are more than these.
    count = positions - front["all"]
    if count < 1:
        return dict(size=patch, size_width=positions * patch, positions="patches")
    return dict(size=patch, size_width=count * patch, positions="all")


def check_square(cfg: VitConfig, tensors: Tensors) -> None:
    """Check that the positions are those of one square, for a file without a config. Raises InputError."""
    positions = tensors["pos_embed"].shape[1]
    sides = {isqrt(max(positions - count, 0)) ** 2 for count in (cfg.prefix, len(cfg.learned), 0)}
    squares = [count for count in dict.fromkeys((cfg.prefix, len(cfg.learned), 0)) if positions - count in sides - {0}]
    if len(squares) > 1:
        what = f"{positions} positions, which are those of a square with {squares[0]} or {squares[1]} tokens in front"
        raise InputError(f"has {what}: only a config can tell which")
    if not squares:
        what = f"{positions} positions, which are not a square of patches and {cfg.prefix} tokens in front"
        raise InputError(f"has {what}: only a config can tell the sides of a rectangle")
