"""The foreign formats of ViTs."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from heirloom.common.checkpoint.family import Format, Lookalike
from heirloom.common.checkpoint.verify import Check
from heirloom.common.vit import layouts
from learngene import bare_files, google_files, hf_config, hf_folder, hf_layouts, timm_folder

_bare = partial(Format, wrapper="model")
_deit = partial(_bare, clean=bare_files.clean, complete=bare_files.timm_names)
FORMATS = (
    Format("timm", layouts.timm, "model.safetensors", timm_folder.read, timm_folder.write),
    _deit("deit", layouts.timm, "deit.pth", bare_files.read_deit, bare_files.write_deit),
    Format("hf", hf_layouts.hf, "model.safetensors", hf_folder.read, hf_config.write, complete=hf_folder.complete),
    Format("flax", hf_layouts.flax, "flax_model.msgpack", hf_folder.read_flax, hf_config.write_flax),
    _bare("sws", layouts.sws, "sws.pth", bare_files.read_sws, bare_files.write_sws),
    _bare("tleg", layouts.tleg, "tleg.pth", bare_files.read_tleg, bare_files.write_tleg),
    Format("google", layouts.google, "vit.npz", google_files.read, google_files.write, google_files.clean),
)

_PLAIN = "take a plain ViT: ViTModel, DeiTModel or Dinov2Model, say, or a classifier made of one"
_TORCH = "of Flax, only FlaxViTForImageClassification is: take the weights of torch"
LOOKALIKES = (
    Lookalike(
        "*.attention.relative_position_bias.relative_position_bias_table",
        f"a BEiT, which has relative positions; {_PLAIN}",
    ),
    Lookalike("beit.embeddings.*", f"a BEiT of transformers, which has relative positions; {_PLAIN}"),
    Lookalike("data2vec_vision.embeddings.*", f"a Data2Vec of transformers, with relative positions; {_PLAIN}"),
    Lookalike("ijepa.embeddings.*", f"an I-JEPA of transformers, which has no class token; {_PLAIN}"),
    Lookalike("dinov2/embeddings/*", f"a DINOv2 of Flax, not read; {_TORCH}"),
    Lookalike("encoder/layer/*/layer_scale1/lambda1", f"a DINOv2 of Flax, not read; {_TORCH}"),
    Lookalike("encoder/layer/*/layernorm_before/scale", f"a ViT without its classifier (FlaxViTModel); {_TORCH}"),
    Lookalike("beit/embeddings/*", f"a BEiT of transformers, which has relative positions; {_PLAIN}"),
    Lookalike("layer.*.attention.q_proj.weight", f"a DINOv3 of transformers, which has rotary positions; {_PLAIN}"),
    Lookalike("*encoder.layers.*.blocks.*.layernorm_before.weight", f"a Swin of transformers, with windows; {_PLAIN}"),
    Lookalike("encoder.layers.encoder_layer_*", "a ViT of torchvision, not read; take one of timm or transformers"),
)


def finite(cfg: object, params: Mapping[str, Any], file: Path, format: str) -> Check:
    """Check of a model without reference implementation: all parameters are finite."""
    passed = all(np.isfinite(np.asarray(value)).all() for value in params.values())
    return Check(passed, None, note="structure and finiteness only: this format has no reference")
