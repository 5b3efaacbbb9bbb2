"""Reads files of prompts, and writes pictures with their prompt and settings in the metadata of each PNG."""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from heirloom.common.data.grid import grid
from heirloom.common.data.lines import other_form, read_lines, split_lines
from heirloom.common.errors import InputError
from heirloom.common.files import staged

Layout = Literal["plain", "geneval", "dpg"]
SOFTWARE = "heirloom"
_TABLES = (".csv", ".tsv", ".json")
# How JSON begins. Prompts may begin with brackets, too: "[V] dog", "{red} apple".
_JSON_LIST, _JSON_OBJECT = re.compile(r'\[\s*["\[{\]\d]'), re.compile(r'\{\s*"')


@dataclass(frozen=True)
class Prompt:
    """A prompt. name: of its file, for the layout of DPG-Bench. about: its line of GenEval's metadata."""

    text: str
    name: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)


def read_prompts(path: Path, layout: Layout) -> list[Prompt]:
    """Reads prompts: one a line of a text file, GenEval's `.jsonl` (field "prompt"), a JSON list, or DPG-Bench's folder
    of `.txt`.

    Raises InputError for a file that does not exist or has none, for a table, and for one of another layout.
    """
    if path.is_dir():
        if layout != "dpg":
            raise InputError(f"{path} is a folder of prompts, which is DPG-Bench's: give --layout dpg, or a file")
        found = [Prompt(_text(file).strip(), file.stem) for file in sorted(path.glob("*.txt"))]
    elif layout == "dpg":
        raise InputError(f"{path}: --layout dpg reads DPG-Bench's folder of .txt files, whose names the pictures take")
    elif path.suffix == ".jsonl":
        found = [_from_json(path, i, line) for i, line in enumerate(split_lines(_text(path)), 1) if line.strip()]
    elif layout == "geneval":
        raise InputError(f"{path}: --layout geneval reads GenEval's evaluation_metadata.jsonl; name that file")
    elif _JSON_LIST.match(_text(path).strip()):
        found = [Prompt(text) for text in read_lines(path)]
    else:
        lines = [line.strip() for line in split_lines(_text(path)) if line.strip()]
        found = _plain(path, lines)
    if not found:
        raise InputError(f"{path}: holds no prompts")
    return found


def _plain(path: Path, lines: Sequence[str]) -> list[Prompt]:
    """Returns a prompt for each line of text, or for each JSON object. Raises InputError for a table and other JSON."""
    if lines and all(_JSON_OBJECT.match(line) for line in lines):
        return [_from_json(path, i, line) for i, line in enumerate(lines, 1)]
    if path.suffix.lower() in _TABLES or any("\t" in line for line in lines):
        kind = "other JSON than a list of texts" if path.suffix.lower() == ".json" else "a table"
        raise InputError(f'{path} is {kind}; give one prompt a line, or a .jsonl with a field "prompt"')
    if lines and (what := other_form(lines)):
        raise InputError(f"{path}: {what} ({lines[0][:40]!r}); give one prompt a line and nothing else")
    return [Prompt(line) for line in lines]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(f"{path}: prompts cannot be read ({why})") from error


def _from_json(path: Path, number: int, line: str) -> Prompt:
    try:
        about = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(about, dict) or not isinstance(about.get("prompt"), str):
        raise InputError(f'{path}, line {number}: has no text field "prompt"')
    return Prompt(about["prompt"], about=about)


@dataclass(frozen=True)
class Album:
    """A folder of pictures. layout: `00000_a_red_apple_seed0_0.png`, or that of the benchmark GenEval or DPG-Bench.

    count: pictures of each prompt.
    """

    folder: Path
    layout: Layout
    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise InputError(f"--layout {self.layout}: choose {', '.join(get_args(Layout))}")

    def files(self, number: int, prompt: Prompt) -> list[Path]:
        """Returns where the pictures of a prompt go; for DPG-Bench one file, a grid of all."""
        if self.layout == "geneval":
            return [self.folder / f"{number:05d}" / "samples" / f"{i:05d}.png" for i in range(self.count)]
        if self.layout == "dpg":
            return [self.folder / f"{prompt.name}.png"]
        letters = unicodedata.normalize("NFC", prompt.text.lower())
        slug = re.sub(r"[\W_]+", "_", letters)[:40].strip("_")
        slug = slug or ("prompt" if letters.strip() else "unconditional")
        return [self.folder / f"{number:05d}_{slug}_seed{self.seed}_{i}.png" for i in range(self.count)]

    def has(self, number: int, prompt: Prompt, settings: Sequence[Mapping[str, Any]]) -> bool:
        """Returns whether all pictures of a prompt exist, drawn with these settings."""
        files = zip(self.files(number, prompt), self._settings(settings), strict=True)
        return all(file.is_file() and read_settings(file) == json.loads(json.dumps(how)) for file, how in files)

    def write(
        self, number: int, prompt: Prompt, pictures: np.ndarray, settings: Sequence[Mapping[str, Any]]
    ) -> list[Path]:
        """Writes the pictures of a prompt, uint8 [count, height, width, 3], with the settings of each in its
        metadata.
        """
        files = self.files(number, prompt)
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
        if self.layout == "geneval":
            about = json.dumps(dict(prompt.about) or {"prompt": prompt.text})
            (self.folder / f"{number:05d}" / "metadata.jsonl").write_text(about + "\n")
        images = [grid(pictures)] if self.layout == "dpg" else [Image.fromarray(picture) for picture in pictures]
        for file, image, how in zip(files, images, self._settings(settings), strict=True):
            write_png(image, file, how)
        return files

    def _settings(self, settings: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Returns the settings of each file: a grid has those of its first picture, and the number of pictures."""
        return [{**settings[0], "count": self.count}] if self.layout == "dpg" else settings


def write_png(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Writes a PNG with text chunks: Software, Description (the prompt), and `heirloom`, all settings as JSON."""
    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    info.add_itxt("Description", str(settings.get("prompt", "")))
    info.add_itxt(SOFTWARE, json.dumps(settings, ensure_ascii=False))
    with staged(path, force=True) as file:
        image.save(file, format="PNG", pnginfo=info)


def read_settings(path: Path) -> dict[str, Any] | None:
    """Reads the settings of a picture that `write_png` wrote; None for any other file."""
    try:
        with Image.open(path) as image:
            return json.loads(getattr(image, "text", {})[SOFTWARE])
    except (OSError, KeyError, ValueError):
        return None
