"""What a resume may change in the config of a run, and what it must not."""

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from heirloom.common.typed import Config

# Fields that change no result: where a run computes (on another mesh up to rounding), how often it reports and saves.
_WHERE = r"(\w+\.)*(mesh\.\w+|pipeline\.workers|pipeline\.prefetch|writers)"
_CADENCE = r"(log|save|eval)_every|keep_(last|every|minutes|compiled)|stuck_seconds|profile"
# Paths may move. The number of examples is compared with the saved state of the data, and the weights of donor and
# teacher with the hashes of those that the run began with (`same_sources` in recipe.py).
_PATHS = r"data\.path|held_out\.path"
# Not from or to none, which is another training, nor stored embeddings or logits, which have no weights to compare.
_SOURCES = r'(teacher|donor): "(?!"|cache:|embeddings"|logits").+" before, "(?!"|cache:|embeddings"|logits")'
# Fields that change what is trained from here on, on purpose.
_GOES_ON = r"steps|step\.max_skipped|(\w+\.)*pipeline\.bad(_limit)?"
FREE = re.compile(rf"  (({_WHERE}|{_CADENCE}|{_PATHS}|{_GOES_ON}):|{_SOURCES})")
NOTES = {"  steps:": "; schedules that depend on the number of steps are computed anew"}


def difference(old: object, new: object, name: str = "") -> list[str]:
    """Returns one line per field in which two JSON values differ: `optim.lr: 0.0001 before, 0.0003 now`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        values = ((old.get(key, ...), new.get(key, ...), f"{name}.{key}".lstrip(".")) for key in keys)
        return [line for value in values for line in difference(*value)]
    if old == new:
        return []
    show = ["absent" if value is ... else json.dumps(value) for value in (old, new)]
    return [f"  {name}: {show[0]} before, {show[1]} now"]


def changes(lines: list[str]) -> list[str]:
    """Returns the lines of `difference` that a resume may have, each with what follows from it."""
    notes = ((line, [note for start, note in NOTES.items() if line.startswith(start)]) for line in lines)
    return [line.strip() + "".join(note) for line, note in notes if FREE.match(line)]


def with_defaults(old: Mapping[str, Any], cfg: Config) -> dict[str, Any]:
    """Returns the saved config of a run with the fields that a newer version added, at their defaults.

    cfg: the config now, a dataclass. A field without default stays absent.
    """
    out = dict(old)
    for field in fields(cfg):
        if field.name in old:
            out[field.name] = _filled(old[field.name], getattr(cfg, field.name))
        elif field.default is not MISSING:
            out[field.name] = _plain(field.default)
        elif field.default_factory is not MISSING:
            out[field.name] = _plain(field.default_factory())
    return out


def _filled(old: Any, value: Any) -> Any:
    """Returns the saved value of a field, with the defaults of the configs in it."""
    if isinstance(old, list) and isinstance(value, list | tuple) and len(old) == len(value):
        return [_filled(*pair) for pair in zip(old, value, strict=True)]
    if isinstance(old, dict) and is_dataclass(value) and not isinstance(value, type):
        return with_defaults(old, value)
    return old


def _plain(value: Any) -> Any:
    """Returns a default as it is read back from JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
