"""What an argument and a verb of the `heirloom` command are; `arguments` lists them all."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heirloom.common.errors import check_seed


@dataclass(frozen=True)
class Argument:
    """The arguments of one call of `ArgumentParser.add_argument`. buckets: takes addresses in buckets, too."""

    names: tuple[str, ...]
    options: dict[str, Any]
    buckets: bool = False

    @property
    def name(self) -> str:
        """Its name in the parsed arguments."""
        return self.options.get("dest") or self.names[0].lstrip("-").replace("-", "_")

    @property
    def default(self) -> Any:
        """Its value where it is not given."""
        return self.options.get("default", False if self.options.get("action") == "store_true" else None)


def argument(*names: str, buckets: bool = False, **options: Any) -> Argument:
    """Returns the `Argument` of a call `add_argument(*names, **options)`."""
    return Argument(names, options, buckets)


@dataclass(frozen=True)
class Verb:
    """One verb; the function of the same name in `verbs` runs it.

    help: one line. flags: accepts flags for the fields of a recipe, or of the method's settings; more: a sentence
    about them. settings: these configs, "package.module.Class", which its help lists. json: accepts `--json FILE`.
    """

    name: str
    help: str
    arguments: tuple[Argument, ...] = ()
    flags: bool = False
    json: bool = False
    more: str = ""
    settings: tuple[str, ...] = ()


def seed(text: str) -> int:
    """Reads a seed. Raises InputError for a number that is none."""
    value = int(text)
    check_seed(value, "--seed")
    return value


def path(text: str) -> Path:
    """Reads a local path. The shell leaves the ~ of --out=~/x to us."""
    return Path(text).expanduser()
