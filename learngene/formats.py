"""The foreign formats of ViTs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from heirloom.common.checkpoint.convert import Format, Lookalike
from heirloom.common.checkpoint.verify import Check
from learngene import bare_files, google_files, hf_folder, layouts, timm_folder

FORMATS = (
    Format(
        name="timm",
        layout=layouts.timm,
        file="model.safetensors",
        read_config=timm_folder.read,
        write_config=timm_folder.write,
    ),
    Format(
        name="deit",
        layout=layouts.timm,
        file="deit.pth",
        read_config=bare_files.read_deit,
        write_config=bare_files.write_deit,
        wrapper="model",
        complete=bare_files.timm_names,
    ),
    Format(
        name="hf", layout=layouts.hf, file="model.safetensors", read_config=hf_folder.read, write_config=hf_folder.write
    ),
    Format(
        name="sws",
        layout=layouts.sws,
        file="sws.pth",
        read_config=bare_files.read_sws,
        write_config=bare_files.write_sws,
        wrapper="model",
    ),
    Format(
        name="tleg",
        layout=layouts.tleg,
        file="tleg.pth",
        read_config=bare_files.read_tleg,
        write_config=bare_files.write_tleg,
        wrapper="model",
    ),
    Format(
        name="google",
        layout=layouts.google,
        file="vit.npz",
        read_config=google_files.read,
        write_config=google_files.write,
        clean=google_files.clean,
    ),
)

_CLASSIFIER = "a ViT that classifies is needed: ViTForImageClassification or DeiTForImageClassification"
LOOKALIKES = (
    Lookalike("encoder.layer.*.layer_scale1.lambda1", f"a DINOv2 of transformers, which has LayerScale; {_CLASSIFIER}"),
    Lookalike("dinov2*.embeddings.cls_token", f"a DINOv2 of transformers, which has LayerScale; {_CLASSIFIER}"),
    Lookalike(
        "*.attention.relative_position_bias.relative_position_bias_table",
        f"a BEiT, which has relative positions; {_CLASSIFIER}",
    ),
    Lookalike("beit.embeddings.*", f"a BEiT of transformers, which has LayerScale; {_CLASSIFIER}"),
    Lookalike("data2vec_vision.embeddings.*", f"a Data2Vec of transformers, which has LayerScale; {_CLASSIFIER}"),
    Lookalike("ijepa.embeddings.*", f"an I-JEPA of transformers, which has no class token; {_CLASSIFIER}"),
    Lookalike("decoder.decoder_layers.*", f"a masked autoencoder (ViTMAE); {_CLASSIFIER}"),
    Lookalike("embeddings.distillation_token", f"a DeiT without its classifier (DeiTModel); {_CLASSIFIER}"),
    Lookalike("encoder.layer.*.layernorm_before.weight", f"a ViT without its classifier (ViTModel); {_CLASSIFIER}"),
    Lookalike(
        "encoder.layers.encoder_layer_*", "a ViT of torchvision, which is not read; take one of timm or transformers"
    ),
)


def finite(cfg: object, params: Mapping[str, Any], file: Path, format: str) -> Check:
    """Check of a model without reference implementation: all parameters are finite."""
    passed = all(np.isfinite(np.asarray(value)).all() for value in params.values())
    return Check(passed, None, note="structure and finiteness only: this format has no reference")
