"""Keeps the features of prompts in a folder, so that a prompt goes through the encoder once."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from heirloom.common.checkpoint.unwrap import weights_files
from heirloom.common.checkpoint.weights import create_safetensors, open_safetensors
from heirloom.common.errors import InputError, remark
from heirloom.common.files import read_json, replacing
from heirloom.common.surgery.layout import Tensor

VERSION = 1  # of what is computed: another number forgets all features
PAGES, PAGE = 64, 4096  # of a weights file that are hashed, and bytes of each


class FeatureCache:
    """One file for each encoder and row of ids, with the features of the row, [len(ids), width] f32.

    The encoder is recognised by its config and, of each weights file, name, size, time of change, and 64 pages spread
    over it: the hash of a whole T5-XXL takes as long as an encoding. A copy of the folder is another encoder, unless it
    keeps the times.
    """

    def __init__(self, folder: Path, encoder: Path):
        self.folder, self._encoder = folder, encoder

    def get(self, ids: Sequence[int]) -> np.ndarray | None:
        """Returns the features of these ids; None where there are none. A damaged file is remarked and counts as
        none.
        """
        file = self._file(ids)
        if not file.is_file():
            return None
        try:
            features = open_safetensors(file).get("features")
        except InputError:
            features = None
        if features is None or features.ndim != 2 or len(features) != len(ids) or features.dtype != np.float32:
            remark(f"{file}: damaged, so the prompt is encoded again and the file replaced")
            return None
        return features

    def put(self, ids: Sequence[int], features: np.ndarray) -> None:
        """Writes features; a reader sees the whole file or none. Raises InputError where the folder cannot be
        written.
        """
        file = self._file(ids)
        tensors = {"features": Tensor(features.shape, np.dtype(np.float32))}
        try:
            with replacing(file) as part, create_safetensors(part, tensors) as out:
                out["features"][...] = features
        except OSError as error:
            raise InputError(f"{self.folder}: features cannot be kept here ({error.strerror})") from error

    def _file(self, ids: Sequence[int]) -> Path:
        key = hashlib.sha256(self._model + np.asarray(ids, np.int32).tobytes()).hexdigest()
        return self.folder / f"{key[:32]}.safetensors"

    @cached_property
    def _model(self) -> bytes:
        digest = hashlib.sha256(f"{VERSION}".encode())
        for file in _files(self._encoder):
            state = file.stat()
            digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns} ".encode())
            with file.open("rb") as opened:
                for i in range(PAGES):
                    opened.seek(state.st_size * i // PAGES)
                    digest.update(opened.read(PAGE))
        return digest.digest()


def _files(encoder: Path) -> Iterator[Path]:
    """Yields the files of an encoder: its config, its weights, and the shards of an index."""
    for file in weights_files(encoder):
        if (config := file.with_name("config.json")).is_file():
            yield config
        yield file
        if file.suffix == ".json":
            shards = read_json(file).get("weight_map")
            names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
            yield from (shard for name in names if (shard := file.with_name(Path(name).name)).is_file())
