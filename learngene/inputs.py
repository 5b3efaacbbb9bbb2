"""Preprocessing of a classifier, and the defaults for a checkpoint that has none."""

from dataclasses import replace
from pathlib import Path

from heirloom.common.checkpoint.family import Donor
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.preprocess_formats import IMAGENET_MEAN, IMAGENET_STD, Found, find, write
from learngene.labels import carry_labels

CROP = 0.875  # share of the side that ImageNet's evaluation crop keeps: 224 of 256
IMAGENET = Preprocess(size=224, mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bicubic", scale=(0.08, 1.0))
# google-research/vision_transformer squashes a picture to the model's size and maps it to -1..1; so does transformers'
# ViT. Deviation: theirs is bilinear without antialiasing, PIL's is with.
INCEPTION = Preprocess(
    size=224, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", scale=(0.08, 1.0), resize=224, mode="squash"
)


def preprocess_of(donor: Donor) -> Found:
    """Read the preprocessing of a classifier's folder; without one, that of the published models of its format."""
    minus_one_to_one = donor.format == "google" or (donor.format == "hf" and donor.cfg.tokens == "cls")
    size = donor.cfg.size
    assumed, whose = IMAGENET.at(size).cropped(CROP), "ImageNet's"
    if minus_one_to_one:
        assumed, whose = INCEPTION.at(size), "that of Google's ViTs"
    found = find(donor.folder, donor.format, size, assumed, whose)
    if found.pre.resize is not None:
        return found
    file = donor.folder / found.origin
    note = f"preprocessing: {file} does not record the crop; {CROP} of the side is assumed (set resize in it)"
    return replace(found, pre=found.pre.cropped(CROP), note=note)


def sidecars(donor: Donor, destination: Path, format: str) -> None:
    """Write the preprocessing and class names of a checkpoint into another folder, as files of `format`."""
    write(preprocess_of(donor).announced(), destination, format)
    carry_labels(donor, destination, format)
