"""Reads what trainers pickle next to tensors, such as arguments and configs, without the classes it was made of."""

from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

DEEPEST = 12  # levels of a config; objects may contain what contains them
_CONTENT = ("_fields", "_content")  # where ml_collections and omegaconf keep the settings
_VALUE = "_val"  # of omegaconf's nodes


class Opaque:
    """Stands for any class: `Opaque(...)` is an empty OrderedDict, whatever the arguments. torch fills it with the
    object's items, and its `vars` with the attributes; it does so with no subclass.
    """

    def __new__(cls, *args: Any, **options: Any) -> OrderedDict[str, Any]:  # type: ignore[misc]
        return OrderedDict()


def plain(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """Returns a config as nested dictionaries: of argparse, omegaconf, ml_collections, or another class as `Opaque`.

    An object without items is taken for its attributes. inside: the ids of what contains the value.
    """
    if id(value) in inside or len(inside) == DEEPEST:
        return None
    inside = (*inside, id(value))
    if isinstance(value, OrderedDict) and not value:
        found = vars(value)
        if _VALUE in found:
            return plain(found[_VALUE], inside)
        value = next((found[name] for name in _CONTENT if name in found), found)
    elif isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(name): plain(one, inside) for name, one in value.items()}
    return [plain(one, inside) for one in value] if isinstance(value, list) else value
