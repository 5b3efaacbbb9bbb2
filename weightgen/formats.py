"""Generators as weights folders: how the rest of heirloom opens, counts and describes them."""

from collections.abc import Mapping
from pathlib import Path
from shutil import copy
from typing import Any

from common.checkpoint.convert import Check, Donor, Family
from common.errors import InputError
from common.surgery.axes import Spec
from common.surgery.report import kernel_macs
from weightgen.denoiser import DenoiserConfig
from weightgen.generator import Generator, GeneratorConfig
from weightgen.nets import NetConfig

COMPANIONS = ("features.safetensors", "report.json")


def config(model: Mapping[str, Any]) -> GeneratorConfig:
    """From the `model` of a config.json."""
    try:
        return GeneratorConfig(**{**model, "net": NetConfig(**model["net"]), "denoiser": DenoiserConfig(**model["denoiser"])})
    except (KeyError, TypeError) as error:
        raise InputError(f"config.json is not that of a generator of weights ({error}); train it again") from error


def companions(donor: Donor, destination: Path, format: str) -> None:
    for name in COMPANIONS:
        if (donor.folder / name).is_file():
            copy(donor.folder / name, destination / name)


def verify(cfg: Any, params: Mapping[str, Any], file: Path, format: str) -> Check:
    return Check(passed=True, reference=None, note="generators have no foreign format, hence no reference")


def parameters(spec: Spec) -> dict[str, int]:
    """By part: codec, condition, denoiser."""
    parts: dict[str, int] = {}
    for path, leaf in spec.items():
        part = path.split("/")[0]
        parts[part] = parts.get(part, 0) + leaf.count
    return parts | {"total": sum(parts.values())}


def macs(cfg: GeneratorConfig, spec: Spec) -> int:
    """Multiply-accumulates of one denoising step of one network, attention's own products left out."""
    from weightgen.zoo import head_tokens

    tokens = head_tokens(cfg.net).rows
    return tokens * kernel_macs({path: leaf for path, leaf in spec.items() if path.startswith("denoiser/")})


FAMILY = Family("weightgen", Generator, config, (), companions, verify, parameters, macs)
