"""The foreign formats of CLIPs: Hugging Face (torch and Flax), open_clip, and the original files of TinyCLIP."""

import re
from functools import partial
from pathlib import Path

from heirloom.common.checkpoint.family import Format, Found, Lookalike, Read
from heirloom.common.errors import InputError
from tinyclip_jax import hf_folder, layouts, open_clip_folder
from tinyclip_jax.model import ClipConfig, head_dim
from tinyclip_jax.resnet import ResNetConfig
from tinyclip_jax.shapes import HEAD, complete, infer, unusual


def _read_original(found: Found) -> Read | None:
    if "_image_encoder.visual.conv1.weight" not in found.tensors:
        return None
    cfg = infer(found.tensors, "_image_encoder.visual.", "_text_encoder.")
    return Read(cfg, open_clip_folder.bare(cfg, "the published TinyCLIPs have gelu")[:1])


def _clean_original(key: str) -> str:
    """Remove the prefix that the automatic method added to the keys."""
    return re.sub(r"^_?(image|text)_encoder_without_ddp\.", r"_\1_encoder.", key)


def _write_nothing(cfg: ClipConfig, folder: Path) -> None:
    """Write no config: shapes give that of an original file. Raises InputError for what they do not give."""
    if option := unusual(cfg):
        instead = "write this model as open_clip or heirloom"
        raise InputError(f"{option}, which the original layout does not have: {instead}")
    image_head = cfg.image.embed // cfg.image.heads if isinstance(cfg.image, ResNetConfig) else head_dim(cfg.image)
    if image_head != HEAD or head_dim(cfg.text) != HEAD:
        needed = f"the original layout needs {HEAD}: write this model as open_clip or heirloom"
        raise InputError(f"heads have {image_head} and {head_dim(cfg.text)} channels, {needed}")


_with_visual = partial(Format, complete=partial(complete, image="visual.", text=""))
_with_towers = partial(Format, complete=partial(complete, image="_image_encoder.visual.", text="_text_encoder."))
_open_clip = (open_clip_folder.read, open_clip_folder.write, open_clip_folder.clean)
FORMATS = (
    Format("hf", layouts.hf, "model.safetensors", hf_folder.read, hf_folder.write),
    Format("flax", layouts.FLAX, "flax_model.msgpack", hf_folder.read_flax, hf_folder.write_flax),
    _with_visual("open_clip", layouts.open_clip, "open_clip_model.safetensors", *_open_clip),
    _with_towers("original", layouts.ORIGINAL, "tinyclip.pt", _read_original, _write_nothing, _clean_original),
)

_WHOLE = "take the whole model, CLIPModel or SiglipModel"
_OTHER_TEXT = "whose text tower is not read: take a CLIP of open_clip, transformers or TinyCLIP"
LOOKALIKES = (
    # Whole models of others, whose image towers have CLIP's names.
    Lookalike("text_model.embeddings.word_embeddings.*", f"a CLIP around a BERT (Chinese-CLIP, say), {_OTHER_TEXT}"),
    Lookalike("text_model.roberta.*", f"an AltCLIP, {_OTHER_TEXT}"),
    Lookalike("text_decoder.*", f"a BLIP, {_OTHER_TEXT}"),
    Lookalike("text_encoder.encoder.layer.*", f"a BLIP, {_OTHER_TEXT}"),
    Lookalike("text_model/embeddings/token_embedding/embedding", f"a text tower alone (FlaxCLIPTextModel): {_WHOLE}"),
    Lookalike("vision_model/embeddings/class_embedding", f"an image tower alone (FlaxCLIPVisionModel): {_WHOLE}"),
    Lookalike("text_model.embeddings.token_embedding.weight", f"a text tower alone (CLIPTextModel): {_WHOLE}"),
    Lookalike("vision_model.embeddings.class_embedding", f"an image tower alone (CLIPVisionModel): {_WHOLE}"),
    Lookalike("vision_model.head.probe", f"an image tower alone (SiglipVisionModel): {_WHOLE}"),
    Lookalike("text.transformer.*", "an open_clip model with a text tower of transformers, not its own"),
    Lookalike("clip.vision_model.*", "a model built around a CLIP (CLIPSeg, say): take the CLIP it was built from"),
)
