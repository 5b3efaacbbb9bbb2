"""What a DiT's trainer says of the model by the arguments it saves next to the tensors."""

import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from heirloom.common.checkpoint.family import Found, Guess
from heirloom.common.errors import InputError, remark
from lit_jax.dit import SOFTMAX_HEADS
from lit_jax.trainer_rules import NOISE, PREDICTION, refusal
from lit_jax.trainer_settings import Setting, of_denoiser, settings_of

WIDTHS = {"S": 384, "B": 768, "L": 1024, "XL": 1152}
OF_LATENTS = ("scale", "autoencoder")  # what is known, next to the config
_DIT = re.compile(r"(DiT|LiT)-(S|B|L|XL)/\d+")
_LATENTS = re.compile(r"vae|autoencoder|first_stage|latent")
_SCALE = re.compile(r"(^|latents?_|vae_)(scale|scaling)_factor$|(latents?|vae)_(scale|scaling|multiplier)$")
_STD = re.compile(r"(latents?|vae)_stds?$")
_AUTOENCODER = re.compile(r"(vae|autoencoder)(_(name|path|model|pretrained|(model_)?name_or_path))?|pretrained_vae")


def arguments_of(found: Found) -> list[Setting]:
    """Return all arguments, and remark what is not understood. Raises InputError for a prediction or a chain that is
    not DiT's; where the user has set `prediction` to noise, this is remarked instead.
    """
    settings = settings_of(found)
    for why in filter(None, map(refusal, settings)):
        if found.settings.get("prediction") != "noise":
            raise InputError(f"{why}; if this setting belongs to another part, add --set prediction=noise")
        remark(f"{why}; this is ignored, as prediction=noise was given")
    if any(setting.plain == "linear_start" for setting in settings):
        ldm = "the saved arguments use latent-diffusion names (linear_start), where 'linear' means scaled-linear betas"
        remark(f"{ldm}; DiT's linear betas are assumed")
    return settings


def trained_as(
    found: Found, sizes: Mapping[str, Any], sure: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Guess]]:
    """Return what is known of the model: `sure`, which tensors and other files say, and what only the arguments say
    (`prediction`, `heads`, `classes`, `size`, `pixels`, `scale` of its latents, and the name of their `autoencoder`).
    Arguments that differ, or that may be another network's, are guesses.

    sizes: `width` and `layers`. Raises InputError for a model that predicts something else than noise, or on another
    chain than DiT's.
    """
    settings, width, known, guesses = arguments_of(found), sizes["width"], dict[str, Any](), list[Guess]()
    own = of_denoiser(settings, width, sizes["layers"])
    dits = [(s, m) for s in own if s.plain == "model" and (m := _DIT.fullmatch(str(s.value)))]
    if dits or any(re.fullmatch(PREDICTION, s.plain) and s.said in NOISE for s in settings):
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
    named = [s.value for s in settings if _AUTOENCODER.fullmatch(s.plain) and isinstance(s.value, str) and s.value]
    if named:
        known["autoencoder"] = named[0]
    return known | dict(sure), guesses


def _scale(settings: Sequence[Setting]) -> float | None:
    """Returns the scale of the latents: of a setting whose name or group is of latents or of their autoencoder, else of
    one at the top level or in LDM's `model.params`. Remarks several that differ, of which none is taken.
    """
    scales = [(s, s.number) for s in settings if _SCALE.search(s.plain)]
    scales += [(s, 1 / s.number) for s in settings if _STD.search(s.plain) and s.number and s.number != 1]
    # Larger ones, such as 8, are pixels of a latent.
    usable = [(s, number) for s, number in scales if number is not None and 0 < number < 4]
    named = [(s, number) for s, number in usable if _LATENTS.search(f"{s.around}_{s.plain}")]
    top = [(s, number) for s, number in usable if s.by_name and s.groups[1:] in ((), ("model", "params"))]
    taken = named or top
    if len({number for _, number in taken}) > 1:
        both = " and ".join(str(s) for s, _ in taken)
        remark(f"{both}, saved with the tensors, are different scales of latents: none of them is taken")
        return None
    return taken[0][1] if taken else None
