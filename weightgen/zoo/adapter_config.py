"""`adapter_config.json` of peft: the fields that decide the update, and the file of a generated adapter."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from heirloom.common.errors import InputError
from heirloom.common.files import read_json, write_json
from weightgen.zoo.lora import pairs

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # of peft's names in a file
METADATA = "lora_adapter_metadata"  # under which diffusers keeps the same fields in a safetensors file
READ = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out",
        "modules_to_save", "init_lora_weights")  # fmt: skip
# About training, or about where adapters are attached, which the names of their tensors say.
HARMLESS = ("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
            "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
            "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
            "runtime_config", "merge_weights", "velora_config")  # fmt: skip
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base model as it is. Others (pissa, olora, loftq, corda) change it, so B A is not all
of the update.
"""


@dataclass(frozen=True)
class LoraSettings:
    """The fields that decide the update."""

    r: int = 8
    alpha: float = 8.0
    rslora: bool = False
    ranks: Mapping[str, int] | None = None
    alphas: Mapping[str, float] | None = None
    fan_in_fan_out: bool = False
    modules_to_save: tuple[str, ...] = ()
    task_type: str | None = None
    base: str | None = None

    def scale(self, module: str, rank: int) -> float:
        """Compute alpha / r of a module, or alpha / sqrt(r) (rsLoRA), by the patterns as peft matches them.

        Raises InputError when its tensors have another rank than the config says.
        """
        name = module.removeprefix(PREFIX)
        r, alpha = _matched(self.ranks, name, self.r), _matched(self.alphas, name, self.alpha)
        if r != rank:
            raise InputError(f"{module} has rank {rank}, its {CONFIG} says {r}: they belong to different adapters")
        return float(alpha / (sqrt(r) if self.rslora else r))


def _matched(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def settings(about: Mapping[str, Any], label: str) -> LoraSettings:
    """Read the fields of an adapter_config.json. label: the name in errors.

    Raises InputError for another kind of adapter, and for a field that is set, changes the function and is not
    understood.
    """
    if (kind := about.get("peft_type")) != "LORA":
        raise InputError(f"{label}: peft_type is {kind!r}; only LORA can be generated")
    if (bias := about.get("bias", "none")) != "none":
        raise InputError(f"{label}: bias is {bias!r}, so the base's biases were trained; only none can be generated")
    begin = about.get("init_lora_weights")
    if (begin.lower() if isinstance(begin, str) else begin) not in PLAIN_STARTS:  # as peft compares
        save = "save the adapter with path_initial_model_for_weight_conversion, then it is a plain one"
        raise InputError(f"{label}: init_lora_weights is {begin!r}, which changes the base model: {save}")
    for name, value in about.items():
        if name not in READ + HARMLESS and value:
            only = "not read here and may change the update; only plain LoRA is"
            raise InputError(f"{label}: {name} is {_short(value)}, which is {only}")
    numbers = {"r": about.get("r", 8), "lora_alpha": about.get("lora_alpha", 8)}
    patterns = {name: about.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, Mapping):
            raise InputError(f"{label}: {name} is {_short(pattern)}; it must be {{module: number}}")
        numbers |= {f"{name} of {key}": value for key, value in pattern.items()}
        for key in pattern:
            try:
                re.compile(key)
            except re.error as error:
                raise InputError(f"{label}: {name} has {key!r}, which is no regular expression ({error})") from error
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise InputError(f"{label}: {name} is {_short(value)}; it must be a number")
        if not name.startswith(("lora_alpha", "alpha_pattern")) and (value < 1 or value != int(value)):
            raise InputError(f"{label}: {name} is {_short(value)}; a rank is 1 or more")
    for name in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(about.get(name, False), bool | None):
            raise InputError(f"{label}: {name} is {_short(about[name])}; it must be true or false")
    saved = about.get("modules_to_save") or ()
    if isinstance(saved, str) or not all(isinstance(name, str) for name in saved):
        raise InputError(f"{label}: modules_to_save is {_short(saved)}; it must be a list of names")
    return LoraSettings(
        r=int(numbers["r"]),
        alpha=float(numbers["lora_alpha"]),
        rslora=bool(about.get("use_rslora")),
        ranks=patterns["rank_pattern"],
        alphas=patterns["alpha_pattern"],
        fan_in_fan_out=bool(about.get("fan_in_fan_out")),
        modules_to_save=tuple(sorted(saved)),
        task_type=about.get("task_type"),
        base=about.get("base_model_name_or_path"),
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def read_settings(file: Path) -> LoraSettings:
    """Read an adapter_config.json. Raises InputError as `settings` does."""
    return settings(read_json(file), str(file))


def in_metadata(file: Path) -> dict[str, LoraSettings]:
    """Read diffusers' settings in the metadata of a safetensors file, by module prefix; none: empty."""
    if file.suffix != ".safetensors":
        return {}
    with safe_open(file, framework="numpy") as opened:
        text = (opened.metadata() or {}).get(METADATA)
    if text is None:
        return {}
    try:
        fields = json.loads(text)
        parts: dict[str, dict[str, Any]] = {}
        for name, value in fields.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = value
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file}: its {METADATA} cannot be read ({error}); save the adapter again") from error
    return {part: settings({"peft_type": "LORA"} | own, f"{file} ({METADATA}, {part})") for part, own in parts.items()}


def generated(tensors: Mapping[str, Any], known: LoraSettings | None) -> dict[str, Any]:
    """Build the adapter_config.json of a generated adapter: every module has a scale of 1, as the rows include it."""
    ranks = {module.removeprefix(PREFIX): len(pair.adapter.down) for module, pair in pairs(tensors).items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    other = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != r}
    known = known or LoraSettings()
    return {
        "peft_type": "LORA",
        "task_type": known.task_type,
        "base_model_name_or_path": known.base,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": other,
        "alpha_pattern": other,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": known.fan_in_fan_out,
        "target_modules": sorted(ranks),
        "modules_to_save": list(known.modules_to_save) or None,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def write_adapter(folder: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write a generated adapter in its members' layout (`adapter.json`): for peft, its config and names."""
    layout = about.get("layout")
    found = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    if layout == "peft":
        named = {name if name.startswith(PREFIX) else PREFIX + name: tensor for name, tensor in found.items()}
        save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
        write_json(folder / CONFIG, about["config"])
        return
    if layout == "alpha":
        for module, pair in pairs(tensors).items():
            found[f"{module}.alpha"] = np.array(len(pair.adapter.down), np.float32)
    save_file(found, folder / "model.safetensors", {"format": "pt"})
