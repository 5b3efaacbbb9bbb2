"""Generators as weights folders: how the rest of heirloom opens, counts and describes them."""

from collections.abc import Mapping
from pathlib import Path
from shutil import copy
from typing import Any

from common.checkpoint.convert import Check, Donor, Family
from common.errors import InputError
from common.surgery.axes import Spec
from common.surgery.report import kernel_macs
from weightgen.autoencoder import TokenVae, TokenVaeConfig
from weightgen.conditions import SetConfig, SetOfSets
from weightgen.denoiser import DenoiserConfig
from weightgen.generator import Generator, GeneratorConfig
from weightgen.nets import MODULES, NetConfig
from weightgen.zoo import head_tokens

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
    tokens = head_tokens(cfg.net).rows
    own = {path: leaf for path, leaf in spec.items() if path.startswith("denoiser/")}
    once = [(pattern, 1) for pattern in ("denoiser/time_*/**", "denoiser/modulation/**", "denoiser/final_modulation/**")]
    return sum(kernel_macs(own, [*once, ("**", tokens)]).values())


def _simple(name: str, module: Any, config: Any) -> Family:
    """A family of ours without foreign formats, whose matmuls each count once."""

    def read(model: Mapping[str, Any]) -> Any:
        try:
            return config(**model)
        except TypeError as error:
            raise InputError(f"config.json does not describe a {name} ({error}); make it again") from error

    def count(cfg: Any, spec: Spec) -> int:
        return sum(kernel_macs(spec, [("**", 1)]).values())

    return Family(name, module, read, (), companions, verify, parameters, count)


def network(cfg: NetConfig, *, rngs: Any) -> Any:
    """The module of a network of a zoo."""
    return MODULES[cfg.kind](cfg, rngs=rngs)


FAMILY = Family("weightgen", Generator, config, (), companions, verify, parameters, macs)
CODEC = _simple("weightgen-codec", TokenVae, TokenVaeConfig)
ENCODER = _simple("weightgen-encoder", SetOfSets, SetConfig)
NETWORK = _simple("weightgen-network", network, NetConfig)
FAMILIES = [FAMILY, CODEC, ENCODER, NETWORK]
