"""Reads the arguments that trainers of DiTs save next to the tensors, and refuses what is no DiT of noise."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from heirloom.common.checkpoint.family import Found
from heirloom.common.checkpoint.unwrap import TRAINING
from heirloom.common.errors import InputError, remark
from lit_jax.dit import SOFTMAX_HEADS

WIDTHS = {"S": 384, "B": 768, "L": 1024, "XL": 1152}
_PLACES = ("args", "hyper_parameters", "hparams", "config", "cfg")  # of train.py, Lightning, and configs
_ALSO = re.compile(r"arg|param|conf|cfg|option|setting", re.IGNORECASE)  # in the names of other places
_NOISE = ("noise", "eps", "epsilon", "pred_noise")
_NO = ("none", "null", "false", "no", "off", "0")  # text for what is not set
# What changes the prediction or the chain, by the names that trainers have for it, with DiT's values.
_USUAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("prediction_type", "pred_type", "objective", "parameterization"), _NOISE),
    **dict.fromkeys(("mean_type", "model_mean_type"), _NOISE),
    **dict.fromkeys(("predict_xstart", "predict_v", "rectified_flow", "flow_matching"), (False,)),
    **dict.fromkeys(("rescale_betas_zero_snr", "zero_terminal_snr"), (False,)),
    **dict.fromkeys(("noise_schedule", "beta_schedule"), ("linear",)),
    **dict.fromkeys(("diffusion_steps", "num_train_timesteps", "num_diffusion_timesteps", "timesteps"), (1000,)),
    **dict.fromkeys(("beta_start", "linear_start"), (1e-4,)),
    **dict.fromkeys(("beta_end", "linear_end"), (0.02,)),
    "precond": ("none",),  # of EDM
}
# Further names: truthy where something else than noise is predicted, or a schedule that is not linear.
_OTHER_KIND = re.compile(
    r"(^|_)(v|velocity)_?(pred|param)|pred(ict)?_(v|velocity)($|_)|(^|_)flow|rectified_?flow|zero.*snr|zsnr"
    r"|latents?_norm|norm(alize)?_latents?"
)
_SCHEDULE = re.compile(r"(noise|beta|diffusion)s?_?sched|schedule_name")
_TARGET = re.compile(r"(^|_)(target|predicts?|objective|parametri[sz]ation)($|_)")
_OTHER_TARGETS = ("v", "velocity", "flow", "x0", "x_0", "xstart", "x_start", "start_x", "sample", "score")
_DIFFUSION = re.compile(r"diffusion|noise|sampler|(^|_)ddpm")  # groups of a config whose `schedule` is the noise's
_SCALE = re.compile(r"(^|latents?_)(scale|scaling)_factor$|latents?_(scale|multiplier)$")
_OTHER_SCHEDULES = ("squaredcos_cap_v2", "scaled_linear", "sqrt_linear", "sqrt", "sigmoid", "karras", "laplace")


def arguments_of(found: Found) -> dict[str, Any]:
    """Return all arguments by name, and remark what is not understood. Raises InputError for a prediction or a chain
    that is not DiT's.
    """
    args: dict[str, Any] = {}
    others = [name for name in found.about if _ALSO.search(name) and not TRAINING.search(name)]
    for place in dict.fromkeys((*_PLACES, *others)):
        given = found.about.get(place)
        settings = list(_settings(given, place))
        if given and not settings and place in _PLACES:
            kind = f"{place!r}, saved with the tensors, is a {type(given).__name__} without names, which is not read"
            remark(f"{kind}: whether the model predicts noise, on DiT's chain, was not compared with it")
        for group, name, value in settings:
            _check(group, name, value)
            args.setdefault(name, value)
    file = found.json("config.json")  # of huggingface_hub's mixin: what the model was made with
    if file is not None and "_class_name" not in file and "format" not in file:
        for group, name, value in _settings({name: file.value(name) for name in file}):
            _check(group, name, value)
            args.setdefault(name, value)
    if "linear_start" in args:
        ldm = "in latent diffusion's code, whose name linear_start is, 'linear' is linear in the square root"
        remark(f"{ldm}; the chain of this model is taken for linear, as DiT's is")
    return args


def trained_as(found: Found) -> dict[str, Any]:
    """Return what the arguments say of the model, where they do: `prediction`, `heads`, `classes`, `size`, `pixels`,
    and `scale` of its latents.

    Raises InputError for a model that predicts something else than noise, or on another chain than DiT's.
    """
    args, known = arguments_of(found), dict[str, Any]()
    name = str(args.get("model") or "")
    prediction, path, sit = args.get("prediction"), args.get("path_type"), name.startswith("SiT")
    if _lower(prediction) in _NOISE and (path or sit):
        what = f"path {path}" if path else name
        raise InputError(
            f"trained as a SiT ({what}): it predicts noise, but on another path than DiT's chain, and cannot be sampled"
        )
    if _lower(prediction) not in (None, *_NOISE) or path or sit:
        what = next(str(x) for x in (prediction, path, name) if x not in (None, ""))
        predicts = prediction or "velocity"
        raise InputError(
            f"trained as a SiT ({what}), which predicts {predicts}: only DiTs, which predict noise, can be sampled here"
        )
    if size := re.fullmatch(r"(?:DiT|LiT)-(S|B|L|XL)/(\d+)", name):
        known["prediction"] = "noise"
        width = found.tensors["x_embedder.proj.weight"].shape[0]
        if name.startswith("DiT") and width == WIDTHS[size[1]]:
            known["heads"] = SOFTMAX_HEADS[width]
    width, heads = len(found.tensors["x_embedder.proj.weight"]), args.get("num_heads")
    softmax = "blocks.0.attn.qkv.weight" in found.tensors  # a LiT has other heads than the DiT of its arguments
    fits = isinstance(heads, int) and heads > 0 and width % heads == 0 and args.get("hidden_size", width) == width
    if softmax and fits:
        known["heads"] = heads
    if isinstance(classes := args.get("num_classes"), int):
        known["classes"] = classes
    elif isinstance(drop := args.get("class_dropout_prob"), int | float):
        # DiT's table has a row for no class only where labels are dropped.
        known["classes"] = len(found.tensors["y_embedder.embedding_table.weight"]) - (drop > 0)
    if isinstance(args.get("input_size"), int):
        known["size"] = args["input_size"]
    if isinstance(pixels := args.get("image_size"), int):
        known["pixels"] = pixels  # of the pictures, which DiT's train.py encodes with an autoencoder
    scales = (value for name, value in args.items() if _SCALE.search(_snake(name)))
    # Larger numbers, such as 8, are pixels of a latent.
    known["scale"] = next((float(x) for x in scales if isinstance(x, int | float) and 0 < x < 4), None)
    return {name: value for name, value in known.items() if value is not None}


def _settings(given: Any, group: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yields the settings in a dictionary and in those inside it, which groups of a config are: the name of the group,
    the setting's own name, and its value.
    """
    if isinstance(given, Mapping):
        for name, value in given.items():
            yield from _settings(value, str(name)) if isinstance(value, Mapping) else [(group, str(name), value)]


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[-. ]", "_", name).lower()


