"""Saves drawn pictures batch by batch, and continues where a killed evaluation stopped."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from heirloom.common.errors import InputError
from heirloom.common.evaluate.generated import read_images
from heirloom.common.files import read_json, remove, replacing, staged, write_json
from heirloom.common.reading import mapped


@dataclass(frozen=True)
class Drawn:
    """Pictures on disk: `path` is an .npz (arr_0, uint8) once all are drawn; until then they are in `path`.part.npy.

    shape: [pictures, height, width, 3]. how: the settings of model and sampler as plain data, saved in `path`.json.
    `path`.part.json has the settings and the number of pictures drawn so far.
    """

    path: Path
    shape: tuple[int, ...]
    how: Mapping[str, Any]

    def _next_to(self, ending: str) -> Path:
        return self.path.with_name(self.path.name + ending)

    def count(self) -> int:
        """Count the pictures drawn so far. Raises InputError if the existing ones were drawn with other settings."""
        if self.path.suffix != ".npz":
            raise InputError(f"{self.path}: pictures are saved as an .npz; name it {self.path.name}.npz")
        if self.path.exists():
            self._same(self._next_to(".json"), self.path)
            return self.shape[0]
        note = self._next_to(".part.json")
        if not note.is_file() or not self._next_to(".part.npy").is_file():
            return 0
        self._same(note, self._next_to(".part.npy"))
        return int(read_json(note)["drawn"])

    def _same(self, note: Path, pictures: Path) -> None:
        before = read_json(note).get("how") if note.is_file() else None
        wanted = json.loads(json.dumps(self.how))
        if before != wanted:
            names = [name for name in wanted if not isinstance(before, dict) or before.get(name) != wanted[name]]
            what = f"drawn with another {', '.join(names)}" if isinstance(before, dict) else "of unknown settings"
            raise InputError(f"{pictures} exists and is {what}: remove it, or give another --save")

    def batches(self, draw: Callable[[int], Iterator[np.ndarray]], rows: int) -> Iterator[np.ndarray]:
        """Yield all pictures, uint8 [up to rows, height, width, 3]: the saved ones, then `draw(first)`, which are saved
        as they come.
        """
        first = self.count()
        if self.path.exists():
            yield from read_images(self.path, rows)
            return
        try:
            array = self._open(first)
            for start in range(0, first, rows):
                yield np.array(array[start : min(start + rows, first)])
            for pictures in draw(first):
                array[first : first + len(pictures)] = pictures
                first += len(pictures)
                array.flush()
                self._note(first)
                yield pictures
            with staged(self.path) as file, file.open("wb") as opened:
                np.savez(opened, arr_0=array)
        except OSError as error:
            why = error.strerror or error
            raise InputError(
                f"{self.path}: could not be written ({why}); free some space or choose another place"
            ) from error
        write_json(self._next_to(".json"), {"how": self.how})
        for ending in (".part.npy", ".part.json"):
            remove(self._next_to(ending))

    def _open(self, first: int) -> np.memmap:
        file = self._next_to(".part.npy")
        if first:
            try:
                array = mapped(file, "r+")
            except ValueError as error:
                raise InputError(f"{file} is damaged ({error}): remove it") from error
            if array.shape != self.shape or array.dtype != np.uint8:
                raise InputError(
                    f"{file} holds {array.dtype} {list(array.shape)}, not uint8 {list(self.shape)}: remove it"
                )
            return array
        file.parent.mkdir(parents=True, exist_ok=True)
        array = np.lib.format.open_memmap(file, "w+", np.uint8, self.shape)
        if hasattr(os, "posix_fallocate"):  # so that a full disk is an error here, not a crash at a later write
            with file.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        self._note(0)
        return array

    def _note(self, drawn: int) -> None:
        with replacing(self._next_to(".part.json")) as part:
            write_json(part, {"drawn": drawn, "how": self.how})
