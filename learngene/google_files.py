"""Read and write ViTs in the .npz archives of google-research/vision_transformer and big_vision."""

import re
from math import isqrt
from pathlib import Path
from typing import Any

from heirloom.common.checkpoint.family import Found, Guess, Read
from heirloom.common.errors import InputError
from heirloom.common.vit.model import VitConfig
from heirloom.common.vit.shapes import depth
from learngene.bare_files import ordinary, plain, square

_PARTS = {
    "MAPHead_0/": "attention pooling",
    "pre_logits/": "a layer before the head (pre_logits)",
    "conv_root/": "a convolutional stem",
}


def clean(key: str) -> str:
    """Rename a key of big_vision, or of a training state, to its name in vision_transformer."""
    key = re.sub(r"^(params|opt/target)/", "", key)
    key = "Transformer/posembed_input/pos_embedding" if key == "pos_embedding" else key
    if "/LayerNorm_1/" in key or "/MlpBlock_0/" in key or "DotProductAttention_0/" in key:
        for theirs, ours in (
            ("LayerNorm_1", "LayerNorm_2"),
            ("MlpBlock_0", "MlpBlock_3"),
            ("ProductAttention_0", "ProductAttention_1"),
        ):
            key = key.replace(theirs, ours)
    return key


def read(found: Found) -> Read | None:
    tensors = found.tensors
    if not {"embedding/kernel", "Transformer/encoder_norm/scale"} <= tensors.keys():
        return None
    for prefix, part in _PARTS.items():
        if any(key.startswith(prefix) for key in tensors):
            raise InputError(f"has {part} ({prefix}*), which the ViT here does not have")
    try:
        patch, across, channels, width = tensors["embedding/kernel"].shape
        heads = tensors["Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"].shape[1]
        hidden = len(tensors["Transformer/encoderblock_0/MlpBlock_3/Dense_0/bias"])
        positions, classes = tensors["Transformer/posembed_input/pos_embedding"].shape[1], len(tensors["head/bias"])
    except (KeyError, ValueError, IndexError) as error:
        needed = "a classifier with learned positions is needed"
        raise InputError(f"looks like a ViT of google-research, but {error} is missing: {needed}") from error
    cls, grid = "cls" in tensors, isqrt(positions)
    if patch != across:
        raise InputError(f"its patches are {patch} x {across} px: only square ones are read")
    if positions != grid**2 + cls:
        token = " and of its class token" if cls else ""
        raise InputError(f"has {positions} positions, not those of a square of patches{token}")
    sizes: dict[str, Any] = dict(size=grid * patch, channels=channels, patch=patch)
    sizes |= dict(width=width, heads=heads, hidden=hidden)
    sizes |= dict(layers=depth(tensors, r"Transformer/encoderblock_(\d+)/"), classes=classes)
    cfg = VitConfig(
        **sizes, tokens="cls" if cls else "none", pool="cls" if cls else "norm_mean", activation="gelu_tanh"
    )
    forms = "flax, which wrote it, has the tanh form, and timm, which reads it too, the exact one (gelu)"
    why = f"the archive does not contain it; {forms}"
    return Read(cfg, (Guess("activation", cfg.activation, why), *square(cfg, "the archive does not contain it")))


def write(cfg: VitConfig, folder: Path) -> None:
    ordinary(cfg, "google")
    plain(cfg, "an archive of google-research")
    if (cfg.tokens, cfg.pool) not in (("cls", "cls"), ("none", "norm_mean")):
        classified = "one class token, or without one the mean of normalised patches"
        this = f"this model has tokens {cfg.tokens!r} and pool {cfg.pool!r}: keep the heirloom format"
        raise InputError(f"google-research's ViT classifies {classified}; {this}")
    for name, theirs, ours in (("activation", "gelu_tanh", cfg.activation), ("eps", "1e-06", f"{cfg.eps:g}")):
        if ours != theirs:
            other = f"{name} {theirs}, this model {ours}"
            may = f"convert with --set {name}={theirs} if its outputs may differ a little"
            raise InputError(f"google-research's ViT has {other}: {may}")
