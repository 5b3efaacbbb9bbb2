"""What a trainer's settings have to say of a model that can be sampled: it predicts noise, on DiT's chain."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from heirloom.common.errors import remark
from lit_jax.trainer_settings import Setting, snake

PREDICTION = "prediction|(prediction|pred)_type|objective|parameterization|(model_)?mean_type"
NOISE = ("noise", "eps", "epsilon", "pred_noise")
_OFF = (False, "none", "null", "false", "no", "off", "0")  # False is 0, too
_FLOW = re.compile(r"(^|_)(flow(match(ing)?)?|rectified(flow)?)($|_)")
_OTHER_THINGS = re.compile(r"(^|_)(eval|val(_|$)|valid|test|discriminator|optim|lr(_|$)|aug)")  # groups of other things
_SAMPLING = re.compile(r"(^|_)(sampl|infer|generat(e|ion))")  # groups whose chain may be shorter than the training's
_X0 = "(x|x_?0|x_?start|start_?x)"
_EVERY = "that predict noise, of latents that are scaled alone, on a linear chain"


class Rule(NamedTuple):
    """Settings of some names, and the values at which a model can be sampled. needs: the refusal's words for them, with
    {} for the setting's name. chain: of the chain; groups of sampling may say another one.
    """

    names: re.Pattern[str]
    fits: Callable[[Setting], bool]
    needs: str = _EVERY
    chain: bool = False


def refusal(setting: Setting) -> str:
    """Return why a model that was trained with this setting cannot be sampled; an empty text for DiT's values."""
    if _OTHER_THINGS.search(setting.around) or setting.said in (None, ""):
        return ""
    sampling = _SAMPLING.search(setting.around)
    for rule in RULES:
        if not (rule.chain and sampling) and rule.names.search(setting.plain) and not rule.fits(setting):
            return f"trained with {setting}; only models {rule.needs.format(setting.plain)} can be sampled here"
    return ""


def _only(names: str, *usual: Any, chain: bool = False) -> Rule:
    """A rule of settings whose whole name is one of `names`, which have one of the values `usual`."""
    return Rule(re.compile(f"^({names})$"), lambda setting: setting.said in usual, f"with {{}} {usual[0]}", chain)


def _never(names: str, *values: Any) -> Rule:
    """A rule of settings with a part of their name among `names`, which have none of the `values`."""
    return Rule(re.compile(f"(^|_)({names})($|_)"), lambda setting: setting.said not in values)


def _no_x0(setting: Setting) -> bool:
    """Returns whether the model predicts noise; `predict_x0` of a scheduler is how UniPC solves."""
    return setting.said in (*_OFF, *NOISE) or bool(re.search("sched|solver", setting.around))


def _no_flow(setting: Setting) -> bool:
    return not (isinstance(setting.said, str) and _FLOW.search(snake(str(setting.value))))


def _no_shift(setting: Setting) -> bool:
    return setting.said in _OFF or setting.number == 0


def _of_all_channels(setting: Setting) -> bool:
    return setting.said in _OFF or setting.number is not None


def _linear(setting: Setting) -> bool:
    """Returns whether a schedule is linear, or none of noise; remarks one that is taken for another's."""
    plain, around, said = setting.plain, setting.around, setting.said
    if "cosine" in plain and said not in _OFF:
        said = "cosine"
    if not isinstance(said, str) or said.startswith(("linear", "ddpm", "ddim", *_OFF[1:])):
        return True
    if plain in ("noise_type", "betas"):
        return not said.startswith("cosine")
    if plain not in ("schedule", "scheduler", "schedule_type", "cosine_schedule", "use_cosine_schedule"):
        return False
    other = ("squaredcos_cap_v2", "scaled_linear", "sqrt_linear", "sqrt", "sigmoid", "karras", "laplace")
    if said in other or re.search(r"diffusion|noise|(^|_)ddpm", around):
        return False
    if "sched" not in around:
        remark(f"{setting}, saved with the tensors, is assumed to be the learning-rate schedule")
    return True


RULES = (
    _only(PREDICTION, *NOISE),
    _only("predict_xstart|predict_v|rectified_flow|flow_matching", *_OFF),
    _only("precond|path_type", "none", *_OFF),  # of EDM, and of SiT
    _only("rescale_betas_zero_snr|zero_terminal_snr", *_OFF, chain=True),
    _only("(noise|beta)_schedule", "linear", chain=True),
    _only("(diffusion|noise|train_sampling)_steps|((num|n)_)?((train|diffusion)_)?timesteps", 1000, chain=True),
    _only("beta_start|linear_start", 1e-4, chain=True),
    _only("beta_end|linear_end", 0.02, chain=True),
    _only("snr_shift_scale", 1.0, chain=True),
    _only("noise_shift", 1.0, *_OFF, chain=True),
    Rule(re.compile("^model$"), lambda setting: not (setting.by_name and str(setting.value).startswith("SiT"))),
    Rule(
        re.compile(
            r"(^|_)(v|velocity)_?(pred|param)|pred(ict)?_(v|velocity)($|_)|(^|_)flow|rectified_?flow|zero.*snr|zsnr"
            r"|latents?_(norm|stat)|(norm(ali[sz]e)?|standardi[sz]e)_latents?"
        ),
        lambda setting: setting.said in (*_OFF, *NOISE),
    ),
    Rule(re.compile(rf"(^|_){_X0}_?(pred|parametri)|(^|_)pred(ict)?_?{_X0}($|_)"), _no_x0, chain=True),
    Rule(
        re.compile(r"(^|_)pred(ict)?_?(eps(ilon)?|noise)$|^(eps(ilon)?|noise)_?pred(iction)?$"),
        lambda setting: setting.said not in _OFF,
    ),
    _never(
        "target|predicts?|pred|prediction|objective|parametri[sz]ation|diffusion(_type)?$",
        *("v", "velocity", "flow", "x0", "x_0", "xstart", "x_start", "start_x", "sample", "score", "edm"),
    ),
    Rule(  # loss_type: flow_match, noise_schedule: linear_flow
        re.compile(
            r"(^|_)(target|pred(ict)?(s|ion)?|objective|parametri[sz]ation|type|method|framework|formulation|process"
            r"|loss|diffusion|noise|schedul(e|er)|sampler|betas|transport|interpolant)($|_)"
        ),
        _no_flow,
    ),
    Rule(re.compile(r"(^|latents?_|vae_)shift(ing)?_factor$|(latents?|vae)_(shift|bias|mean)s?$"), _no_shift),
    Rule(re.compile(r"(latents?|vae)_(std|scale)s?$"), _of_all_channels),
    Rule(
        re.compile(
            r"(noise|beta|alpha|diffusion)s?_?sched|schedule_name|^(schedule|scheduler|schedule_type|noise_type|betas)$"
            r"|(^|_)cosine_(schedule$|noise|betas?|alphas?)"
        ),
        _linear,
        chain=True,
    ),
)
