"""Folders of .npy arrays."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from heirloom.common.checkpoint.weights import native
from heirloom.common.data.sources.record import Record, SourceConfig, captions, require_columns
from heirloom.common.errors import InputError
from heirloom.common.paths import Address, AnyPath
from heirloom.common.reading import Stamp, mapped, parsing, retried


class ArraySource:
    """A folder of .npy arrays of equal length, one per column, memory-mapped. Rows keep their shape and dtype.

    A labels.json next to them has the class names of the numbers in `label`.

    In a bucket, the bytes of a row are read when it is used.
    """

    def __init__(self, folder: AnyPath, cfg: SourceConfig):
        if cfg.split:
            raise InputError(f"{folder} has arrays, which have no splits; leave split empty")
        names = [name for name in (cfg.image, cfg.text, *cfg.columns) if name]
        stored = sorted(file.stem for file in folder.glob("*.npy"))
        if len(stored) > 1 and all(map(str.isdigit, stored)) and not set(names) <= set(stored):
            layout = f"has {len(stored):,} numbered arrays, one for each picture, as fast-DiT stores latents"
            raise InputError(f"{folder} {layout}, and not one for each column: encode the pictures with heirloom cache")
        require_columns(cfg, stored, folder)
        self._folder, self._cfg = folder, cfg
        self._remote: dict[str, RemoteArray] = {}
        self._known: dict[str, dict[str, Any]] = {}
        self._stamps = {name: Stamp.of(folder / f"{name}.npy") for name in names}
        arrays = {name: self._array(name) for name in names}
        if not arrays:
            raise InputError(f"{folder}: no array is selected; set image, text or columns")
        if scalar := [name for name, array in arrays.items() if not array.ndim]:
            raise InputError(f"{folder / scalar[0]}.npy has one number, not a row for each example")
        for name, array in arrays.items():
            if array.dtype.kind not in "biufcUS" and array.dtype != "V2":  # V2: how numpy stores bfloat16
                raise InputError(f"{folder / name}.npy has {array.dtype}, not numbers or text: write it as float32")
        if len({len(array) for array in arrays.values()}) > 1:
            lengths = ", ".join(f"{n} {len(a):,}" for n, a in arrays.items())
            raise InputError(f"{folder}: its arrays have different lengths ({lengths})")
        if cfg.text and (arrays[cfg.text].dtype.kind != "U" or arrays[cfg.text].ndim != 1):
            shape = f"{arrays[cfg.text].dtype} {list(arrays[cfg.text].shape)}"
            raise InputError(f"{folder / cfg.text}.npy is {shape}; captions must be strings, one for each example")
        self._length = len(next(iter(arrays.values())))

    @property
    def class_names(self) -> dict[str, tuple[str, ...]]:
        """Class names by column."""
        from heirloom.common.data.labelled import read_labels  # which imports this package

        names = read_labels(self._folder)
        return {"label": names} if names else {}

    def _array(self, name: str) -> "np.ndarray | RemoteArray":
        file = self._folder / f"{name}.npy"

        def opened() -> np.ndarray | RemoteArray:
            self._stamps[name].check(file)
            if isinstance(file, Address):
                if name not in self._remote:
                    self._remote[name] = RemoteArray.open(file)
                return self._remote[name]
            if name not in self._known:
                array = mapped(file)
                order = "C" if array.flags.c_contiguous else "F"
                self._known[name] = dict(dtype=array.dtype, offset=array.offset, shape=array.shape, order=order)
                return array
            return np.memmap(file, mode="r", **self._known[name])

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
            record["image"] = self._row(cfg.image, index)
        if cfg.text:
            record["text"] = captions(str(self._row(cfg.text, index)), record["key"])
        return record | {name: self._row(name, index) for name in cfg.columns}

    def _row(self, name: str, index: int) -> np.ndarray:
        array = self._array(name)
        return native(retried(lambda: np.array(array[index]), self._folder / f"{name}.npy"))


HEADER = 2**16  # bytes read of a .npy for its header; numpy refuses headers above 10,000 bytes


@dataclass(frozen=True)
class RemoteArray:
    """A .npy in a bucket, in C order, read row by row. start: byte of the first row."""

    file: Address
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int

    @classmethod
    def open(cls, file: Address) -> "RemoteArray":
        """Reads the header. Raises OSError, and ValueError when it is no array, or its size is wrong."""
        size, _ = file.version()
        data = io.BytesIO(file.read_range(0, min(HEADER, size)))
        major, _ = np.lib.format.read_magic(data)
        header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        with parsing():
            shape, fortran, dtype = header(data)
        if dtype.hasobject or (fortran and len(shape) > 1):
            raise ValueError("it has Python objects, or is stored by column; write np.ascontiguousarray(array) again")
        if size != (needed := data.tell() + dtype.itemsize * int(np.prod(shape, dtype=np.int64))):
            raise ValueError(f"it has {size} bytes, and its header says {needed}")
        return cls(file, shape, dtype, data.tell())

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> np.ndarray:
        """Reads one row. Raises OSError."""
        number = range(len(self))[index]
        size = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        data = self.file.read_range(self.start + number * size, size)
        return np.frombuffer(data, self.dtype).reshape(self.shape[1:])
