"""The installed methods: each package says in a table which function runs a verb, and is imported only for that."""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from heirloom.common.errors import InputError, nearest


@cache
def methods() -> Mapping[str, Mapping[str, str]]:
    """{method: {verb: "module:function"}}: the `VERBS` of the modules behind the entry points `heirloom.methods`.

    `families` is in the table too: the list of the method's model families.
    """
    found = {point.name: point for point in entry_points(group="heirloom.methods")}
    if not found:
        raise InputError("no method is installed: run pip install -e . in the repository")
    return {name: point.load().VERBS for name, point in sorted(found.items())}


def able(verb: str) -> list[str]:
    """The methods that have a verb."""
    return [name for name, verbs in methods().items() if verb in verbs]


def ability(method: str, verb: str) -> Any:
    """What a method runs for a verb. Raises InputError for an unknown method, or one that lacks the verb."""
    found = methods()
    if method not in found:
        raise InputError(f"no method {method!r}{nearest(method, found)} (installed: {', '.join(found)})")
    if verb not in found[method]:
        raise InputError(f"{method} has no {verb}; {', '.join(able(verb)) or 'no installed method'} has")
    module, _, name = found[method][verb].partition(":")
    return getattr(import_module(module), name)


def families() -> list[Any]:
    """The model families of all methods."""
    return [family for method in able("families") for family in ability(method, "families")]


def method_of(donor: Any) -> str:
    """The method whose family a checkpoint is of."""
    return next(name for name in able("families") if donor.family in ability(name, "families"))


def open_any(source: str, **overrides: Any) -> Any:
    """A checkpoint by SOURCE: the run folders we write count as their model."""
    from heirloom.common.checkpoint.convert import open_donor
    from heirloom.common.checkpoint.hub import locate

    known = families()
    path = locate(source, {name: path for family in known for name, path in family.embedded.items()})
    return open_donor(path / "model" if (path / "metrics.jsonl").is_file() else path, known, **overrides)
