"""Builds frozen dataclasses from our own JSON files; each field is checked against its annotation."""

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from heirloom.common.errors import FLOAT32_MAX, InputError, nearest

T = TypeVar("T")
LARGEST = 2**40  # of any whole number in a config; a larger one is a damaged file


class Config(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def from_json(kind: type[T], values: object, where: str = "config.json") -> T:
    """Returns `kind(**values)`, with nested dataclasses, tuples and options, from the plain values of JSON.

    A field with a default may be left out. Raises InputError naming `where` and the field for an unknown field, a
    missing one, a value of another type, and anything that the dataclass itself refuses.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where} is {_shown(values)}, not an object")
    hints, known = get_type_hints(kind), {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(map(str, values.keys() - known.keys())):
        near = nearest(unknown[0], known)
        raise InputError(f"{where}: there is no field {unknown[0]!r}{near}; was it written by another version?")
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise InputError(f"{where}: the field {name!r} is missing; was it written by another version?")
    built = {name: build(hints[name], value, f"{where}: {name}") for name, value in values.items()}
    try:
        return kind(**built)
    except InputError as error:
        raise error if where in str(error) else InputError(f"{where}: {error}") from error


def build(hint: Any, value: Any, where: str) -> Any:
    """Returns the plain `value` as the type `hint`. where: its name, for messages. Raises InputError if it does not
    fit.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        return _first(args, value, where)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in args):
            near = nearest(value, map(str, args)) if isinstance(value, str) else ""
            raise InputError(f"{where} is {_shown(value)}{near}; it is one of {', '.join(map(str, args))}")
        return value
    if is_dataclass(hint):
        return from_json(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list | tuple) or (args[-1] is not Ellipsis and len(value) != len(args)):
            length = "" if args[-1] is Ellipsis else f" of {len(args)}"
            raise InputError(f"{where} is {_shown(value)}, and must be a list{length}")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(build(kind, item, where) for kind, item in zip(inner, value, strict=True))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise InputError(f"{where} is {_shown(value)}, not an object")
        return dict(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX:
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return value
    if (hint in (bool, str) and isinstance(value, hint)) or (hint in (None, NoneType) and value is None):
        return value
    words = {int: "a whole number", float: "a finite number (in float32)", str: "a string", bool: "true or false"}
    words |= {NoneType: "null"}
    raise InputError(f"{where} is {_shown(value)}, and must be {words.get(hint, str(hint))}")


def _first(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """Builds the first type that fits; of several dataclasses, the one with most of the given fields."""
    if value is None and NoneType in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not NoneType)
    if isinstance(value, Mapping) and (models := [kind for kind in kinds if is_dataclass(kind)]):
        names = [{f.name for f in fields(kind)} for kind in models]
        best = max(range(len(models)), key=lambda i: len(names[i] & value.keys()))
        return from_json(models[best], value, where)  # type: ignore[type-var, arg-type]
    complaints = []
    for kind in kinds:
        try:
            return build(kind, value, where)
        except InputError as error:
            complaints.append(error)
    raise complaints[0]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
