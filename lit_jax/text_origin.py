"""Tells text encoders apart by their features of the empty text, which a model keeps of its training."""

import json
import shutil
from pathlib import Path

import numpy as np

from heirloom.common.errors import InputError
from heirloom.common.files import read_json
from heirloom.common.paths import AnyPath

FILE = "empty_text.json"
FAR = 0.2  # of the features' norm; the same weights in bfloat16 or int8, or on other devices, are nearer


def write_empty_text(folder: Path, features: np.ndarray) -> None:
    """Write the features [token, width] of the empty text next to weights."""
    (folder / FILE).write_text(json.dumps({"features": features.astype(np.float16).tolist()}) + "\n")


def read_empty_text(folder: AnyPath) -> np.ndarray | None:
    """Read the features [token, width] f32 of the empty text; None for a model that does not have them.

    Raises InputError for a damaged file.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    damaged = f"{file} is damaged: remove it, or copy it again from the model's folder"
    try:
        features = np.array(read_json(file)["features"], np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(damaged) from error
    if features.ndim != 2:
        raise InputError(damaged)
    return features


def copy_empty_text(source: Path, destination: Path) -> None:
    """Copy the features of the empty text from one weights folder to another."""
    if (source / FILE).is_file():
        shutil.copy(source / FILE, destination / FILE)


def same_encoder(one: np.ndarray, other: np.ndarray) -> bool:
    """Returns whether features [token, width] of the empty text are of the same text encoder."""
    return one.shape == other.shape and float(np.linalg.norm(one - other)) <= FAR * float(np.linalg.norm(one))
