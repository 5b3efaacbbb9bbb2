"""Pipeline folders: one sub-folder for each part of a system, and a `model_index.json` that names the classes of all.

diffusers writes them (`PixArtSigmaPipeline.save_pretrained`). Ours are the same, with weights folders of ours as parts.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from heirloom.common.checkpoint.convert import OURS, convert
from heirloom.common.checkpoint.family import Donor
from heirloom.common.checkpoint.quantization import quantize_folder
from heirloom.common.checkpoint.unwrap import VARIANT, weights_files
from heirloom.common.checkpoint.verify import Check
from heirloom.common.checkpoint.weights import is_folder
from heirloom.common.errors import InputError, remark
from heirloom.common.files import read_json, staged, write_json

INDEX = "model_index.json"
MAIN = ("transformer", "unet")  # the part that an inspection or an inheritance means
_WEIGHTS = ("vae", "text_encoder")
_PLAIN = ("tokenizer", "scheduler", "feature_extractor", "image_processor")  # parts without weights


def is_pipeline(path: Path) -> bool:
    """Returns whether `path` is a pipeline folder; a denoiser in its usual sub-folder makes one, without an index."""
    return (path / INDEX).is_file() or any((path / name / "config.json").is_file() for name in MAIN)


def class_of(path: Path) -> str:
    """Returns the class of a pipeline folder, such as "PixArtSigmaPipeline"; empty without an index that says it."""
    return str(_index(path).get("_class_name", ""))


def parts_of(path: Path) -> list[str]:
    """Returns the names of the parts that the index lists; a part that is null there does not count."""
    if not (path / INDEX).is_file():
        return [name for name in (*MAIN, *_WEIGHTS, *_PLAIN) if (path / name).is_dir()]
    return [name for name, what in _index(path).items() if isinstance(what, list) and len(what) == 2 and all(what)]


def _index(path: Path) -> dict[str, Any]:
    return read_json(path / INDEX) if (path / INDEX).is_file() else {}


def part(path: Path, name: str) -> Path:
    """Returns the folder of a part. Raises InputError when the pipeline lacks it."""
    if not (path / name).is_dir():
        raise InputError(f"{path}: the sub-folder {name}/ is missing; fetch the whole pipeline again")
    return path / name


def main_part(path: Path) -> Path:
    """Returns the folder of the denoiser, or its file where there are several precisions. Raises InputError for a
    pipeline without one, and for one next to its average.
    """
    check_averages(path)
    listed = parts_of(path)
    name = next((name for name in MAIN if name in listed or (path / name).is_dir()), None)
    if name is None:
        raise InputError(f"{path / INDEX}: lists no {' or '.join(MAIN)}; its parts are {', '.join(listed) or 'none'}")
    return plain_weights(part(path, name))


def plain_weights(folder: Path) -> Path:
    """Returns the file without a variant in its name where a part is stored in several, as diffusers takes it
    (`x.safetensors` next to `x.fp16.safetensors`), with a remark; else the folder.
    """
    if is_folder(folder):
        return folder
    found = weights_files(folder)
    bare = {file: VARIANT.sub("", file.name) for file in found}
    plain = [file for file in found if bare[file] == file.name or folder / bare[file] not in found]
    if len(found) == 1 and any(VARIANT.search(file.name) for file in folder.iterdir() if file != found[0]):
        return found[0]  # of a kind of files of its own, as `weights_files` has remarked
    if len(found) == 1 or len(plain) != 1:
        return folder
    others = ", ".join(file.name for file in found if file != plain[0])
    remark(f"{folder}: using {plain[0].name}, not {others}; to use another file, give its path")
    return plain[0]


def check_averages(path: Path) -> None:
    """Raises InputError for a denoiser next to its average, as diffusers' trainers write them."""
    for name in MAIN:
        if (path / name).is_dir() and (average := path / f"{name}_ema").is_dir():
            raise InputError(f"{path} holds {name}/ and its average: name {average}, or {path / name} for the raw one")


def convert_pipeline(
    path: Path,
    destination: Path,
    to: str,
    open_part: Callable[[Path], Donor],
    *,
    quantize: str = "",
    force: bool = False,
    verify: bool = True,
) -> dict[str, Check]:
    """Converts every part that has weights and copies the others; returns the check of each converted part.

    to: "heirloom", or a format that at least one part has; a part that has only one foreign format is written in it.
    quantize: "int8" for the kernels of all parts but the autoencoder, which is convolutions. Raises InputError for a
    missing part and for a denoiser next to its average, and VerificationError; `destination` is then not written.
    """
    check_averages(path)
    names = parts_of(path)
    donors = {name: open_part(plain_weights(part(path, name))) for name in names if name not in _PLAIN}
    checks: dict[str, Check] = {}
    with staged(destination, force=force, inputs=[path]) as folder:
        folder.mkdir()
        write_json(folder / INDEX, _index(path))
        for name in names:
            if name in _PLAIN:
                shutil.copytree(part(path, name), folder / name)
            elif quantize and name != "vae":
                checks[name] = quantize_folder(donors[name], folder / name, verify=verify)
            else:
                checks[name] = _convert_part(donors[name], folder / name, to, verify=verify)
    return checks


def _convert_part(donor: Donor, destination: Path, to: str, verify: bool) -> Check:
    formats = [format.name for format in donor.family.formats]
    torch_formats = [name for name in formats if name != "flax"]
    if to not in (*OURS, *formats) and len(torch_formats) == 1:
        (to,) = torch_formats
    if to == donor.format:
        shutil.copytree(donor.folder, destination)
        return Check(passed=True, reference=None, note=f"in the {to} format already, and copied")
    return convert(donor, destination, to, verify=verify)
