"""Opens weights files by content, whatever their ending, inside the dictionaries of training scripts.

Pickled code in a torch file never runs. Of raw weights and their average, the average is taken, and `Weights.notes`
says so.
"""

import re
import zipfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.flax_files import SUFFIX, is_flax, open_flax
from heirloom.common.checkpoint.pickled import Opaque, plain
from heirloom.common.checkpoint.weights import Tensors
from heirloom.common.errors import InputError, remark
from heirloom.common.files import read_json

AVERAGE = re.compile(r"(^|(?<!\bnon)(?<!_non)[_.-])(emas?\d*|averaged?|avg|swa|shadow|polyak)([_.-]|$)", re.IGNORECASE)
_WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "params", "net", "network", "weights")
TRAINING = re.compile(
    r"optim|sched|scaler|^opt$|^opt_|loss|criterion|rng|random"
)  # of a training state, not the model
VARIANT = re.compile(r"\.(?:b?fp?(?:8|16|32)\w*|half|non_ema)(?=[.-])")  # of diffusers' and transformers' files
# Classes of configs that trainers save with the weights. They are opened as dictionaries; their code is never imported.
_CONFIGS = (
    "omegaconf.",
    "lightning",
    "pytorch_lightning.",
    "ml_collections.",
    "easydict.",
    "yacs.",
    "addict.",
    "pathlib.",
    "datetime.",
    "typing.",  # of omegaconf, as the two below
    "collections.defaultdict",
)
_TYPES = (dict, list, tuple, set, int, float, bool, str)
# Kinds of weights files, the first before the others; of each kind an index of shards first.
KINDS = (
    ("*.safetensors.index*.json", "*.safetensors"),
    ("*.bin.index*.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pth.tar", "*.th"),
    ("*.msgpack.index.json", "*.msgpack"),
    ("*.npz",),
)
_PATTERNS = tuple(pattern for kind in KINDS for pattern in kind)
NOTHING = f"no weights (no {', '.join(p[1:] for p in _PATTERNS if 'index' not in p)})"
NO_WEIGHTS = re.compile(
    r"^(training_args|optimizer|scheduler|scaler|rng_state|random_states|optim|adapter_model|sampler|dl_state_dict"
    r"|custom_checkpoint)"
)
_OTHERS = {
    b"\x89HDF": "an HDF5 file of TensorFlow or Keras; convert the PyTorch or safetensors file of the same model",
    b"GGUF": "a quantised GGUF file; convert the safetensors file it was made from",
    b"vers": "a Git LFS pointer instead of the weights; fetch them with `git lfs pull`",
    b"<!DO": "a web page instead of the weights; download the file itself",
    b"<htm": "a web page instead of the weights; download the file itself",
    b"\x1f\x8b": "a gzip archive; unpack it first",
}


@dataclass(frozen=True)
class Weights:
    """The tensors of a file, memory-mapped where possible.

    about: what a training script saved next to them, such as its arguments. notes: which of several sets of tensors was
    taken, and which parts of their names were removed.
    """

    tensors: Tensors
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def weights_files(path: Path) -> list[Path]:
    """Finds the weights files of a checkpoint: the file itself, or those of a folder (index of shards first,
    safetensors before pickles; a pickle before safetensors of a variant of it, such as `fp16`, with a remark).

    States of optimizers and the like do not count. Raises InputError when there are none.
    """
    if path.is_file():
        return [path]
    if (path / "model_index.json").is_file():
        parts = sorted(p.parent.name for p in path.glob("*/config.json"))
        raise InputError(
            f"{path} is a pipeline of several models; name one of them: {', '.join(f'{path}/{part}' for part in parts)}"
        )
    if (path / "adapter_config.json").is_file():
        raise InputError(
            f"{path} holds an adapter, not a model: merge it into its base (peft's merge_and_unload), save and convert"
            " that"
        )
    if not (kinds := list(filter(None, (_matches(path, pattern) for pattern in _PATTERNS)))):
        if (path / "modules.json").is_file() and (configs := sorted(path.glob("*/config.json"))):
            named = " or ".join(str(file.parent) for file in configs)
            what = f"{path} is a model of sentence-transformers in parts"
            raise InputError(f"{what}: name the one with the weights, {named}")
        raise InputError(f"{path} holds {NOTHING}")
    found = _without_variant(kinds)
    for index in found:
        _check_index(index)
    _check_average(path, found)
    return found


def _matches(folder: Path, pattern: str) -> list[Path]:
    files = (p for p in folder.glob(pattern) if not p.name.startswith(".") and not NO_WEIGHTS.match(p.name))
    return sorted(p for p in files if p.is_file())


