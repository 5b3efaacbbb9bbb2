"""Recipes: Python files with `get_config()`. Every field of the config is a typed flag."""

import ast
import contextlib
import importlib.util
import io
import re
import sys
import traceback
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from math import inf
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

import cloudpickle

from heirloom.common.errors import FLOAT32_MAX, InputError, nearest, remark
from heirloom.common.paths import all_local

T = TypeVar("T")
SHIPPED = Path(__file__).parent.parent / "configs"


class Recipe(Protocol):
    """A config that knows how to run itself: a frozen dataclass of frozen dataclasses.

    It may also have, each for one verb: `inherit(destination, force=)` -> provenance, `evaluate()` -> rows {dataset,
    metric, value, published, n}, `describe()` -> (family, config of the student), `abstract(mesh)` -> an `Abstract`
    step, `cache(destination)`, and `former()` -> {prefix of a flag before: now}. It and each config inside it may have
    `idle()` -> {field: why it does nothing here}.
    """

    def train(self, directory: Path) -> None:
        """Train in a run folder, or resume there."""


def recipes() -> list[str]:
    """Returns the names of the shipped recipes, such as `tinyclip/smoke`."""
    paths = (path for path in SHIPPED.glob("*/*.py") if path.stem != "__init__")
    return sorted(path.relative_to(SHIPPED).with_suffix("").as_posix() for path in paths)


def summaries(starting: str = "") -> dict[str, str]:
    """Returns the shipped recipes whose names start so, each with the first sentence that it says of itself."""
    said = {name: ast.get_docstring(ast.parse((SHIPPED / f"{name}.py").read_text())) or "" for name in recipes()}
    first = {name: " ".join(text.partition("\n\n")[0].split()) for name, text in said.items()}
    return {name: text for name, text in first.items() if name.startswith(starting)}


def is_recipe(name: str) -> bool:
    """Returns whether `name` is a recipe: a Python file, or `method/...` if there is no such path."""
    if name.endswith(".py"):
        return True
    return not Path(name).exists() and name.split("/")[0] in {r.split("/")[0] for r in recipes()}


def load(name: str, flags: Sequence[str] = (), verb: str = "train") -> Recipe:
    """Returns the config of a shipped recipe or of a file, with fields set by flags (`--optim.lr 3e-4`).

    verb: of the command, for the help and errors of flags. Raises InputError for an unknown recipe, a file that does
    not run or has no `get_config`, a wrong flag, and a flag that has no effect in this recipe (`cfg.idle()`).
    """
    path = SHIPPED / f"{name}.py" if name in recipes() else Path(name)
    if not path.is_file():
        if behind := next((word for word in flags if word in recipes() or word.endswith(".py")), None):
            flag = next((word for word in flags if word.startswith("-")), "--steps")
            raise InputError(f"{name!r} is no recipe; write it before its flags: heirloom {verb} {behind} {flag} ...")
        known = ", ".join(recipes())
        raise InputError(f"no recipe {name!r}{nearest(name, recipes())} (there are {known}; or give a .py file)")
    # Two recipes may have one file name.
    unique = f"heirloom_config_{zlib.crc32(str(path.resolve()).encode()):08x}_{path.stem}"
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up annotations in sys.modules. Pickling is by value: workers cannot import this name.
    sys.modules[spec.name] = module
    cloudpickle.register_pickle_by_value(module)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise InputError(f"{path} has no get_config(): a recipe is a Python file with a function of that name")
        cfg = module.get_config()
    except InputError:
        raise
    except Exception as error:  # a recipe is the user's program and may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if Path(frame.filename) == path), frames[-1].lineno)
        what = str(error)
        if isinstance(error, SyntaxError):
            line, what = error.lineno, error.msg
        what = " ".join(what.split())  # one line, whatever was raised
        raise InputError(f"{path}, line {line}: {type(error).__name__}: {what}; correct the recipe") from error
    flags = [_renamed(cfg, flag) for flag in flags]
    try:
        parsed = parse(cfg, flags, f"heirloom {verb} {name}", module.__doc__)
    except InputError:
        refuse_idle(cfg, _written(flags), inner=False)  # configs inside it may be others by flags that were not taken
        raise
    refuse_idle(parsed, _written(flags))  # after all flags: one may give another an effect
    all_local(parsed, f"heirloom {verb}")
    return parsed


