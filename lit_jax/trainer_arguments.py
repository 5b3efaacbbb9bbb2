"""Reads the arguments that trainers of DiTs save next to the tensors, and refuses what is no DiT of noise."""

import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from heirloom.common.checkpoint.family import Found, Guess
from heirloom.common.checkpoint.unwrap import TRAINING
from heirloom.common.errors import InputError, remark
from lit_jax.dit import SOFTMAX_HEADS

WIDTHS = {"S": 384, "B": 768, "L": 1024, "XL": 1152}
_DIT = re.compile(r"(DiT|LiT)-(S|B|L|XL)/\d+")
_PLACES = ("args", "hyper_parameters", "hparams", "config", "cfg")  # of train.py, Lightning, and configs
_ALSO = re.compile(r"arg|param|conf|cfg|option|setting", re.IGNORECASE)  # in the names of other places
# Names of groups whose settings are the denoiser's: `model`, `dit_config`, `train_args`, and the places above.
_DENOISER = re.compile(
    r"(model|[dl]it|pixart|net(work)?|unet|denoiser|backbone|transformer|train(ing|er)?|hyper|init|h?param(eter)?s?"
    r"|(kw)?arg(ument)?s?|conf(ig)?s?|cfg|opt(ion)?s?|settings?|[_. -])+"
)
_OTHER_THINGS = re.compile(r"(^|_)(eval|val(_|$)|valid|test|discriminator|optim|lr(_|$))")  # groups of other things
_SAMPLING = re.compile(r"(^|_)(sampl|infer|generat(e|ion))")  # groups whose chain may be shorter than the training's
_NOISE = ("noise", "eps", "epsilon", "pred_noise")
_NO = ("none", "null", "false", "no", "off", "0")  # text for what is not set
# What changes the prediction or the chain, by the names that trainers have for it, with DiT's values.
_PREDICTIONS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("prediction", "prediction_type", "pred_type", "objective", "parameterization"), _NOISE),
    **dict.fromkeys(("mean_type", "model_mean_type"), _NOISE),
    **dict.fromkeys(("predict_xstart", "predict_v", "rectified_flow", "flow_matching"), (False,)),
    **dict.fromkeys(("precond", "path_type"), ("none", False)),  # of EDM, and of SiT
}
_CHAIN: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("rescale_betas_zero_snr", "zero_terminal_snr"), (False,)),
    **dict.fromkeys(("noise_schedule", "beta_schedule"), ("linear",)),
    **dict.fromkeys(("diffusion_steps", "num_train_timesteps", "num_diffusion_timesteps", "timesteps"), (1000,)),
    **dict.fromkeys(("beta_start", "linear_start"), (1e-4,)),
    **dict.fromkeys(("beta_end", "linear_end"), (0.02,)),
    "snr_shift_scale": (1.0,),
}
# Further names: truthy where something else than noise is predicted, or a schedule that is not linear.
_OTHER_KIND = re.compile(
    r"(^|_)(v|velocity)_?(pred|param)|pred(ict)?_(v|velocity)($|_)|(^|_)flow|rectified_?flow|zero.*snr|zsnr"
    r"|latents?_norm|norm(alize)?_latents?"
)
_SCHEDULE = re.compile(r"(noise|beta|diffusion)s?_?sched|schedule_name")
_TARGET = re.compile(r"(^|_)(target|predicts?|pred|prediction|objective|parametri[sz]ation)($|_)")
_OTHER_TARGETS = ("v", "velocity", "flow", "x0", "x_0", "xstart", "x_start", "start_x", "sample", "score")
# Names whose values may be those of flows: `loss_type: flow_match`, `noise_schedule: linear_flow`.
_KINDS = re.compile(
    r"(^|_)(target|pred(ict)?(s|ion)?|objective|parametri[sz]ation|type|method|framework|formulation|process|loss"
    r"|diffusion|noise|schedul(e|er)|sampler|betas|transport|interpolant)($|_)"
)
_FLOW = re.compile(r"(^|_)(flow(match(ing)?)?|rectified(flow)?)($|_)")
_DIFFUSION = re.compile(r"diffusion|noise|(^|_)ddpm")  # groups of a config whose `schedule` is the noise's
_OTHER_SCHEDULES = ("squaredcos_cap_v2", "scaled_linear", "sqrt_linear", "sqrt", "sigmoid", "karras", "laplace")
_LATENTS = re.compile(r"vae|autoencoder|first_stage|latent")
_SCALE = re.compile(r"(^|latents?_|vae_)(scale|scaling)_factor$|latents?_(scale|multiplier)$")
_MEAN = re.compile(r"(^|latents?_|vae_)shift(ing)?_factor$|latents?_(shift|bias|mean)s?$")
_STD = re.compile(r"latents?_(std|scale)s?$")


