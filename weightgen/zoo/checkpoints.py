"""A folder of foreign checkpoints as a zoo."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from heirloom.common.errors import InputError, nearest
from heirloom.common.files import read_json
from weightgen.tokens import TokenSpec, chunks, selected
from weightgen.zoo.foreign import listed
from weightgen.zoo.lora import pairs
from weightgen.zoo.members import Loaded, Member, adapter_record, agree, find_members, read_member
from weightgen.zoo.zoo import Zoo, flat


def import_folder(folder: Path, *, chunk: int | None = None, select: str = "") -> tuple[Zoo, tuple[str, ...]]:
    """Import a folder of checkpoints (safetensors, torch or numpy, one architecture): a zoo, and tasks in words.

    They are read one at a time.

    `quality.json` in the folder gives accuracies by file name, `tasks.json` what each file is for; a file it does not
    name is a task of that name. Pairs of low-rank adapters are made canonical, their scale inside. `zoo.about` has the
    members, what was done to them, and `notes` for the user. Raises InputError for a folder without checkpoints, for
    members of other shapes or modules, with NaN or infinity, or quantised.
    """
    members, left = find_members(folder)
    names = [member.path.name for member in members]
    quality, tasks = (_by_name(folder, name, names) for name in ("quality", "tasks"))
    first = read_member(members[0])
    spec = _cut(members[0], first, chunk, select=select)
    rows = np.zeros((len(members), spec.count), np.float32)
    loaded, faults = [], {}
    for row, member in zip(rows, members, strict=True):
        own = first if member is members[0] else read_member(member)
        same_tensors(spec, own.tensors, select, path=member.path, first=members[0].path)
        with np.errstate(over="ignore"):  # of f64, and looked at in the next line
            row[...] = flat(spec, spec.flatten(own.tensors))
        if own.broken or not np.isfinite(row).all():
            faults[member.path.name] = listed(own.broken or ["numbers too large for float32"], 1)
        loaded.append(replace(own, tensors={}))
    if faults:
        named = listed(f"{name} ({why})" for name, why in faults.items())
        which = f"{len(faults)} of {len(members)} members have NaN or infinity: {named}"
        raise InputError(f"{folder}: {which}; take them out of the folder")
    notes = [f"left alone: {len(left)} without weights ({listed(left)})"] if left else []
    chosen = {piece.path for piece in spec.pieces}
    if not select and (others := [name for name in first.tensors if name not in chosen]):
        kinds = "counters and running statistics, which a generated checkpoint lacks"
        notes.append(f"not in the zoo: {len(others)} tensors ({listed(others)}): {kinds}")
    notes += agree(members, loaded) + _twins(names, rows)
    if tasks and len(tasks) < len(names):
        unnamed = listed(name for name in names if name not in tasks)
        notes.append(f"tasks.json does not name {unnamed}: their tasks are their names")
    scores = np.array([quality.get(name, np.nan) for name in names], np.float32)
    paths = [member.path for member in members]
    words_of = [tasks.get(path.name, path.stem if path.is_file() else path.name) for path in paths]
    words = tuple(dict.fromkeys(words_of))
    adapters = adapter_record(members, loaded, first.tensors)
    about = {"members": names, "left alone": left, "notes": notes, "adapters": adapters}
    classes = np.array([[words.index(task)] for task in words_of], np.int32)
    return Zoo(weights=rows, quality=scores, classes=classes, net=None, spec=spec, about=about), words


def _by_name(folder: Path, name: str, members: Sequence[str]) -> Mapping[str, Any]:
    """Read `quality.json` or `tasks.json`. Raises InputError for values of another kind and for names of no member."""
    kind: Any = {"quality": (int, float), "tasks": str}[name]
    said = {"quality": "a number", "tasks": "words"}[name]
    file = folder / f"{name}.json"
    values: Any = read_json(file) if file.is_file() else {}
    if not isinstance(values, Mapping) or not all(isinstance(value, kind) and value != "" for value in values.values()):
        raise InputError(f"{file} must give {said} for each file: {{file name: {said}}}")
    if unknown := [key for key in values if key not in members]:
        near = nearest(unknown[0], members)
        raise InputError(f"{file} names {listed(unknown)}, not in the folder{near}; the keys are names of files")
    return values


def _cut(member: Member, first: Loaded, chunk: int | None, select: str) -> TokenSpec:
    try:
        spec = chunks(first.tensors, chunk, select=select)
        chosen = {piece.path for piece in spec.pieces}
        for pair in pairs(first.tensors).values() if first.layout else ():
            if len({pair.down, pair.up} & chosen) == 1:
                half = f"one half of the adapter of {pair.module}"
                raise InputError(f"select takes {half}: both belong together, or none")
    except InputError as error:
        raise InputError(f"{member.path}: {error}") from error
    if empty := [piece.path for piece in spec.pieces if not piece.size]:
        gather = "gather the weights (ZeRO-3) and save, or leave it out by select"
        raise InputError(f"{member.path}: {listed(empty)} has no numbers; {gather}")
    return spec


def same_tensors(spec: TokenSpec, tensors: Mapping[str, np.ndarray], select: str, path: Path, first: Path) -> None:
    """Raise InputError where a member has other tensors than the first one: missing, more, or of other shapes."""
    own = {name: tuple(leaf.shape) for name, leaf in selected(tensors, select)} if tensors else {}
    ours = {piece.path: piece.shape for piece in spec.pieces}
    faults = {
        "it lacks": [name for name in ours if name not in own],
        "only it has": [name for name in own if name not in ours],
        "of another shape is": [
            f"{name} {own[name]}, in the first {ours[name]}" for name in ours if name in own and own[name] != ours[name]
        ],
    }
    said = "; ".join(f"{what} {listed(names, 2)}" for what, names in faults.items() if names)
    if said:
        raise InputError(f"{path} is of another architecture than {first} ({said}); keep one architecture in a zoo")


def _twins(names: Sequence[str], rows: np.ndarray) -> list[str]:
    """Write a note on members that are bitwise equal, and on all-zero ones."""
    seen: dict[bytes, str] = {}
    same = []
    for name, row in zip(names, rows, strict=True):
        other = seen.setdefault(blake2b(row.tobytes()).digest(), name)
        if other != name:
            same.append(f"{other} = {name}")
    zero = [name for name, row in zip(names, rows, strict=True) if not row.any()]
    twice = [f"the same weights twice: {listed(same)}"] if same else []
    return twice + ([f"all zero: {listed(zero)}"] if zero else [])
