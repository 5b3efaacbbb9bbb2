"""What an argument and a verb of the `heirloom` command are; `arguments` lists them all."""

from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heirloom.common.errors import InputError, check_seed
from heirloom.common.paths import AnyPath, place


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
    return Path(_given(text)).expanduser()


def destination(text: str) -> AnyPath:
    """Reads the path or the address of what a command writes. Raises InputError for a repository of Hugging Face."""
    return place(_given(_no_repository(text)))


def new_path(text: str) -> Path:
    """Reads the local path of what a command writes, as `destination` does."""
    return path(_no_repository(text))


def _no_repository(text: str) -> str:
    if text.startswith("hf:"):
        raise InputError(f"{text}: write a local folder, then heirloom push FOLDER {text}")
    return text


def _given(text: str) -> str:
    """Returns the text; an empty one, as of an unset variable, would be the current folder."""
    if not text:
        raise ArgumentTypeError("the path is empty; give one")
    return text
