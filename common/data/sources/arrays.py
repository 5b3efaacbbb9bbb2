"""Folders of .npy arrays."""

from pathlib import Path

import numpy as np

from heirloom.common.data.reading import Stamp, retried
from heirloom.common.data.sources.record import Record, SourceConfig, require
from heirloom.common.errors import InputError


class ArraySource:
    """A folder of .npy arrays of equal length, one per column, memory-mapped. Rows keep their shape and dtype."""

    def __init__(self, folder: Path, cfg: SourceConfig):
        if cfg.split:
            raise InputError(f"{folder} has arrays, which have no splits; leave split empty")
        require([cfg.image, cfg.text, *cfg.columns], sorted(file.stem for file in folder.glob("*.npy")), folder)
        self._folder, self._cfg = folder, cfg
        names = [name for name in (cfg.image, cfg.text, *cfg.columns) if name]
        self._stamps = {name: Stamp.of(folder / f"{name}.npy") for name in names}
        arrays = {name: self._array(name) for name in names}
        if not arrays:
            raise InputError(f"{folder}: no array is selected; set image, text or columns")
        if scalar := [name for name, array in arrays.items() if not array.ndim]:
            raise InputError(f"{folder / scalar[0]}.npy has one number, not a row for each example")
        if len({len(array) for array in arrays.values()}) > 1:
            lengths = ", ".join(f"{n} {len(a):,}" for n, a in arrays.items())
            raise InputError(f"{folder}: its arrays have different lengths ({lengths})")
        if cfg.text and (arrays[cfg.text].dtype.kind != "U" or arrays[cfg.text].ndim != 1):
            shape = f"{arrays[cfg.text].dtype} {list(arrays[cfg.text].shape)}"
            raise InputError(f"{folder / cfg.text}.npy is {shape}; captions must be strings, one for each example")
        self._length = len(next(iter(arrays.values())))

    def _array(self, name: str) -> np.ndarray:
        file = self._folder / f"{name}.npy"

        def opened() -> np.ndarray:
            self._stamps[name].check(file)
            return np.lib.format.open_memmap(file, mode="r")

        try:
            return retried(opened, file)
        except ValueError as error:
            raise InputError(f"{file} is not readable as an array: {error}") from error

    def __len__(self) -> int:
        return self._length

    def key(self, index: int) -> str:
        """Returns the folder and the row."""
        return f"{self._folder} row {index}"

    def __getitem__(self, index: int) -> Record:
        cfg, record = self._cfg, Record(key=self.key(index))
        if cfg.image:
            record["image"] = np.array(self._array(cfg.image)[index])
        if cfg.text:
            record["text"] = str(self._array(cfg.text)[index])
        return record | {name: np.array(self._array(name)[index]) for name in cfg.columns}
