"""A folder of foreign checkpoints: which files and folders are members of a zoo, and their tensors, as one form."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from heirloom.common.checkpoint.unwrap import weights_files
from heirloom.common.errors import InputError
from heirloom.common.files import read_json
from weightgen.zoo.adapter_config import CONFIG, LoraSettings, generated, in_metadata, read_settings
from weightgen.zoo.foreign import listed, not_finite, read_tensors, refuse_quantised
from weightgen.zoo.lora import Layout, alphas, canonical_tensors, has_adapters, layout_of, pairs

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz")
STATE = re.compile(r"^(training_args|optim|optimizer|scheduler|scaler|rng_state|random_states)")  # of a training
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
SIDECARS = ("quality.json", "tasks.json")
ASSUMED = "none given, 1 is assumed"


@dataclass(frozen=True)
class Member:
    """A file, or a folder with one checkpoint in it. config: its adapter_config.json, where it has one."""

    path: Path
    files: tuple[Path, ...]
    config: Path | None = None


def find_members(folder: Path) -> tuple[list[Member], list[str]]:
    """Find the members of a folder, sorted, and the names of what is left alone. Raises InputError for no members.

    Left alone are hidden files, states of trainings, folders and files without weights.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give one of checkpoints")
    paths = sorted(folder.iterdir())
    shards = {name for path in paths if ".index" in path.name and path.suffix == ".json" for name in _shards(path)}
    found: list[Member] = []
    left: list[str] = []
    for path in paths:
        member = None if path.name.startswith(".") or path.name in shards else _member(path)
        if member:
            found.append(member)
        elif path.name not in (*SIDECARS, *shards, CONFIG):
            left.append(path.name)
    if not found:
        raise InputError(f"{folder} holds no checkpoints ({', '.join(SUFFIXES)}, or folders with one of them)")
    return found, left


def _shards(index: Path) -> set[str]:
    where = read_json(index).get("weight_map")
    return set(map(str, where.values())) if isinstance(where, Mapping) else set()


def _member(path: Path) -> Member | None:
    if path.is_file():
        if (path.suffix not in SUFFIXES and ".index" not in path.name) or STATE.match(path.name):
            return None
        config = path.parent / CONFIG  # peft's, or one for all the files of the folder
        return Member(path, (path,), config if config.is_file() else None)
    if not path.is_dir():
        return None
    found = [p for p in path.iterdir() if p.is_file() and p.suffix in SUFFIXES]
    weights = [p for p in found if not p.name.startswith(".") and not STATE.match(p.name)]
    config = path / CONFIG
    for name in ADAPTER:
        if path / name in weights:
            return Member(path, (path / name,), config if config.is_file() else None)
    if not weights:
        return None
    if config.is_file():
        names = listed(p.name for p in weights)
        raise InputError(f"{path} has an {CONFIG}, and its weights are {names}: name them {ADAPTER[0]}")
    files = [file for file in weights_files(path) if not STATE.match(file.name)]
    return Member(path, tuple(files))


@dataclass(frozen=True)
class Loaded:
    """A member's tensors as a zoo takes them. broken: those with NaN or infinity, given as zeros here.

    Of adapters: scales by module, where these are from, and the settings of their adapter_config.json.
    """

    tensors: dict[str, np.ndarray]
    broken: list[str] = field(default_factory=list)
    scales: Mapping[str, float] = field(default_factory=dict)
    scale_from: str = ""
    settings: LoraSettings | None = None
    layout: Layout | None = None


