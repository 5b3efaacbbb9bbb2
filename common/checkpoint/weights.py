"""Weights on disk: memory-mapped safetensors, and weights folders of ours.

A weights folder is `model.safetensors` (keys are our paths) with `config.json`; any safetensors reader can open it.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from heirloom.common.errors import InputError
from heirloom.common.files import read_json, write_json
from heirloom.common.nn.quantized import INT8, QArray
from heirloom.common.paths import METRICS, stages_of
from heirloom.common.surgery.axes import Spec
from heirloom.common.surgery.layout import Tensor
from heirloom.common.typed import Config

Tensors = dict[str, np.ndarray]
FILE = "model.safetensors"
STATE = "state"  # the folder of parameters in orbax's format, instead of FILE
ORBAX = ("nnx", "orbax")  # the two trees it may have: NNX's variables, or plain dictionaries
SCALE = ".scale"  # after the path of a quantised kernel: its scales
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(d): name for name, d in _DTYPES.items()}


def open_safetensors(path: Path) -> Tensors:
    """Opens the tensors of one file as read-only memory maps: a page is read when it is used.

    The safetensors library checks the header, but its slices take no index arrays, which picking rows needs. Raises
    InputError for a file that does not exist, is cut short or is not safetensors.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cut short, or not a safetensors file ({error}); fetch it again") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    buffer = np.memmap(path, np.uint8, "r")
    tensors = {}
    for key, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise InputError(
                f"{path}: tensor {key!r} has dtype {entry['dtype']}, which is not one of {', '.join(_DTYPES)}"
            )
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        tensors[key] = np.asarray(buffer[start:stop]).view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def open_npz(path: Path) -> Tensors:
    """Reads the arrays of a numpy archive into memory. Raises InputError when it is damaged or has Python objects."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: native(archive[key]) for key in archive.files}
    except Exception as error:  # zipfile, zlib and numpy raise nearly every type for a damaged file
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not a readable numpy archive ({why}); fetch it again") from error


def native(array: np.ndarray) -> np.ndarray:
    """Returns an array in C order and this machine's byte order. numpy stores bfloat16 as two bytes without a type."""
    if array.dtype == np.dtype("V2"):
        array = array.view(ml_dtypes.bfloat16)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return np.ascontiguousarray(array).reshape(array.shape)


def open_sharded(index: Path, open_shard: Callable[[Path], Tensors] = open_safetensors) -> Tensors:
    """Opens the tensors of a sharded checkpoint from its `*.index.json`. Raises InputError for a missing shard or
    tensor.
    """
    file_of = read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(name, str) for name in file_of.values()):
        raise InputError(f"{index}: holds no weight_map from tensors to files; fetch it again")
    shards: dict[str, Tensors] = {}
    for name in sorted(set(file_of.values())):
        if Path(name).name != name or name.endswith(".json"):  # a path outside the folder, or another index
            raise InputError(f"{index}: names {name!r}, which cannot be a file of weights; fetch it again")
        shard = index.parent / name
        if not shard.is_file():
            raise InputError(f"{index}: the shard {name} is missing; fetch it and try again")
        shards[name] = open_shard(shard)
    for key, name in file_of.items():
        if key not in shards[name]:
            raise InputError(f"{index}: tensor {key!r} is not in {name}")
    return {key: shards[name][key] for key, name in file_of.items()}


@contextmanager
def create_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> Iterator[Tensors]:
    """Creates a file with tensors of these shapes as writable memory maps; it is complete when the block ends.

    The space is reserved first: a full disk is an OSError here, not a crash at the first write.
    """
    # transformers reads no file without a format.
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "made_by": f"heirloom {version('heirloom-jax')}"}}
    offset = 0
    for key, tensor in tensors.items():
        stop = offset + prod(tensor.shape) * tensor.dtype.itemsize
        header[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)  # aligns the data
    base = 8 + len(text)
    with path.open("w+b") as file:
        if hasattr(os, "posix_fallocate"):  # missing on macOS, where nothing is reserved
            os.posix_fallocate(file.fileno(), 0, base + offset)
        else:
            file.truncate(base + offset)
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        buffer = np.memmap(file, np.uint8, "r+")
        views = {}
        for key, tensor in tensors.items():
            start, stop = (base + o for o in header[key]["data_offsets"])
            views[key] = np.asarray(buffer[start:stop]).view(tensor.dtype).reshape(tensor.shape)
        yield views
        buffer.flush()


