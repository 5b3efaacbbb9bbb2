"""Text files with one entry a line, or a JSON list: class names, templates."""

import json
import re
from collections.abc import Sequence

from heirloom.common.errors import InputError
from heirloom.common.paths import AnyPath

HEADER = re.compile(
    r"(id|idx|index|label|class|number)?[\s,;]*(class_?name|class|name|label|prompt|caption)s?", re.IGNORECASE
)


def read_lines(file: AnyPath) -> tuple[str, ...]:
    """Reads the lines of a UTF-8 file, stripped of white space; blank lines at the end are dropped. Or a JSON list of
    strings: what begins with a square bracket is JSON, and so is a dictionary with entries.

    Raises InputError for a file that is missing, empty, not UTF-8, other JSON, or has a blank line in between (line
    numbers have a meaning), a header, or quotes, numbers or code around each entry.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    try:
        text = file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not readable as UTF-8 text: {error}") from error
    if text.startswith("[") or _is_dictionary(text):
        return _json_list(text, file)
    if not text:
        raise InputError(f"{file} is empty: write one entry a line")
    lines = [line.strip() for line in split_lines(text)]
    if "" in lines:
        raise InputError(f"{file}, line {lines.index('') + 1} is blank; write one entry a line, without blank lines")
    if what := other_form(lines):
        raise InputError(f"{file}: {what} ({lines[0][:40]!r}); write one entry a line and nothing else")
    return tuple(lines)


def other_form(lines: Sequence[str]) -> str:
    """Returns what stands around the entries where every line has it, as in published lists; else an empty string."""
    if all(re.fullmatch(r"""\[?(["']).*\1,?\]?""", line) for line in lines):
        return "its entries are quoted"
    if lines[0].startswith("lambda") or re.match(r"\{?\s*\d+\s*:", lines[0]):
        return "it is code"
    rows = lines[1:] if len(lines) > 1 and HEADER.fullmatch(lines[0]) else lines
    if len(rows) < len(lines):
        return "it begins with a header"
    for first in (0, 1):
        if len(lines) > 1 and all(re.match(rf"0*{i}[\s,;:.)]+\S", line) for i, line in enumerate(lines, first)):
            return "its entries are numbered"
    if len(lines) > 1 and all(line.startswith("- ") for line in lines):
        return "its entries are a list of YAML"
    return "its entries have identifiers" if all(re.match(r"n\d{8}[\s,:]", line) for line in lines) else ""


def split_lines(text: str) -> list[str]:
    """Splits a text where the lines of its file end. `str.splitlines` also cuts at U+2028 and its like."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _is_dictionary(text: str) -> bool:
    """Returns whether a text is a JSON dictionary with entries; "{}" is a template."""
    try:
        return text.startswith("{") and bool(json.loads(text))
    except ValueError:
        return False


def _json_list(text: str, file: AnyPath) -> tuple[str, ...]:
    try:
        entries = json.loads(text)
    except ValueError:
        entries = None
    if not isinstance(entries, list) or not entries or not all(isinstance(e, str) and e.strip() for e in entries):
        needed = "write a list of strings, or one entry a line without brackets"
        raise InputError(f"{file} looks like JSON but is not a list of strings: {needed}")
    return tuple(entry.strip() for entry in entries)