def _check(group: str, name: str, value: Any) -> None:
    """Raises InputError for a setting with another value than DiT's."""
    plain, said = _snake(name), _lower(value)
    kind = name not in _USUAL and _OTHER_KIND.search(plain) and said not in (None, False, 0, "", *_NO, *_NOISE)
    target = _TARGET.search(plain) and said in _OTHER_TARGETS
    scheduled = _SCHEDULE.search(plain) or (plain == "schedule" and _DIFFUSION.search(_snake(group)))
    schedule = scheduled and isinstance(said, str) and not said.startswith(("linear", "ddpm", "ddim", *_NO))
    if kind or target or (schedule and name not in _USUAL):
        needed = "only DiTs that predict noise, of latents that are scaled alone, on a linear chain can be sampled here"
        raise InputError(f"trained with {name} {value}; {needed}")
    unclear = plain == "schedule" and not re.search("optim|lr|sched", group)
    if unclear and isinstance(said, str) and said not in ("linear", *_OTHER_SCHEDULES, *_NO):
        remark(f"schedule {value}, saved with the tensors, is taken for that of the learning rate")
    if name == "schedule" and _lower(value) in _OTHER_SCHEDULES:  # others may be of the learning rate
        raise InputError(f"trained with {name} {value}; only DiTs with a linear chain can be sampled here")
    if name in _USUAL and value not in (None, "") and _lower(value) not in (usual := _USUAL[name]):
        raise InputError(f"trained with {name} {value}; only DiTs with {name} {usual[0]} can be sampled here")


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value
