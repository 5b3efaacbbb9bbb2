"""Names of classes: those of data among those of a model, as words for prompts, and their order in timm."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

Names = Sequence[str | None]
"""The name of each class of a model; None for a class without."""

# 001.Black_footed_Albatross, n02085620-Chihuahua, a/abbey
_NUMBERING = (r"\d+[._ -]+", r"n\d{8}[-_ ]+", r"(?i)/?([a-z])/(?=\1)")


def match(wanted: Sequence[str], names: Names) -> list[int | None]:
    """Returns the number of each of `wanted` among `names`; None where no name or several match.

    The first rule with a match decides: equal; equal but for case, with `_`, `-` and spaces the same; the same first
    synonym, separated by commas ("tench" is "tench, Tinca tinca"); a common synonym. A list of synonyms gives way where
    another name matches by an earlier rule: "chime, bell, gong" is no "gong" if there is "gong, tam-tam".
    """
    forms: tuple[Callable[[str], set[str]], ...] = (
        lambda name: {name},
        lambda name: {_plain(name)},
        lambda name: {_plain(name.split(",")[0])},
        lambda name: {_plain(part) for part in name.split(",") if part.strip()},
    )
    tables: list[dict[str, set[int]]] = [{} for _ in forms]
    for i, name in enumerate(names):
        for form, table in zip(forms, tables, strict=True):
            for key in form(name) if name else ():
                table.setdefault(key, set()).add(i)

    def find(name: str) -> tuple[int, int | None]:
        for rule, (form, table) in enumerate(zip(forms, tables, strict=True)):
            if fits := set().union(*(table.get(key, set()) for key in form(name))):
                return rule, fits.pop() if len(fits) == 1 else None
        return len(forms), None

    found, best = [find(name) for name in wanted], dict[int | None, int]()
    for rule, number in found:
        best[number] = min(rule, best.get(number, rule))
    return [None if "," in name and r > best[n] else n for name, (r, n) in zip(wanted, found, strict=True)]


def as_words(names: Sequence[str]) -> tuple[str, ...]:
    """Turns the names of folders or a column into words for prompts: 001.Barn_owl becomes "Barn owl".

    `_` and `/` become spaces. A number, a WordNet identifier, or the first letter as a folder (a/abbey, as in SUN397)
    goes if all names begin with one and still differ without it. Where no name has a space, hyphens between words
    become spaces (golden-retriever, not T-shirt), and words with inner capitals are split (AnnualCrop).
    """
    for pattern in _NUMBERING:
        rests = [name[found.end() :] if (found := re.match(pattern, name)) else "" for name in names]
        if all(rests) and len(set(rests)) == len(set(names)):
            names = rests
    names = [" ".join(re.sub("[_/]", " ", name).split()) or name for name in names]
    if not any(" " in name for name in names):
        names = [re.sub(r"(?<=\w\w)-(?=\w\w)|(?<=[a-z])(?=[A-Z])", " ", name) for name in names]
    return tuple(names)


def natural(name: str) -> list[Any]:
    """timm's order of class names (`natural_key`): numbers in them by value, letters without case."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name.lower()))]


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[_-]", " ", unicodedata.normalize("NFC", name).casefold()).split())