def _without_variant(kinds: Sequence[list[Path]]) -> list[Path]:
    """Returns the first kind of files; where these are all of a variant, the first files of the same model without."""

    def model(file: Path) -> str:
        return file.name.split(".")[0].removeprefix("pytorch_")

    first, *others = kinds
    if all(VARIANT.search(file.name) for file in first):
        for kind in others:
            if plain := [f for f in kind if not VARIANT.search(f.name) and model(f) == model(first[0])]:
                used = f"using {plain[0].name}, not its variant {first[0].name}"
                remark(f"{first[0].parent}: {used}; to use another file, give its path")
                return plain
    return first


def _check_average(folder: Path, found: list[Path]) -> None:
    """Raises InputError for raw weights next to a file or a folder of their average, which would be passed over."""
    if len(found) > 1 or AVERAGE.search(found[0].stem):
        return
    others = [p for p in folder.iterdir() if p not in found and AVERAGE.search(p.stem) and not p.name.startswith(".")]
    for other in sorted(others):
        if any(other.match(pattern) or any(other.glob(pattern)) for pattern in _PATTERNS):
            raise InputError(f"{folder} holds {found[0].name} and its average {other.name}: name the one you mean")


def _check_index(index: Path) -> None:
    """Raises InputError for an index of shards next to the same weights in one file: one of them may be out of date.

    transformers takes the file, diffusers the index.
    """
    whole = index.with_name(re.sub(r"\.index.*\.json$", "", index.name))
    if whole != index and whole.is_file() and whole.name not in (read_json(index).get("weight_map") or {}).values():
        both = f"{index.parent} holds {whole.name}, and {index.name} of the same weights in shards"
        raise InputError(f"{both}: name the file you mean, or remove the one that is out of date")


def open_weights(file: Path) -> Weights:
    """Opens a weights file or an index of shards. Raises InputError for another or a damaged file."""
    if file.suffix == ".json":
        return Weights(weights.open_sharded(file, lambda shard: open_weights(shard).tensors))
    kind = _kind(file)
    if kind == "npz":
        return Weights(weights.open_npz(file))
    if kind == "flax":
        return Weights(open_flax(file))
    return open_torch(file) if kind == "torch" else Weights(weights.open_safetensors(file))


def open_tensors(file: Path) -> Tensors:
    """Opens the tensors of a weights file under the names in the file."""
    return open_weights(file).tensors


def _kind(file: Path) -> str:
    """Returns `safetensors`, `torch`, `npz` or `flax` by the first bytes of a file."""
    try:
        with file.open("rb") as opened:
            start = opened.read(10)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error
    for magic, what in _OTHERS.items():
        if start.startswith(magic):
            raise InputError(f"{file} is {what}")
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(file) as archive:
                return "npz" if any(name.endswith(".npy") for name in archive.namelist()) else "torch"
        except Exception:  # a damaged archive; its reader will report it
            return "npz" if file.suffix == ".npz" else "torch"
    if start.startswith(b"\x80") and start[1:2] in b"\x02\x03\x04\x05":  # a pickle, as torch wrote before 1.6
        return "torch"
    if start[8:9] == b"{":
        return "safetensors"
    if is_flax(start):
        return "flax"
    return {".npz": "npz", ".safetensors": "safetensors", SUFFIX: "flax"}.get(
        file.suffix, "torch" if file.suffix in _TORCH else "safetensors"
    )


_TORCH = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".th")


def open_torch(path: Path) -> Weights:
    """Opens the tensors of a file that torch saved, memory-mapped where possible, inside any dictionaries around them.

    Raises InputError without torch, for a pickle with anything but data, and for a damaged file.
    """
    torch = _torch(path)
    try:
        with torch.serialization.safe_globals(_harmless(path, torch)):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises nearly every type for a bad file
        raise InputError(_complaint(path, str(error) or type(error).__name__)) from error
    if not isinstance(state, dict):
        what = f"holds a {type(state).__name__}, not a dictionary of tensors"
        raise InputError(f"{path}: {what}: name the file of the model, or save its state_dict()")
    about: dict[str, Any] = {}
    notes: list[str] = []
    while wrapped := _wrapped(state, path, torch):
        inner, *others = wrapped
        about |= {str(key): plain(value) for key, value in state.items() if key != inner}
        if others:
            notes.append(f"the tensors under {inner!r} taken, and not those under {', '.join(map(repr, others))}")
        elif AVERAGE.search(inner) or any(AVERAGE.search(str(key)) for key in state):
            notes.append(f"the tensors under {inner!r} taken")
        state = state[inner]
    about |= {str(key): plain(value) for key, value in state.items() if not isinstance(value, torch.Tensor)}
    tensors = {str(key): _numpy(value, torch, path) for key, value in state.items() if isinstance(value, torch.Tensor)}
    return Weights(tensors, about, tuple(notes))


