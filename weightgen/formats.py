"""Generators as weights folders: how the rest of heirloom opens, counts and describes them."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from shutil import copy
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.checkpoint.family import Donor, Family
from heirloom.common.checkpoint.verify import Check
from heirloom.common.errors import InputError
from heirloom.common.surgery.axes import Spec
from heirloom.common.surgery.report import kernel_macs
from heirloom.common.typed import from_json
from weightgen.codec import TokenCodec, TokenVaeConfig
from weightgen.d2nwg.model import D2nwg, D2nwgConfig
from weightgen.generator.conditions import SetConfig, SetOfSets
from weightgen.generator.config import GeneratorConfig
from weightgen.generator.model import Generator
from weightgen.tokens import TokenSpec
from weightgen.zoo.data import Bank
from weightgen.zoo.nets import MODULES, NetConfig
from weightgen.zoo.zoo import Zoo

SIDECARS = ("features.safetensors", "neighbours.safetensors", "tasks.json", "adapter.json", "report.json")


def config(model: Mapping[str, Any]) -> GeneratorConfig:
    """Read the `model` of a config.json."""
    cfg = from_json(GeneratorConfig, model)
    if cfg.cut is None:
        return cfg
    if not cfg.cut.pieces:
        raise InputError("config.json: model.cut.pieces is empty: there is nothing to generate")
    if (cut := TokenSpec.of([asdict(piece) for piece in cfg.cut.pieces])) != cfg.cut:
        own = f"{cut.rows} x {cut.length}"
        raise InputError(f"config.json: model.cut is {cfg.cut.rows} x {cfg.cut.length}, its pieces make {own}")
    return cfg


def sidecars(donor: Donor, destination: Path, format: str) -> None:
    for name in SIDECARS:
        if (donor.folder / name).is_file():
            copy(donor.folder / name, destination / name)


def verify(cfg: object, params: Mapping[str, Any], file: Path, format: str) -> Check:
    return Check(passed=True, reference=None, note="generators have no foreign format, hence no reference")


def parameters(spec: Spec) -> dict[str, int]:
    """Count parameters by part: codec, condition, denoiser."""
    parts: dict[str, int] = {}
    for path, leaf in spec.items():
        part = path.split("/")[0]
        parts[part] = parts.get(part, 0) + leaf.count
    return parts | {"total": sum(parts.values())}


def macs(cfg: GeneratorConfig, spec: Spec) -> int:
    """Count multiply-accumulates of one denoising step of one network, attention's own products left out."""
    tokens = cfg.tokens.rows
    own = {path: leaf for path, leaf in spec.items() if path.startswith("denoiser/")}
    patterns = ("denoiser/time_*/**", "denoiser/modulation/**", "denoiser/final_modulation/**")
    once = [(pattern, 1) for pattern in patterns]
    return sum(kernel_macs(own, [*once, ("**", tokens)]).values())


def _once(cfg: Any, spec: Spec) -> int:
    """Count every matmul once."""
    return sum(kernel_macs(spec, [("**", 1)]).values())


def _family(
    name: str, module: Any, config: Callable[[Mapping[str, Any]], Any], macs: Callable[[Any, Spec], int] = _once
) -> Family:
    """Build a family without foreign formats."""
    functions: dict[str, Any] = dict(sidecars=sidecars, verify=verify, parameters=parameters, macs=macs)
    return Family(name=name, module=module, config=config, formats=(), **functions)


def network(cfg: NetConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """Build the module of a network of a zoo."""
    return MODULES[cfg.kind](cfg, rngs=rngs)


GENERATOR = _family("weightgen", Generator, config, macs=macs)
CODEC = _family("weightgen-codec", TokenCodec, partial(from_json, TokenVaeConfig))
ENCODER = _family("weightgen-encoder", SetOfSets, partial(from_json, SetConfig))
NETWORK = _family("weightgen-network", network, partial(from_json, NetConfig))
D2NWG = _family("weightgen-d2nwg", D2nwg, partial(from_json, D2nwgConfig))
FAMILIES = [GENERATOR, CODEC, ENCODER, NETWORK, D2NWG]


def open_part(path: str, family: Family, made_by: str) -> tuple[Any, dict[str, np.ndarray]]:
    """Open the folder of a codec or an encoder: config and weights. Raises InputError when it is something else."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(f"{path}: no such folder; heirloom train {made_by} --run RUN makes RUN/model")
    donor = open_donor(folder, [family])
    return donor.cfg, {name: np.asarray(view, np.float32) for name, view in donor.source.values.items()}


def save_neighbours(folder: Path, zoo: Zoo, seed: int, bank: Bank) -> None:
    """Write `neighbours.safetensors`: up to 1,000 zoo networks (16 MB) to compare with, and their class means."""
    most = min(len(zoo), 1000, max(2**24 // (4 * zoo.spec.count), 2))
    rows = np.sort(np.random.default_rng(seed).choice(len(zoo), most, replace=False))
    classes = np.asarray(zoo.classes[rows])
    tensors = {"weights": np.asarray(zoo.weights[rows], np.float32), "classes": classes}
    if zoo.net:
        tensors["told"] = bank.means[classes]
    save_file(tensors, folder / "neighbours.safetensors", {"zoo": str(len(zoo))})
