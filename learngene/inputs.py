"""The preprocessing that travels with a classifier, and what is assumed where a checkpoint has none."""

from dataclasses import replace
from pathlib import Path

from heirloom.common.checkpoint.convert import Donor
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.preprocess_formats import IMAGENET_MEAN, IMAGENET_STD, Found, find, write
from learngene.labels import carry_labels

CROP = 0.875  # share of the side that ImageNet's evaluation crop keeps: 224 of 256
IMAGENET = Preprocess(224, IMAGENET_MEAN, IMAGENET_STD, "bicubic", (0.08, 1.0))
# google-research/vision_transformer squashes a picture to the model's size and maps it to -1..1; so does transformers' ViT.
# Deviation: theirs is bilinear without antialiasing, PIL's is with.
INCEPTION = Preprocess(224, (0.5,) * 3, (0.5,) * 3, "bilinear", (0.08, 1.0), resize=224, mode="squash")


def preprocess_of(donor: Donor) -> Found:
    """Preprocessing of a classifier's folder; where there is none, what the published models of its format were trained with."""
    minus_one_to_one = donor.format == "google" or (donor.format == "hf" and donor.cfg.tokens == "cls")
    size = donor.cfg.size
    assumed, whose = (INCEPTION.at(size), "that of Google's ViTs") if minus_one_to_one else (IMAGENET.at(size).cropped(CROP), "ImageNet's")
    found = find(donor.folder, donor.format, size, assumed, whose)
    if found.pre.resize is not None:
        return found
    note = f"preprocessing: {donor.folder / found.origin} does not record the crop; {CROP} of the side is assumed (set resize in it)"
    return replace(found, pre=found.pre.cropped(CROP), note=note)


def sidecars(donor: Donor, destination: Path, format: str) -> None:
    """Carry a checkpoint's preprocessing and class names to another folder, in the words of `format`."""
    write(preprocess_of(donor).announced(), destination, format)
    carry_labels(donor, destination, format)