@dataclass(frozen=True)
class Folder:
    """An open weights folder of ours. model: config of the model. tensors: memory-mapped, or read of `stored`.

    quantized: "int8", or empty. stored: "nnx" or "orbax" of a folder with `state/`, else empty.
    """

    path: Path
    method: str
    model: dict[str, Any]
    tensors: Tensors
    quantized: str = ""
    stored: str = ""


def is_folder(path: Path) -> bool:
    """Returns whether `path` is a weights folder of ours."""
    config = path / "config.json"
    return config.is_file() and read_json(config).get("format") == "heirloom"


def of_run(path: Path) -> Path:
    """Returns the weights folder of a run; another path as it is.

    Raises InputError for a run that has no weights (yet), and for one in stages, which are runs of their own.
    """
    if (path / METRICS).is_file():
        if (path / "model").is_dir():
            return path / "model"
        if (path / "zoo").is_dir():
            raise InputError(f"{path} is a run that made a zoo, not a model: give it where a zoo is needed")
        raise InputError(f"{path} has no model yet: it is written at the end; the same heirloom train command goes on")
    if stages := stages_of(path):
        done = [stage for stage in stages if (stage / "model").is_dir()]
        named = f"give its last one, {done[-1]}" if done else "none has a model yet; its heirloom train command goes on"
        raise InputError(f"{path} is a run in stages: {named}")
    return path


def open_folder(path: Path) -> Folder:
    """Opens a weights folder of ours. Raises InputError when it is another folder, or damaged."""
    if not is_folder(path):
        raise InputError(
            f"{path} is not a weights folder of heirloom; `heirloom convert {path} DEST` makes one of a foreign"
            " checkpoint"
        )
    config = read_json(path / "config.json")
    if missing := {"method", "model"} - config.keys():
        raise InputError(f"{path / 'config.json'}: {min(missing)!r} is missing; convert the checkpoint again")
    if (quantized := config.get("quantized", "")) not in ("", INT8):
        raise InputError(
            f"{path / 'config.json'}: quantized is {quantized!r}, known is {INT8!r}; convert the checkpoint again"
        )
    if (stored := config.get("stored", "")) not in ("", *ORBAX):
        raise InputError(
            f"{path / 'config.json'}: stored is {stored!r}, known are {', '.join(ORBAX)}; convert the checkpoint again"
        )
    if stored:
        from heirloom.common.checkpoint.state import load_tree  # orbax takes seconds to import

        tensors = load_tree(path / STATE)
    else:
        tensors = open_safetensors(path / FILE)
    about: dict[str, Any] = {"method": config["method"], "model": config["model"]}
    return Folder(path, **about, tensors=tensors, quantized=quantized, stored=stored)


def write_config(folder: Path, method: str, model: Config, quantized: str = "", stored: str = "") -> None:
    """Writes the `config.json` of a weights folder. model: the method's config of the model. quantized: "int8" where
    kernels are. stored: "nnx" or "orbax" where the parameters are in `state/`.
    """
    how = {name: value for name, value in (("quantized", quantized), ("stored", stored)) if value}
    about = {"format": "heirloom", "version": 1, "method": method, "model": asdict(model)}
    write_json(folder / "config.json", about | how)


def write_params(
    folder: Path, params: Mapping[str, Any], dtype: DTypeLike | None = None, spec: Spec | None = None
) -> None:
    """Writes parameters (jax or numpy) as `model.safetensors`, one leaf at a time. dtype: None keeps the dtype of each
    leaf. A quantised kernel is two tensors, `path` and `path.scale`.

    spec: needed for leaves that are zero-padded; they are written layer by layer, without the padding.
    """
    params = dict(unpadded(params, spec or {}))
    tensors = {path: Tensor(tuple(value.shape), np.dtype(dtype or value.dtype)) for path, value in params.items()}
    with create_safetensors(folder / FILE, tensors) as out:
        for path, value in params.items():
            out[path][...] = np.asarray(jax.device_get(value))


def unpadded(params: Mapping[str, Any], spec: Spec) -> Iterator[tuple[str, Any]]:
    """Yields the tensors of a file of ours: layers of different sizes one by one, and scales of quantised kernels."""
    for path, value in params.items():
        if isinstance(value, QArray):
            yield path, value.qvalue
            yield path + SCALE, value.scale
        elif path in spec and (leaf := spec[path]).ragged:
            for i in range(leaf.shape[0]):
                yield f"{path}/{i}", value[(i, *(slice(n) for n in leaf.in_layer(i)))]
        else:
            yield path, value
