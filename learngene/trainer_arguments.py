"""Read the arguments that the trainers of DeiT, MAE, timm and Lightning save next to the tensors of a ViT."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from heirloom.common.checkpoint.fields import Fields
from heirloom.common.data.preprocess import FILTERS, Mode, Preprocess
from heirloom.common.errors import InputError
from heirloom.common.vit import timm_architectures

_SIZES = ("num_heads", "patch_size", "embed_dim", "depth", "mlp_ratio")
_PLAIN = (bool, int, float, str, list, tuple)


@dataclass(frozen=True)
class Trained:
    """Saved arguments. name: of the model, or empty. passed: to timm's create_model. sizes: further sizes."""

    name: str
    passed: Mapping[str, Any]
    sizes: Mapping[str, Any]

    @property
    def where(self) -> str:
        return "the trainer's arguments next to the tensors" + (f" ({self.name})" if self.name else "")


def trained_as(about: Mapping[str, Any]) -> Trained:
    """Read a trainer's arguments. Raises InputError for arguments that contradict each other or are no plain values."""
    args = _arguments(about)
    name = next((name for name in (args.get("model"), about.get("arch")) if isinstance(name, str)), "")
    kwargs = args.get("model_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise InputError(f"the trainer's arguments: model_kwargs is of type {type(kwargs).__name__}, not a dictionary")
    size = _one(args, "img_size", "input_size")
    channels = _one(args, "in_chans")
    if isinstance(size, list | tuple) and len(size) == 3:  # [channels, height, width]
        channels, size = channels or size[0], list(size[1:])
    pool = _one(args, "gp", "global_pool")
    if isinstance(pool, bool):  # as MAE's trainer has it
        pool = "avg" if pool else "token"
    classes = _one(args, "nb_classes", "num_classes")
    passed = dict(img_size=size, in_chans=channels, num_classes=classes, global_pool=pool)
    sizes = {name: _one(args, name) for name in _SIZES}
    return Trained(name.partition(".")[0], _set(passed) | _set(kwargs), _set(sizes))


def preprocessing(about: Mapping[str, Any], pre: Preprocess, whose: str) -> tuple[Preprocess, str]:
    """The preprocessing of pictures in timm's arguments, and whose it is.

    What they leave open is that of `pre`; in a file of timm's own trainer, timm's for the architecture. Raises
    InputError for values that are not supported.
    """
    args = _arguments(about)
    usual = _of_timms_trainer(about)
    whose = f"timm's for {about['arch']}" if usual else whose
    given = {name: _one(args, name) for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    # One number is of something else: the standard deviation of initial weights, say.
    listed = {name: isinstance(value, list | tuple) or name not in ("mean", "std") for name, value in given.items()}
    given = {name: value for name, value in given.items() if value is not None and listed[name]}
    fields = Fields({**usual, **given}, "the trainer's arguments next to the tensors")
    modes: dict[str, Mode] = {"center": "shortest", "squash": "squash", pre.mode: pre.mode}
    mean, std = (fields.numbers("mean", pre.mean, length=3), fields.numbers("std", pre.std, length=3, above=0))
    interpolation = fields.choice("interpolation", {name: name for name in FILTERS}, pre.interpolation)
    mode = fields.choice("crop_mode", modes, pre.mode)
    found = replace(pre, mean=mean, std=std, interpolation=interpolation, mode=mode)  # type: ignore[arg-type]
    if "crop_pct" in fields:
        found = found.cropped(fields.number("crop_pct", above=0, most=1))
    return found, f"{whose}, with {', '.join(given)} of {fields.where}," if given else whose


def _of_timms_trainer(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """The preprocessing that timm's trainer uses where its arguments set none; empty for another trainer's file.

    DeiT's and MAE's trainers normalise by ImageNet's numbers, though their models have timm's names; only timm's saves
    the name as `arch`, too.
    """
    name = about.get("arch")
    return timm_architectures.preprocessing(name) if name and name == _arguments(about).get("model") else {}


def _arguments(about: Mapping[str, Any]) -> Mapping[str, Any]:
    places = (about.get(place) for place in ("args", "hyper_parameters"))
    return next((args for args in places if isinstance(args, Mapping)), {})


def _set(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are not None, numpy scalars as Python numbers."""
    given = ((name, value) for name, value in args.items() if value is not None)
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in given}


def _one(args: Mapping[str, Any], *names: str) -> Any:
    """The value under one of these names; None if none is set, which some trainers write as 0 or an empty text."""
    args = _set({name: args.get(name) for name in names})
    for name, value in args.items():
        if not isinstance(value, _PLAIN):
            kind = type(value).__name__
            raise InputError(f"the trainer's arguments: {name} is of type {kind}, not a number, text or list")
    found = {name: args[name] for name in names if args.get(name) or args.get(name) is False}
    first = next(iter(found.values()), None)
    for name, value in found.items():
        if _side(value) != _side(first):
            values = " and ".join(f"{name} is {value}" for name, value in found.items())
            raise InputError(f"the trainer's arguments next to the tensors: {values}, which contradict each other")
    return first


def _side(value: Any) -> Any:
    """Normalise the size of pictures: one side, two sides, or the channels and two sides."""
    if isinstance(value, list | tuple) and len(value) in (2, 3):
        return value[-1] if value[-1] == value[-2] else tuple(value[-2:])
    return value
