"""The installed methods. Each package's table `VERBS` maps verbs to functions, imported when a verb runs."""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from heirloom.common.errors import InputError, nearest

if TYPE_CHECKING:  # imports jax, which most commands never need
    from pathlib import Path

    from heirloom.common.checkpoint.family import Donor, Family


@cache
def methods() -> Mapping[str, Mapping[str, str]]:
    """Returns {method: {verb: "module:function"}}: the `VERBS` of the modules of the entry points `heirloom.methods`.

    The entry `families` is the list of the method's model families.
    """
    found = {point.name: point for point in entry_points(group="heirloom.methods")}
    if not found:
        raise InputError("no method is installed: run pip install -e . in the repository")
    return {name: point.load().VERBS for name, point in sorted(found.items())}


def able(verb: str) -> list[str]:
    """Returns the names of the methods that have a verb."""
    return [name for name, verbs in methods().items() if verb in verbs]


def ability(method: str, verb: str) -> Any:
    """Imports what a method has for a verb. Raises InputError for an unknown method, or one without the verb."""
    found = methods()
    if method not in found:
        raise InputError(f"no method {method!r}{nearest(method, found)} (installed: {', '.join(found)})")
    if verb not in found[method]:
        only = f"only for {', '.join(able(verb))}" if able(verb) else "for no installed method"
        raise InputError(f"{verb!r} is not available for {method} ({only})")
    module, _, name = found[method][verb].partition(":")
    return getattr(import_module(module), name)


def families() -> "list[Family]":
    """Returns the model families of all methods."""
    return [family for method in able("families") for family in ability(method, "families")]


def method_of(donor: "Donor") -> str:
    """Returns the name of the method that a checkpoint belongs to."""
    return next(name for name in able("families") if donor.family in ability(name, "families"))


def open_any(source: str, **overrides: Any) -> "Donor":
    """Opens a checkpoint by SOURCE; of a run folder, its `model`, and of a pipeline folder, its denoiser.

    overrides: see `open_donor`.
    """
    from heirloom.common.checkpoint.convert import open_donor
    from heirloom.common.checkpoint.pipeline import is_pipeline, main_part

    path = locate_any(source)
    return open_donor(main_part(path) if is_pipeline(path) else path, families(), **overrides)


def locate_any(source: str) -> "Path":
    """Returns the local file or folder of a SOURCE, which may be embedded in any method."""
    from heirloom.common.checkpoint.hub import locate

    return locate(source, {name: path for family in families() for name, path in family.embedded.items()})
