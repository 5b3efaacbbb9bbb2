"""The foreign formats of ViTs, and the preprocessing that travels with them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.checkpoint.convert import Donor, Format, Lookalike
from common.checkpoint.verify import Check
from common.checkpoint.weights import read_json, write_json
from common.data.images import Preprocess
from common.errors import InputError
from learngene import bare_files, google_files, hf_folder, layouts, timm_folder
from learngene.vit import VitConfig

IMAGENET = Preprocess(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", (0.08, 1.0))


def config(saved: Mapping[str, Any]) -> VitConfig:
    """The config of a weights folder of ours."""
    try:
        return VitConfig(**saved)
    except TypeError as error:
        raise InputError(f"config.json is not of this version of learngene: {error}") from error


FORMATS = (
    Format("timm", layouts.timm, "model.safetensors", timm_folder.read, timm_folder.write),
    Format("deit", layouts.timm, "deit.pth", bare_files.read_deit, bare_files.write_deit, wrapper="model"),
    Format("hf", layouts.hf, "model.safetensors", hf_folder.read, hf_folder.write),
    Format("sws", layouts.sws, "sws.pth", bare_files.read_sws, bare_files.write_sws, wrapper="model"),
    Format("tleg", layouts.tleg, "tleg.pth", bare_files.read_tleg, bare_files.write_tleg, wrapper="model"),
    Format("google", layouts.google, "vit.npz", google_files.read, google_files.write, clean=google_files.clean),
)

_CLASSIFIER = "a ViT that classifies is needed: ViTForImageClassification or DeiTForImageClassification"
LOOKALIKES = (
    Lookalike("encoder.layer.*.layer_scale1.lambda1", f"a DINOv2 of transformers, which has LayerScale; {_CLASSIFIER}"),
    Lookalike("dinov2*.embeddings.cls_token", f"a DINOv2 of transformers, which has LayerScale; {_CLASSIFIER}"),
    Lookalike("*.attention.relative_position_bias.relative_position_bias_table", f"a BEiT, which has relative positions; {_CLASSIFIER}"),
    Lookalike("beit.embeddings.*", f"a BEiT of transformers, which has LayerScale; {_CLASSIFIER}"),
    Lookalike("data2vec_vision.embeddings.*", f"a Data2Vec of transformers, which has LayerScale; {_CLASSIFIER}"),
    Lookalike("decoder.decoder_layers.*", f"a masked autoencoder (ViTMAE); {_CLASSIFIER}"),
    Lookalike("embeddings.distillation_token", f"a DeiT without its classifier (DeiTModel); {_CLASSIFIER}"),
    Lookalike("encoder.layer.*.layernorm_before.weight", f"a ViT without its classifier (ViTModel); {_CLASSIFIER}"),
    Lookalike("encoder.layers.encoder_layer_*", "a ViT of torchvision, which is not read; take one of timm or transformers"),
)


def read_preprocess(folder: Path, size: int) -> Preprocess:
    """Preprocessing that travels with a checkpoint: ours, transformers' or timm's; ImageNet's statistics where there is none."""
    if (folder / "preprocess.json").is_file():
        return Preprocess.load(folder)
    found: dict[str, Any] = {}
    if (folder / "preprocessor_config.json").is_file():
        theirs = read_json(folder / "preprocessor_config.json")
        filters = {int(f): f.name.lower() for f in Image.Resampling}
        found = dict(mean=theirs.get("image_mean"), std=theirs.get("image_std"), interpolation=filters.get(theirs.get("resample", 3)))
    elif (folder / "config.json").is_file():
        found = read_json(folder / "config.json").get("pretrained_cfg") or {}
    default = replace(IMAGENET, size=size)
    mean, std = (tuple(found.get(name) or getattr(default, name)) for name in ("mean", "std"))
    return replace(default, mean=mean, std=std, interpolation=found.get("interpolation") or default.interpolation)


def carry_preprocess(donor: Donor, destination: Path, format: str) -> None:
    """Write a checkpoint's preprocessing in the words of another format."""
    pre = read_preprocess(donor.folder, donor.cfg.size)
    if format == "heirloom":
        pre.save(destination)
    elif format == "hf":
        about = dict(do_resize=True, do_rescale=True, do_normalize=True, rescale_factor=1 / 255, resample=int(pre.filter))
        names = dict(image_processor_type="ViTImageProcessor", size={"height": pre.size, "width": pre.size})
        write_json(destination / "preprocessor_config.json", about | names | dict(image_mean=list(pre.mean), image_std=list(pre.std)))
    elif format == "timm":
        theirs = read_json(destination / "config.json")
        theirs["pretrained_cfg"] |= dict(mean=list(pre.mean), std=list(pre.std), interpolation=pre.interpolation)
        write_json(destination / "config.json", theirs)


def finite(cfg: Any, params: Mapping[str, Any], file: Path, format: str) -> Check:
    """The structural check of a model that has no reference."""
    passed = all(np.isfinite(np.asarray(value)).all() for value in params.values())
    return Check(passed, None, note="structure and finiteness only: this format has no reference")
