"""The arguments that trainers save next to the tensors of a ViT, as those of DeiT, MAE and timm do."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from heirloom.common.errors import InputError

_SIZES = ("num_heads", "patch_size", "embed_dim", "depth", "mlp_ratio")
_PLAIN = (bool, int, float, str, list, tuple)


@dataclass(frozen=True)
class Trained:
    """name: of the model, empty where there is none. passed: arguments of timm's create_model. sizes: others that tell about the model."""

    name: str
    passed: Mapping[str, Any]
    sizes: Mapping[str, Any]

    @property
    def where(self) -> str:
        return "the trainer's arguments next to the tensors" + (f" ({self.name})" if self.name else "")


def trained_as(about: Mapping[str, Any]) -> Trained:
    """What a trainer's file says of its model. Raises InputError for arguments that contradict each other or are no plain values."""
    args = about.get("args")
    args = args if isinstance(args, Mapping) else {}
    name = next((name for name in (args.get("model"), about.get("arch")) if isinstance(name, str)), "")
    own = args.get("model_kwargs") or {}
    if not isinstance(own, Mapping):
        raise InputError(f"the trainer's arguments: model_kwargs is of type {type(own).__name__}, not a dictionary")
    size = _one(args, "img_size", "input_size")
    channels = _one(args, "in_chans")
    if isinstance(size, list | tuple) and len(size) == 3:  # [channels, height, width]
        channels, size = channels or size[0], list(size[1:])
    pool = _one(args, "gp", "global_pool")
    if isinstance(pool, bool):  # as MAE's trainer has it
        pool = "avg" if pool else "token"
    passed = dict(img_size=size, in_chans=channels, num_classes=_one(args, "nb_classes", "num_classes"), global_pool=pool)
    sizes = {name: _one(args, name) for name in _SIZES}
    return Trained(name.partition(".")[0], _said(passed) | _said(own), _said(sizes))


def _said(args: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in args.items() if value is not None}


def _one(args: Mapping[str, Any], *names: str) -> Any:
    """The value that goes by one of these names; None where none is set, which some trainers write as 0 or an empty text."""
    args = _said({name: args.get(name) for name in names})
    for name, value in args.items():
        if not isinstance(value, _PLAIN):
            raise InputError(f"the trainer's arguments: {name} is of type {type(value).__name__}, not a number, text or list")
    found = {name: args[name] for name in names if args.get(name) or args.get(name) is False}
    first = next(iter(found.values()), None)
    for name, value in found.items():
        if _side(value) != _side(first):
            told = " and ".join(f"{name} is {value}" for name, value in found.items())
            raise InputError(f"the trainer's arguments next to the tensors: {told}, which contradict each other")
    return first


def _side(value: Any) -> Any:
    """A size of pictures, which may be one side, two, or the channels and two."""
    if isinstance(value, list | tuple) and len(value) in (2, 3):
        return value[-1] if value[-1] == value[-2] else tuple(value[-2:])
    return value