def refuse_idle(cfg: Any, given: Mapping[str, str], *, inner: bool = True) -> None:
    """Raises InputError for a field that was given and has no effect in this config.

    given: {path: as it was written}. inner: what the configs inside it say counts too.
    """
    idle = dict(_idle(cfg, inner))
    for path, written in given.items():
        if field := next((field for field in idle if path == field or path.startswith(f"{field}.")), None):
            raise InputError(f"{written} has no effect in this recipe: {idle[field]}")


def _idle(cfg: Any, inner: bool, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The fields without effect of a config, and of those inside it, and why."""
    if hasattr(cfg, "idle") and not (prefix and hasattr(cfg, "train")):  # a recipe of recipes fills in what they lack
        yield from ((f"{prefix}{name}", why) for name, why in cfg.idle().items())
    for f in fields(cfg) if inner else ():
        if is_dataclass(part := getattr(cfg, f.name)):
            yield from _idle(part, inner, f"{prefix}{f.name}.")


def _written(flags: Sequence[str]) -> dict[str, str]:
    """Paths of the fields that flags set, and the flags."""
    names = (flag.partition("=")[0] for flag in flags if flag.startswith("--"))
    return {name[2:].replace("-", "_"): name for name in names}


def _renamed(cfg: Recipe, flag: str) -> str:
    """Returns the flag under its present name; a former name (`cfg.former()`) is remarked."""
    for former, now in (cfg.former() if hasattr(cfg, "former") else {}).items():
        if flag.startswith(f"--{former}"):
            present = f"--{now}{flag.removeprefix(f'--{former}')}"
            remark(f"{flag} is {present} now")
            return present
    return flag


def parse(cfg: T, flags: Sequence[str], prog: str, description: str | None = None) -> T:
    """Returns the config with its fields set by flags. Raises InputError with tyro's framed message as one line."""
    if not flags:
        return cfg
    import tyro

    with contextlib.redirect_stderr(io.StringIO()) as complaint:
        try:
            # A field of several types gets the flags of its current type.
            how: Any = dict(prog=prog, description=description, config=(tyro.conf.AvoidSubcommands,))
            return _in_float32(tyro.cli(type(cfg), default=cfg, args=_split(cfg, flags), **how))
        except SystemExit as end:
            if not end.code:
                raise  # --help
    # A frame with a title, the complaint, a rule, the help of a flag or its likely spelling, and where all are listed.
    _, *lines = re.sub(r"[\u2500-\u257f]|\x1b\[[0-9;]*m", " ", complaint.getvalue()).strip().splitlines()
    text = re.sub(r"[. ]*For full helptext, (run|see)", "; see", " ".join(" ".join(lines).split()))
    raise InputError(re.sub(r" Argument helptext: .*(?=; see)", "", text))


def _in_float32(cfg: T, name: str = "") -> T:
    """Returns the config. Raises InputError for a finite number in it that would be infinite in float32."""
    parts: Iterable[tuple[str, Any]] = ()
    if is_dataclass(cfg):
        parts = ((f"{name}.{f.name}" if name else f.name, getattr(cfg, f.name)) for f in fields(cfg))
    elif isinstance(cfg, tuple | list):
        parts = ((name, part) for part in cfg)
    elif isinstance(cfg, float) and FLOAT32_MAX < abs(cfg) < inf:
        raise InputError(f"{name} is {cfg:g}: choose a number that float32 holds, up to {FLOAT32_MAX:.1g}")
    for where, part in parts:
        _in_float32(part, where)
    return cfg


def _split(cfg: object, flags: Sequence[str]) -> list[str]:
    """Rewrites `--depths=4,6,8` for tyro, `--depths 4 6 8`, where the field holds several numbers or choices."""
    out: list[str] = []
    several = False
    for word in flags:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            several = _holds_several(cfg, name)
            out += [name, *value.split(",")] if several and equals else [word]
        else:
            out += word.split(",") if several else [word]
    return out


def _holds_several(cfg: Any, flag: str) -> bool:
    """Whether the field of a flag is a tuple of numbers or choices."""
    *owners, name = flag.lstrip("-").replace("-", "_").split(".")
    try:
        for owner in owners:
            cfg = cfg[int(owner)] if owner.isdecimal() else getattr(cfg, owner)
        hint = get_type_hints(type(cfg))[name]
    except (AttributeError, IndexError, KeyError, NameError, TypeError):
        return False  # tyro says what is wrong
    tuples = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is tuple]
    return any(all(part in (int, float, ...) or get_origin(part) is Literal for part in get_args(t)) for t in tuples)