class Setting(NamedTuple):
    """One of a trainer's arguments. groups: the groups of the config around it; the first is the place in the file."""

    groups: tuple[str, ...]
    name: str
    value: Any

    @property
    def plain(self) -> str:
        """Its name in snake case; of a `type` or a `name` in a group, that of the group."""
        of_group = self.name in ("type", "name") and len(self.groups) > 1
        return _snake(self.groups[-1] if of_group else self.name)

    @property
    def around(self) -> str:
        """The names of its groups in snake case."""
        return "_".join(map(_snake, self.groups))

    def __str__(self) -> str:
        value = str(self.value)
        return f"{'.'.join((*self.groups[1:], self.name))} {value if len(value) <= 60 else f'{value[:57]}...'}"

    @property
    def by_name(self) -> bool:
        """Whether it is the denoiser's by the names of its groups."""
        return all(_DENOISER.fullmatch(group.lower()) for group in self.groups)


def arguments_of(found: Found) -> list[Setting]:
    """Return all arguments, and remark what is not understood. Raises InputError for a prediction or a chain that is
    not DiT's; where the user has set `prediction` to noise, this is remarked instead.
    """
    settings: list[Setting] = []
    others = [name for name in found.about if _ALSO.search(name) and not TRAINING.search(name)]
    for place in dict.fromkeys((*_PLACES, *others)):
        given = found.about.get(place)
        inside = list(_settings(given, (place,)))
        if given and not inside and place in _PLACES:
            kind = f"{place!r}, saved with the tensors, is a {type(given).__name__} without names, which is not read"
            remark(f"{kind}: whether the model predicts noise, on DiT's chain, was not compared with it")
        settings += inside
    file = found.json("config.json")  # of huggingface_hub's mixin: what the model was made with
    if file is not None and "_class_name" not in file and "format" not in file:
        settings += _settings({name: file.value(name) for name in file}, ("config",))
    for why in filter(None, map(_refusal, settings)):
        if found.settings.get("prediction") != "noise":
            raise InputError(f"{why} (if it is a setting of something else: --set prediction=noise)")
        remark(f"{why}; this is passed over, as prediction=noise was given")
    if any(setting.plain == "linear_start" for setting in settings):
        ldm = "in latent diffusion's code, whose name linear_start is, 'linear' is linear in the square root"
        remark(f"{ldm}; the chain of this model is taken for linear, as DiT's is")
    return settings


def trained_as(
    found: Found, sizes: Mapping[str, Any], sure: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Guess]]:
    """Return what is known of the model: `sure`, which tensors and other files say, and what only the arguments say
    (`prediction`, `heads`, `classes`, `size`, `pixels`, and `scale` of its latents). Arguments that differ, or that may
    be another network's, are guesses.

    sizes: `width` and `layers`. Raises InputError for a model that predicts something else than noise, or on another
    chain than DiT's.
    """
    settings, width, known, guesses = arguments_of(found), sizes["width"], dict[str, Any](), list[Guess]()
    own = _of_denoiser(settings, width, sizes["layers"])
    dits = [(s, m) for s in own if s.plain == "model" and (m := _DIT.fullmatch(str(s.value)))]
    if dits or any(s.plain in _PREDICTIONS and _said(s.value) in _NOISE for s in settings):
        known["prediction"] = "noise"

    def numbers(name: str, kind: type = Integral) -> list[tuple[Setting, Any]]:
        return [(s, s.value) for s in own if s.name == name and isinstance(s.value, kind) and type(s.value) is not bool]

    heads = [(s, int(value)) for s, value in numbers("num_heads") if value > 0 and width % value == 0]
    heads += [(s, SOFTMAX_HEADS[width]) for s, m in dits if m[1] == "DiT" and WIDTHS[m[2]] == width]
    rows = len(found.tensors.get("y_embedder.embedding_table.weight", ()))
    # DiT's table has a row for no class only where labels are dropped.
    dropped = [(s, rows - (drop > 0)) for s, drop in numbers("class_dropout_prob", Real) if rows]
    # A LiT has other heads than the DiT of its arguments.
    said = {"heads": heads if "blocks.0.attn.qkv.weight" in found.tensors else []}
    said |= {"classes": numbers("num_classes") or dropped, "size": numbers("input_size")}
    for name, sources in said.items():
        if not sources or name in sure:
            continue
        known[name] = int(sources[0][1])  # of numpy, too
        if len({value for _, value in sources}) > 1 or not sources[0][0].by_name:
            differ = " and ".join(str(source) for source, _ in sources)
            guesses.append(Guess(name, known[name], f"the arguments saved with the tensors say {differ}"))
    if len(pixels := {value for _, value in numbers("image_size")}) == 1:
        known["pixels"] = int(pixels.pop())  # of the pictures, which DiT's train.py encodes with an autoencoder
    if (scale := _scale(settings)) is not None:
        known["scale"] = scale
    return known | dict(sure), guesses


