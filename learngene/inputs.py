"""Preprocessing of a classifier, and the defaults for a checkpoint that has none."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from heirloom.common.checkpoint.family import Donor
from heirloom.common.checkpoint.unwrap import open_weights
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.preprocess_formats import IMAGENET_MEAN, IMAGENET_STD, Found, find, size_of, write
from heirloom.common.files import read_json
from learngene.labels import carry_labels
from learngene.problem import carry_problem
from learngene.trainer_arguments import preprocessing

CROP = 0.875  # share of the side that ImageNet's evaluation crop keeps: 224 of 256
IMAGENET = Preprocess(size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bicubic", scale=(0.08, 1.0))
# google-research/vision_transformer squashes a picture to the model's size and maps it to -1..1; so does transformers'
# ViT. Deviation: theirs is bilinear without antialiasing, PIL's is with.
INCEPTION = Preprocess(
    size=224, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", scale=(0.08, 1.0), resize=224, mode="squash"
)


CLIP = Preprocess(size=224, resize=224)  # OpenAI's
# By model_type of transformers: DeiT and DINOv2 have ImageNet's.
_OF_TRANSFORMERS = {
    "vit": (INCEPTION, "that of Google's ViTs"),
    "siglip": (replace(INCEPTION, interpolation="bicubic"), "SigLIP's own"),
    "siglip_vision_model": (replace(INCEPTION, interpolation="bicubic"), "SigLIP's own"),
    "clip": (CLIP, "CLIP's own"),
    "clip_vision_model": (CLIP, "CLIP's own"),
}


def preprocess_of(donor: Donor) -> Found:
    """Read the preprocessing of a ViT's folder; without one, that of the published models of its format.

    Of a model that reads pictures of any size, the file sets it: DINOv2 has positions for 518 pixels and reads 224.
    """
    size = (size_of(donor.folder) if getattr(donor.cfg, "any_size", False) else None) or donor.cfg.size
    assumed, whose = IMAGENET.at(size).cropped(CROP), "ImageNet's"
    if donor.format == "deit":
        assumed, whose = preprocessing(open_weights(donor.file).about, assumed, whose)
    kind: Any = "vit" if donor.format == "google" else ""
    if donor.format in ("hf", "flax"):
        kind = read_json(donor.folder / "config.json").get("model_type")
    if kind in _OF_TRANSFORMERS:
        pre, whose = _OF_TRANSFORMERS[kind]
        assumed = pre.at(size)
    found = find(donor.folder, donor.format, size, assumed, whose)
    if found.pre.resize is not None:
        return found
    file = donor.folder / found.origin
    note = f"preprocessing: {file} does not record the crop; {CROP} of the side is assumed (set resize in it)"
    return replace(found, pre=found.pre.cropped(CROP), note=note)


def sidecars(donor: Donor, destination: Path, format: str) -> None:
    """Write preprocessing, class names and the kind of outputs into another folder, as files of `format`."""
    write(preprocess_of(donor).announced(), destination, format)
    carry_labels(donor, destination, format)
    carry_problem(donor, destination, format)
