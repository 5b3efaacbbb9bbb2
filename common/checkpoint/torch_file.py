"""Reading and writing torch's own files, without ever running what is pickled in them."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from common.checkpoint.weights import Tensors
from common.errors import InputError

_WRAPPERS = ("ema", "state_dict", "model", "model_state_dict")  # the average before the raw weights where a file has both


def open_torch(path: Path) -> Tensors:
    """The tensors of a `.pt`, `.pth` or `.bin`, memory-mapped where the file allows; wrapping dicts are opened.

    Raises InputError without torch, for a pickle that holds anything but data, and for a damaged file.
    """
    torch = _torch(path)
    kwargs: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        import zipfile

        with torch.serialization.safe_globals([Namespace]):  # the arguments many training scripts save along
            state = torch.load(path, mmap=zipfile.is_zipfile(path), **kwargs)
    except Exception as error:  # torch raises nearly every type here, all of them about this file
        why = str(error) or type(error).__name__
        if "TorchScript" in why:
            raise InputError(f"{path}: a TorchScript archive; save its state_dict() with torch.save and convert that") from error
        no_pickle = "Unsupported operand" in why  # random bytes: torch's words would advise to trust them
        if "weights_only" in why and not no_pickle:
            raise InputError(f"{path}: holds pickled code, not only tensors, and was not opened; save its state_dict() alone") from error
        why = "neither an archive nor a pickle of tensors" if no_pickle else why.splitlines()[0]
        raise InputError(f"{path}: not a readable torch file ({why}); fetch it again") from error
    while isinstance(state, dict) and (inner := next((k for k in _WRAPPERS if isinstance(state.get(k), dict)), None)):
        state = state[inner]
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds a {type(state).__name__}, not a dictionary of tensors")
    return {key: _numpy(value, torch) for key, value in state.items() if isinstance(value, torch.Tensor)}


def write_torch(path: Path, tensors: Tensors, wrapper: str = "state_dict") -> None:
    """Write `{wrapper: tensors}` as torch.save would. Raises InputError without torch."""
    torch = _torch(path)
    torch.save({wrapper: {key: _tensor(value, torch) for key, value in tensors.items()}}, path)


def _numpy(tensor: Any, torch: Any) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _tensor(array: np.ndarray, torch: Any) -> Any:
    array = np.require(array, requirements=["C", "W"])  # torch shares it where it may write
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise InputError(f"{path}: reading or writing torch files needs torch; pip install 'heirloom-jax[torch]'") from error
    return torch