def _of_denoiser(settings: Sequence[Setting], width: int, layers: int) -> list[Setting]:
    """Returns the settings of the denoiser: those that are so by the names of their groups, then those of groups that
    say its width; none of a group that says another width or depth.
    """
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for setting in settings:
        groups.setdefault(setting.groups, {})[setting.name] = setting.value
    sizes = {"hidden_size": width, "depth": layers}
    fit = [s for s in settings if all(groups[s.groups].get(name) in (None, size) for name, size in sizes.items())]
    own = [s for s in fit if s.by_name or groups[s.groups].get("hidden_size") == width]
    return sorted(own, key=lambda setting: not setting.by_name)


def _scale(settings: Sequence[Setting]) -> float | None:
    """Returns the scale of the latents: of a setting whose name or group is of latents or of their autoencoder, else of
    one at the top level or in LDM's `model.params`. Remarks several that differ, of which none is taken.
    """
    scales = [(s, number) for s in settings if _SCALE.search(s.plain) and (number := _uniform(s.value)) is not None]
    scales = [(s, number) for s, number in scales if 0 < number < 4]  # larger ones, such as 8, are pixels of a latent
    named = [(s, number) for s, number in scales if _LATENTS.search(f"{s.around}_{s.plain}")]
    top = [(s, number) for s, number in scales if s.by_name and s.groups[1:] in ((), ("model", "params"))]
    taken = named or top
    if len({number for _, number in taken}) > 1:
        both = " and ".join(str(s) for s, _ in taken)
        remark(f"{both}, saved with the tensors, are different scales of latents: none of them is taken")
        return None
    return taken[0][1] if taken else None


def _settings(given: Any, groups: tuple[str, ...]) -> Iterator[Setting]:
    """Yields the settings in a dictionary and in those inside it, which groups of a config are."""
    if isinstance(given, Mapping):
        for name, value in given.items():
            inside = isinstance(value, Mapping)
            yield from _settings(value, (*groups, str(name))) if inside else [Setting(groups, str(name), value)]


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[-. ]", "_", name).lower()


def _refusal(setting: Setting) -> str:
    """Returns why a model that was trained with this setting cannot be sampled; an empty text for DiT's values."""
    plain, around, said = setting.plain, setting.around, _said(setting.value)
    if _OTHER_THINGS.search(around) or said in (None, ""):
        return ""
    sampling = _SAMPLING.search(around)
    if (usual := (_PREDICTIONS if sampling else _PREDICTIONS | _CHAIN).get(plain)) is not None:
        needed = "" if said in usual else f"with {plain} {usual[0]}"
    else:
        other = _other_kind(setting, plain, said) or _shifted(plain, setting.value)
        other = other or not (sampling or _of_linear_chain(setting, plain, said))
        needed = "that predict noise, of latents that are scaled alone, on a linear chain" if other else ""
    return f"trained with {setting}; only models {needed} can be sampled here" if needed else ""


def _other_kind(setting: Setting, plain: str, said: Any) -> bool:
    """Returns whether a setting says that the model predicts something else than noise."""
    if plain == "model" and setting.by_name and str(setting.value).startswith("SiT"):
        return True
    flow = isinstance(said, str) and _KINDS.search(plain) and _FLOW.search(_snake(str(setting.value)))
    named = _OTHER_KIND.search(plain) and said not in (False, 0, *_NO, *_NOISE)
    return bool(flow or named or (_TARGET.search(plain) and said in _OTHER_TARGETS))


def _shifted(plain: str, value: Any) -> bool:
    """Returns whether a setting says that latents are shifted, or that their channels have a scale each."""
    number, no = _uniform(value), _said(value) in (False, *_NO)
    return bool((_MEAN.search(plain) and not no and number != 0) or (_STD.search(plain) and not no and number is None))


def _of_linear_chain(setting: Setting, plain: str, said: Any) -> bool:
    """Returns whether a setting is of no schedule, or of a linear one, and remarks one that is taken for another's."""
    any_schedule, linear = plain in ("schedule", "scheduler"), ("linear", "ddpm", "ddim", *_NO)
    if not isinstance(said, str) or plain in _CHAIN or said.startswith(linear):
        return True
    of_noise = _SCHEDULE.search(plain) or (any_schedule and _DIFFUSION.search(setting.around))
    cosine = plain in ("noise_type", "betas") and said.startswith("cosine")
    if of_noise or cosine or (any_schedule and said in _OTHER_SCHEDULES):
        return False
    if any_schedule and "sched" not in setting.around:
        remark(f"{setting}, saved with the tensors, is taken for that of the learning rate")
    return True


def _uniform(value: Any) -> float | None:
    """Returns a number, or that of a list of equal numbers; None for anything else."""
    if isinstance(value, bool | str | None):
        return None
    try:
        numbers = np.unique(np.asarray(value, np.float64))
    except (TypeError, ValueError):
        return None
    return float(numbers[0]) if len(numbers) == 1 else None


def _said(value: Any) -> Any:
    """Returns a value to compare: text in lower case, numpy's numbers as Python's, and objects as text."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool | int | float | None):
        return value
    return value.lower() if isinstance(value, str) else str(value)
