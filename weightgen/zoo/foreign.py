"""Checks of foreign checkpoints: all shards are given, and weights are not quantised."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from heirloom.common.checkpoint.unwrap import open_tensors
from heirloom.common.errors import InputError
from heirloom.common.files import read_json

SHARD = re.compile(r"^(?P<name>.+?)[-_](?P<number>\d+)-of-(?P<count>\d+)\.")
# Files of a model-parallel checkpoint (Meta's, DeepSpeed's): each has a slice of every matrix.
SLICE = re.compile(r"^(?P<name>consolidated\.|mp_rank_)(?P<number>\d+)(?P<end>\D.*)$")
SCHEMES = {
    "4 or 8 bits by bitsandbytes": (
        r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+|SCB|weight_format)$"
    ),
    "mxfp4": r"_blocks$",
    "4 bits by GPTQ or AWQ": r"\.(qweight|qzeros|g_idx)$",
    "8 or 4 bits with scales": (
        r"(weight_scale(_inv|_2)?|weight_scales|_scale_inv|\.input_scale|weight_packed|weight_zero_point)$"
    ),
    "HQQ": r"\.W_q$",
    "QuIP#": r"\.Qidxs$",
    "codes by AQLM, VPTQ or SpQR": r"\.(codebooks|centroids\.weight|dense_weights)$",
}
QUANTISED = re.compile(r"has dtype (F8|F4|F6)|weight' has dtype U32")  # floats of 8 bits and fewer; MLX packs into U32


def read_tensors(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """Read all tensors of a checkpoint's files, memory-mapped.

    Raises InputError where a shard is missing, for several files that are no shards of one checkpoint, for slices of a
    model-parallel one, for a tensor that is in two files, and for weights of dtypes that are quantised.
    """
    _no_slices(files)
    _all_shards(files)
    names = {(hit["name"], hit["count"]) if (hit := SHARD.match(file.name)) else file.name for file in files}
    if len(names) > 1:
        several = f"{files[0].parent} holds several files of weights ({listed(file.name for file in files)})"
        raise InputError(f"{several}: name one of them, or keep one checkpoint in a folder")
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        try:
            found = open_tensors(file)
        except InputError as error:
            if QUANTISED.search(str(error)):
                take = "take the original in bfloat16 or float32"
                raise InputError(f"{error}: its weights are quantised; {take}") from error
            raise
        if twice := found.keys() & tensors.keys():
            others = ", ".join(other.name for other in files if other != file)
            also = f"is in this file and in another ({others})"
            raise InputError(f"{file}: {min(twice)} {also}; name one file, or move the others")
        tensors |= found
    return tensors


def _no_slices(files: Sequence[Path]) -> None:
    """Raise InputError for files that hold slices of the same matrices, going by `consolidated.00.pth` and others."""
    for file in files:
        if hit := SLICE.match(file.name):
            pattern = re.compile(re.escape(hit["name"]) + r"\d+" + re.escape(hit["end"]))
            if others := sorted(p.name for p in file.parent.iterdir() if pattern.fullmatch(p.name) and p != file):
                slices = f"{file.name} and {listed(others, 2)} are slices of a model-parallel checkpoint"
                raise InputError(f"{file.parent}: {slices}; take the files of transformers instead")


def _all_shards(files: Sequence[Path]) -> None:
    """Raise InputError with the names of the shards that are missing, going by `-00001-of-00003`."""
    given = {file.name for file in files}
    for file in files:
        if hit := SHARD.match(file.name):
            count, digits = int(hit["count"]), len(hit["number"])
            at, end = hit.span("number")
            wanted = [f"{file.name[:at]}{i:0{digits}d}{file.name[end:]}" for i in range(1, count + 1)]
            if missing := [name for name in wanted if name not in given and not (file.parent / name).is_file()]:
                which = f"{len(missing)} of {count} shards are missing ({listed(missing)})"
                raise InputError(f"{file.parent}: {which}; fetch them")
            if missing := [name for name in wanted if name not in given]:
                raise InputError(f"{file} is one of {count} shards; name the folder that holds them, {file.parent}")


def quantisation(tensors: Mapping[str, np.ndarray], config: Path | None = None) -> str:
    """Tell how a checkpoint is quantised and which tensor shows it; "" if not. config: its `config.json`, if any."""
    for name, tensor in tensors.items():
        if scheme := next((scheme for scheme, mark in SCHEMES.items() if re.search(mark, name)), ""):
            return f"{name} is of weights in {scheme}"
        dtype = np.dtype(tensor.dtype)
        last = re.split(r"[./]", name)[-1]
        # A mask of 8 bits is a buffer; a weight of 8 bits is quantised.
        weight = dtype.kind not in "iu" or last in ("weight", "kernel") or (tensor.ndim == 2 and min(tensor.shape) > 1)
        if dtype.itemsize == 1 and dtype.kind != "b" and tensor.ndim >= 2 and weight:
            return f"{name} is {dtype}"
    if config is not None and config.is_file():
        about = read_json(config).get("quantization_config")
        if about:
            method = about.get("quant_method", "unnamed") if isinstance(about, Mapping) else about
            return f"{config} has a quantization_config ({method})"
    return ""


def refuse_quantised(tensors: Mapping[str, np.ndarray], config: Path | None = None) -> None:
    """Raise InputError for quantised weights, with the tensor or the config that shows it."""
    if why := quantisation(tensors, config):
        raise InputError(f"{why}: the checkpoint is quantised; take the original, in bfloat16 or float32")


def not_finite(tensors: Mapping[str, Any]) -> list[str]:
    """List the names of floating tensors with NaN or infinity in them, in their order."""
    floats = ((name, tensor) for name, tensor in tensors.items() if np.dtype(tensor.dtype).kind in "fV")
    return [name for name, tensor in floats if not np.isfinite(tensor).all()]


def listed(names: Iterable[str], most: int = 4) -> str:
    """Join the first names, and the number of the others."""
    found = list(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")