def read_member(member: Member) -> Loaded:
    """Read the tensors of a member; adapters in their canonical form, with their scale inside.

    Raises InputError, naming the member, for quantised weights and for adapters that are no plain LoRA.
    """
    tensors = read_tensors(member.files)
    settings = read_settings(member.config) if member.config and _configured(member, tensors) else None
    try:
        refuse_quantised(tensors, member.path / "config.json" if member.path.is_dir() else None)
        broken = not_finite(tensors)
        tensors |= {name: np.zeros(tensors[name].shape, np.float32) for name in broken}
        if settings is None and not has_adapters(tensors):
            return Loaded(tensors=tensors, broken=broken)
        modules = pairs(tensors)
        stored = in_metadata(member.files[0])
        numbers = {} if settings else alphas(tensors, modules)
        stored_in = "the file's metadata" if stored else "alpha tensors" if numbers else ASSUMED
        scale_from = CONFIG if settings else stored_in

        def scale(module: str, rank: int) -> float:
            part, _, rest = module.partition(".")
            if settings:
                return settings.scale(module, rank)
            return stored[part].scale(rest, rank) if part in stored else numbers.get(module, rank) / rank

        scales = {module: scale(module, len(pair.adapter.down)) for module, pair in modules.items()}
        fixed = canonical_tensors(tensors, lambda module, rank: scales[module])
        scaled: dict[str, Any] = dict(scales=scales, scale_from=scale_from, settings=settings)
        return Loaded(tensors=fixed, broken=broken, **scaled, layout=layout_of(fixed, settings is not None))
    except InputError as error:
        raise InputError(f"{member.path}: {error}") from error


def _configured(member: Member, tensors: Mapping[str, Any]) -> bool:
    """Tell whether the adapter_config.json of a member applies to it.

    One next to several files does where a file has adapters, and no scale in its metadata or in alpha tensors.
    """
    if not member.path.is_file() or member.path.name in ADAPTER:
        return True
    own = any(name.endswith(".alpha") for name in tensors) or in_metadata(member.path)
    return has_adapters(tensors) and not own


def agree(members: Sequence[Member], loaded: Sequence[Loaded]) -> list[str]:
    """Check that adapters fit into one zoo, and write notes on them; the tensors may be dropped before.

    Raises InputError where members are written in different ways, which one row of numbers cannot hold.
    """
    notes: list[str] = []
    first = loaded[0]
    kinds: tuple[tuple[str, Callable[[Loaded], Any]], ...] = (
        ("names", lambda r: r.layout),
        ("scale", lambda r: r.scale_from == ASSUMED),
        ("fan_in_fan_out", lambda r: r.settings and r.settings.fan_in_fan_out),
        ("modules_to_save", lambda r: r.settings and r.settings.modules_to_save),
    )
    for what, of in kinds:
        for member, own in zip(members, loaded, strict=True):
            if of(own) != of(first):
                sources = f"{own.scale_from} and {first.scale_from}"
                how = sources if what == "scale" else f"{of(own)!r} and {of(first)!r}"
                paths = f"{member.path} and {members[0].path}"
                raise InputError(f"{paths} differ in {what} ({how}): keep one kind of adapters in a zoo")
    if first.layout is None:
        return notes
    scales = sorted({scale for own in loaded for scale in own.scales.values()})
    span = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
    origins = ", ".join(sorted({own.scale_from for own in loaded}))
    notes.append(f"adapters: in one form, with their scale inside (alpha: {origins}; scale {span})")
    if len(bases := sorted({str(own.settings.base) for own in loaded if own.settings and own.settings.base})) > 1:
        same = "the same numbers are other updates on another base"
        notes.append(f"the adapters are of different base models ({listed(bases)}): {same}")
    return notes


def adapter_record(
    members: Sequence[Member], loaded: Sequence[Loaded], tensors: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Record what a generator needs to write an adapter; None where the members are none.

    The layout, its adapter_config.json, and what was done to the members.
    """
    first = loaded[0]
    if first.layout is None:
        return None
    known = first.settings
    for own in loaded:
        if known and own.settings and own.settings.base != known.base:
            known = replace(known, base=None)
        if known and own.settings and own.settings.task_type != known.task_type:
            known = replace(known, task_type=None)
    return {
        "layout": first.layout,
        "config": generated(tensors, known) if first.layout == "peft" else None,
        "form": "up, down of the singular value decomposition of scale B A, roots of the singular values on both sides",
        "scale from": sorted({own.scale_from for own in loaded}),
        "scales": {member.path.name: _short(own.scales) for member, own in zip(members, loaded, strict=True)},
    }


def _short(scales: Mapping[str, float]) -> Any:
    return next(iter(scales.values())) if len(set(scales.values())) == 1 else dict(scales)
