"""Layouts of transformers' ViTs: ViT, DeiT and the encoder of ViT-MAE, DINOv2, and the image towers of CLIP and SigLIP;
and of its Flax ViT.

The position table of an image tower is the weight of an embedding, [token, embed]; its attention pooling packs the
projections of query, key and value, as torch's MultiheadAttention does.
"""

import numpy as np

from heirloom.common.surgery.layout import Layout
from heirloom.common.surgery.rows import PATCH, Rows, flax_blocks, module, modules, packed
from heirloom.common.vit.layouts import positions, stem
from heirloom.common.vit.model import VitConfig
from learngene.hf_models import (
    CLIP,
    CLIP_CLASSIFIER,
    DEIT,
    DINO,
    REGISTERS,
    SIGLIP,
    SIGLIP_CLASSIFIER,
    VIT,
    model_of,
    prefix_of,
)

_ATTENTION = {f"attn/{name}": f"attention.attention.{name}" for name in ("query", "key", "value")}
_ATTENTION |= {"attn/out": "attention.output.dense"}
_VIT = _ATTENTION | {
    "attn_norm": "layernorm_before",
    "mlp_norm": "layernorm_after",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
}
_DINO = _ATTENTION | {"attn_norm": "norm1", "mlp_norm": "norm2", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}
_TOWER = {f"attn/{name}": f"self_attn.{name[0]}_proj" for name in ("query", "key", "value")}
_TOWER |= {"attn/out": "self_attn.out_proj", "attn_norm": "layer_norm1", "mlp_norm": "layer_norm2"}
_TOWER |= {"mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}
_POOL = {"attn/out": "attention.out_proj", "norm": "layernorm", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}
_PACKED = ("in_proj_weight", "in_proj_bias")


def hf(cfg: VitConfig) -> Layout:
    """Layout of transformers' model for this config."""
    rows = {VIT: _encoder, DEIT: _encoder, DINO: _dinov2, REGISTERS: _dinov2, CLIP: _clip, SIGLIP: _siglip}
    rows |= {CLIP_CLASSIFIER: _clip, SIGLIP_CLASSIFIER: _siglip}
    model, prefix = model_of(cfg), prefix_of(cfg)
    # A DINOv2 with registers always has a mask token; in reading, any is left out.
    mask = {f"{prefix}embeddings.mask_token": np.zeros((1, cfg.width), np.float32)} if model is REGISTERS else {}
    return Layout("hf", rows[model](cfg, prefix), ignore=("**.position_ids",), constant=mask)


def flax(cfg: VitConfig) -> Layout:
    """Layout of transformers' Flax ViT: the names of its ViT, and kernels that read first."""
    patch = "vit/embeddings/patch_embeddings/projection"
    return Layout(
        "flax",
        (
            ("patch/project/kernel", f"{patch}/kernel", "patch_row patch_col channel embed"),
            ("patch/project/bias", f"{patch}/bias"),
            ("class_token/cls", "vit/embeddings/cls_token", "1 1 embed"),
            *positions(cfg, "vit/embeddings/position_embeddings"),
            *flax_blocks("blocks", "vit/encoder/layer/{layer}", _VIT),
            ("norm/scale", "vit/layernorm/scale"),
            ("norm/bias", "vit/layernorm/bias"),
            ("head/kernel", "classifier/kernel", "embed class"),
            ("head/bias", "classifier/bias"),
        ),
    )


def _embeddings(cfg: VitConfig, prefix: str) -> Rows:
    """Stem, final norm and head of all but the image towers."""
    embeddings = f"{prefix}embeddings"
    tokens = (f"{embeddings}.{name}" for name in ("cls_token", "distillation_token", "position_embeddings"))
    head = "cls_classifier" if cfg.pool == "cls+dist" else "classifier"
    two = "class (pooled embed)"  # DINOv2's head reads the class token next to the mean of the patches
    heads = (("head/kernel", f"{head}.weight", two), ("head/bias", f"{head}.bias"))
    return (
        *stem(cfg, f"{embeddings}.patch_embeddings.projection", *tokens),
        ("registers/register", f"{embeddings}.register_tokens", "1 register embed"),
        *module("norm", f"{prefix}layernorm"),
        *module("pooler", f"{prefix}pooler.dense"),
        *(heads if cfg.pool == "cls+mean" else module("head", head)),
        *module("distillation_head", "distillation_classifier"),
    )


def _encoder(cfg: VitConfig, prefix: str) -> Rows:
    return (*_embeddings(cfg, prefix), *modules("blocks", f"{prefix}encoder.layer.{{layer}}", _VIT))


def _dinov2(cfg: VitConfig, prefix: str) -> Rows:
    block = f"{prefix}encoder.layer.{{layer}}"
    names = _DINO | ({"mlp/down": "mlp.weights_out"} if cfg.gated else {})
    if cfg.gated:
        names.pop("mlp/up")
    return (
        *_embeddings(cfg, prefix),
        *modules("blocks", block, names),
        *(packed(("blocks/mlp/gate", "blocks/mlp/up"), f"{block}.mlp.weights_in") if cfg.gated else ()),
        ("blocks/attn_scale/scale", f"{block}.layer_scale1.lambda1"),
        ("blocks/mlp_scale/scale", f"{block}.layer_scale2.lambda1"),
    )


def _tower(cfg: VitConfig, prefix: str) -> Rows:
    """What the image towers of CLIP and SigLIP share."""
    return (
        ("patch/project/kernel", f"{prefix}embeddings.patch_embedding.weight", PATCH),
        *positions(cfg, f"{prefix}embeddings.position_embedding.weight", batch=""),
        *modules("blocks", f"{prefix}encoder.layers.{{layer}}", _TOWER),
        *module("norm", f"{prefix}post_layernorm"),
        *module("head", "classifier"),
    )


def _clip(cfg: VitConfig, prefix: str) -> Rows:
    return (
        *_tower(cfg, prefix),
        ("class_token/cls", f"{prefix}embeddings.class_embedding"),
        *module("pre_norm", f"{prefix}pre_layrnorm"),  # sic
        ("projection/kernel", "visual_projection.weight"),
    )


def _siglip(cfg: VitConfig, prefix: str) -> Rows:
    head = f"{prefix}head"
    pool = (
        ("pool/latent", f"{head}.probe", "1 1 embed"),
        *packed(("pool/attn/query", "pool/memory/key", "pool/memory/value"), f"{head}.attention", *_PACKED),
        *modules("pool", head, _POOL),
    )
    bias = ("patch/project/bias", f"{prefix}embeddings.patch_embedding.bias")
    return (*_tower(cfg, prefix), bias, *(pool if cfg.pool == "map" else ()))
