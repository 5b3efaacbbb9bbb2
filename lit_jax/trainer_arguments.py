"""Reads the arguments that trainers of DiTs save next to the tensors, and refuses what is no DiT of noise."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from heirloom.common.checkpoint.family import Found
from heirloom.common.errors import InputError
from lit_jax.dit import SOFTMAX_HEADS

WIDTHS = {"S": 384, "B": 768, "L": 1024, "XL": 1152}
_PLACES = ("args", "hyper_parameters", "hparams", "config", "cfg")  # of train.py, Lightning, and configs
_NOISE = ("noise", "eps", "epsilon", "pred_noise")
# What changes the prediction or the chain, by the names that trainers have for it, with DiT's values.
_USUAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("prediction_type", "pred_type", "objective", "parameterization"), _NOISE),
    **dict.fromkeys(("mean_type", "model_mean_type"), _NOISE),
    **dict.fromkeys(("predict_xstart", "predict_v", "rectified_flow", "flow_matching"), (False,)),
    **dict.fromkeys(("rescale_betas_zero_snr", "zero_terminal_snr"), (False,)),
    **dict.fromkeys(("noise_schedule", "beta_schedule"), ("linear",)),
    **dict.fromkeys(("diffusion_steps", "num_train_timesteps", "num_diffusion_timesteps"), (1000,)),
    "beta_start": (1e-4,),
    "beta_end": (0.02,),
    "precond": ("none",),  # of EDM
}


def arguments_of(found: Found) -> dict[str, Any]:
    """Return all arguments by name. Raises InputError for a prediction or a chain that is not DiT's."""
    args: dict[str, Any] = {}
    for place in _PLACES:
        for name, value in _settings(found.about.get(place)):
            _check(name, value)
            args.setdefault(name, value)
    return args


def trained_as(found: Found) -> dict[str, Any]:
    """Return what the arguments say of the model: `prediction`, `heads`, `classes` and `size`, where they do.

    Raises InputError for a model that predicts something else than noise, or on another chain than DiT's.
    """
    args, known = arguments_of(found), dict[str, Any]()
    name = str(args.get("model") or "")
    sit = (args.get("prediction"), args.get("path_type"), name if name.startswith("SiT") else None)
    if _lower(sit[0]) not in (None, *_NOISE) or any(sit[1:]):
        what = next(str(x) for x in (*sit, name) if x not in (None, ""))
        raise InputError(
            f"trained as a SiT ({what}), which predicts velocity: only DiTs, which predict noise, can be sampled here"
        )
    if size := re.fullmatch(r"(?:DiT|LiT)-(S|B|L|XL)/(\d+)", name):
        known["prediction"] = "noise"
        width = found.tensors["x_embedder.proj.weight"].shape[0]
        if name.startswith("DiT") and width == WIDTHS[size[1]]:
            known["heads"] = SOFTMAX_HEADS[width]
    if isinstance(classes := args.get("num_classes"), int):
        known["classes"] = classes
    if isinstance(pixels := args.get("image_size"), int):
        known["size"] = pixels // 8  # train.py of DiT: latents of an autoencoder that shrinks eight times
    return known


def _settings(given: Any) -> Iterator[tuple[str, Any]]:
    """Yields the settings in a dictionary and in those inside it, which groups of a config are, by their own names."""
    if isinstance(given, Mapping):
        for name, value in given.items():
            yield from _settings(value) if isinstance(value, Mapping) else [(str(name), value)]


def _check(name: str, value: Any) -> None:
    """Raises InputError for a setting with another value than DiT's."""
    if name in _USUAL and value not in (None, "") and _lower(value) not in (usual := _USUAL[name]):
        raise InputError(f"trained with {name} {value}; only DiTs with {name} {usual[0]} can be sampled here")


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value