def _complaint(path: Path, why: str) -> str:
    if "TorchScript" in why:
        return f"{path}: a TorchScript archive; save its state_dict() with torch.save and convert that"
    no_pickle = "Unsupported operand" in why  # random bytes: torch's message would advise to trust them
    if "weights_only" in why and not no_pickle:
        what = next(iter(re.findall(r"GLOBAL ([\w.]+) was not an allowed global", why)), "code")
        return f"{path}: holds pickled code, not only tensors ({what}), and was not opened; save its state_dict() alone"
    why = "neither an archive nor a pickle of tensors" if no_pickle else why.splitlines()[0]
    return f"{path}: not a readable torch file ({why}); fetch it again"


def _harmless(path: Path, torch: Any) -> Sequence[Any]:
    """Lists what a file may have next to tensors: arguments, numpy's numbers and arrays, and configs of trainers as
    dictionaries.
    """
    scalar, reconstruct = np._core.multiarray.scalar, np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    kinds = sorted({type(np.dtype(code)) for code in "?bhilqBHILQefdSU"}, key=str)
    numpy_ones = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    numpy_ones += [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    allowed = [Namespace, np.dtype, np.ndarray, *_TYPES, *kinds, *numpy_ones]
    try:
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torch raises many types for a damaged file; loading it next reports the damage
        return allowed
    return [*allowed, *((Opaque, name) for name in others if name.startswith(_CONFIGS))]


def _wrapped(state: Mapping[Any, Any], path: Path, torch: Any) -> list[str]:
    """Returns the keys of dictionaries with tensors of models, first the one to take: an average or what an average is
    somewhere inside, a usual name, or the only one. Empty when the tensors are in `state` itself.
    """

    def holds_tensors(value: Any, least: int = 0) -> bool:
        if isinstance(value, dict):
            return any(holds_tensors(v, least) for v in value.values())
        return isinstance(value, torch.Tensor) and value.ndim >= least

    def is_list_of_tensors(value: Any) -> bool:
        return isinstance(value, list | tuple) and any(holds_tensors(v, 0 if isinstance(v, dict) else 1) for v in value)

    def of_models(state: Mapping[Any, Any]) -> dict[str, Any]:
        return {key: value for key, value in state.items() if isinstance(key, str) and not TRAINING.search(key)}

    def averages(key: str, value: Any, outside: str = "") -> list[str]:
        """The names, from here, of averages in a value; one without a matrix is of something else, such as losses."""
        name = f"{outside}{key}"
        if AVERAGE.search(key):
            inside = value.values() if isinstance(value, dict) and not holds_tensors(value) else [value]
            if any(map(is_list_of_tensors, inside)):
                instead = "save the state_dict() of the model with the average that you mean (copy_to), or without it"
                raise InputError(f"{path}: {name!r} is a list of averages or of tensors without names: {instead}")
            if isinstance(value, dict) and holds_tensors(value, 2):
                return [name]
        below = of_models(value) if isinstance(value, dict) else {}
        return [one for key, inner in below.items() for one in averages(key, inner, f"{name}.")]

    inner = [key for key, value in of_models(state).items() if isinstance(value, dict) and holds_tensors(value)]
    means = {key: found for key, value in of_models(state).items() if (found := averages(key, value))}
    if len(means) > 1:
        names = ", ".join(name for found in means.values() for name in found)
        raise InputError(f"{path}: holds several averages ({names}); save the one you mean with torch.save")
    usual = [key for key in _WRAPPERS if key in inner]
    if means or usual:
        return list(dict.fromkeys((*means, *usual, *inner)))
    if any(isinstance(value, torch.Tensor) for value in state.values()):
        return []
    if len(inner) > 1:
        raise InputError(
            f"{path}: holds several sets of tensors ({', '.join(inner)}); save the one you mean with torch.save"
        )
    return inner


def write_torch(path: Path, tensors: Tensors, wrapper: str | None = "state_dict") -> None:
    """Writes `{wrapper: tensors}`, or the tensors alone, with torch.save. Raises InputError without torch."""
    torch = _torch(path)
    state = {key: _tensor(value, torch) for key, value in tensors.items()}
    torch.save({wrapper: state} if wrapper else state, path)


def _numpy(tensor: Any, torch: Any, path: Path) -> np.ndarray:
    try:
        tensor = tensor.detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
    except (TypeError, RuntimeError) as error:  # quantised, sparse, without data, 8-bit floats
        kind = f"{tensor.dtype}, {str(tensor.layout).removeprefix('torch.')}, on the device {tensor.device.type}"
        raise InputError(
            f"{path}: holds a tensor ({kind}) that cannot be read; save dense ones of float32 or bfloat16"
        ) from error


def _tensor(array: np.ndarray, torch: Any) -> Any:
    array = np.require(array, requirements=["C", "W"])  # torch shares it where it may write
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path}: reading or writing torch files needs torch; pip install 'heirloom-jax[torch]'"
        ) from error
    return torch
