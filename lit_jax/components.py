"""Finds the parts of a text-to-image model: its own pipeline folder has them, or flags name them."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from heirloom.common.checkpoint.convert import OURS, first_format
from heirloom.common.checkpoint.family import Donor
from heirloom.common.checkpoint.fields import Fields
from heirloom.common.checkpoint.hub import absolute, local_path, locate
from heirloom.common.checkpoint.pipeline import INDEX, MAIN, class_of, is_pipeline, plain_weights
from heirloom.common.data.labelled import LABELS, read_labels, write_labels
from heirloom.common.errors import InputError, remark
from heirloom.common.files import read_json, write_json
from heirloom.common.methods import locate_any
from lit_jax.origin import read_origin
from lit_jax.pixart import PixArtConfig
from lit_jax.text.tokenizer import PIECES, WHOLE, find_tokenizer
from lit_jax.text_origin import copy_empty_text

PIPELINE, PAG = "PixArtSigmaPipeline", "PixArtSigmaPAGPipeline"  # of the same parts
SIDECAR = "pipeline.json"
SDXL_SCALE = 0.13025  # of the latents that PixArt-Σ was trained on
SD_SCALE = 0.18215  # of the latents that DiT was trained on
# Names of autoencoders with these scales, in arguments of trainers; the class alone names none.
_SDXL_VAES = re.compile(r".*(sdxl|pixart_sigma).*|autoencoder\w*", re.IGNORECASE)
_SD_VAES = re.compile(r"ema|mse|.*\bsd[-_]?vae.*|.*stable-diffusion-(v1|2).*|autoencoder\w*", re.IGNORECASE)
_OFF = (False, None)  # diffusers asks only whether such a field is true
# The fields of diffusers' schedulers that tell the chain and the prediction, with the values of DiT.
_CHAIN: dict[str, tuple[Any, ...]] = dict(
    num_train_timesteps=(1000,),
    beta_schedule=("linear",),
    beta_start=(1e-4,),
    beta_end=(0.02,),
    trained_betas=(None,),
    prediction_type=("epsilon",),
    use_flow_sigmas=_OFF,
    rescale_betas_zero_snr=_OFF,
    snr_shift_scale=(1.0,),
)
_BETAS = ("beta_start", "beta_end")
# Schedulers with other defaults, and of which fields. Wuerstchen's chain is a cosine and has no such fields.
_OTHER_DEFAULTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("HeunDiscreteScheduler", "DPMSolverSDEScheduler"), _BETAS),
    **dict.fromkeys(("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"), _BETAS),
    "CogVideoXDDIMScheduler": ("beta_schedule", *_BETAS, "snr_shift_scale"),
    "DDPMWuerstchenScheduler": ("beta_schedule",),
}
_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_OTHERS = {
    "PixArtAlphaPipeline": "a PixArt-α, which has other text lengths and further embedders",
    "SanaPipeline": "a Sana, which is another architecture",
}


@dataclass(frozen=True)
class Components:
    """Folders of the parts next to the transformer.

    text: a T5 encoder. tokenizer: its tokenizer files. autoencoder: the decoder of the latents.
    """

    text: Path
    tokenizer: Path
    autoencoder: Path


def find_components(donor: Donor, *, pipeline: str = "", text: str = "", autoencoder: str = "") -> Components:
    """Finds the parts for a transformer.

    pipeline, text, autoencoder: SOURCEs that the caller names; else the pipeline folder that the transformer lies in,
    else the one that its sidecar names. Raises InputError for a part that nothing names, or that does not exist.
    """
    root, named = locate(pipeline) if pipeline else pipeline_of(donor), bool(text and autoencoder and not pipeline)
    if root is None:
        text, autoencoder = text or _noted(donor, "text_encoder"), autoencoder or _noted(donor, "autoencoder")
    if root is not None and not named:
        if not pipeline and not root.is_dir():
            gone = f"{donor.folder / SIDECAR}: its pipeline {root} does not exist any more"
            raise InputError(f"{gone}; give --pipeline DIR, or --text-encoder and --autoencoder")
        check_pipeline(root)
    elif not (text and autoencoder):
        raise InputError(
            f"{donor.path}: holds no text encoder and no autoencoder; give --pipeline DIR (a PixArt-Σ pipeline folder,"
            " or hf:PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers), or --text-encoder and --autoencoder"
        )
    encoder = locate_any(text) if text else _part(root, "text_encoder")
    decoder = locate_any(autoencoder) if autoencoder else _part(root, "vae")
    return Components(text=encoder, tokenizer=_tokenizer(encoder, root), autoencoder=decoder)


def _noted(donor: Donor, name: str) -> str:
    """Returns the SOURCE of a part that a transformer's sidecar names. Raises InputError for a path that is gone."""
    source = _sidecar(donor).get(name, "")
    if (path := local_path(source)) is not None and not path.exists():
        what = f"its {name.replace('_', ' ')} {source} does not exist any more"
        raise InputError(f"{donor.folder / SIDECAR}: {what}; give --{name.replace('_', '-')}")
    return source


def _part(root: Path | None, name: str) -> Path:
    assert root is not None
    if not (root / name).is_dir():
        flag = {"text_encoder": "--text-encoder", "vae": "--autoencoder"}[name]
        raise InputError(f"{root}: the sub-folder {name}/ is missing; name another pipeline by --pipeline, or {flag}")
    return plain_weights(root / name)


def check_pipeline(root: Path) -> None:
    """Checks that a folder is a PixArt-Σ pipeline, with a scheduler that samples it as we do.

    Raises InputError for another pipeline, and for settings of the scheduler that would change the pictures.
    """
    if not is_pipeline(root) and not (root / "text_encoder").is_dir():
        raise InputError(f"{root} is no pipeline folder: it has neither model_index.json nor text_encoder/")
    if (name := class_of(root)) == PAG:
        remark(f"{root} is a {PAG}: it is drawn without perturbed-attention guidance (PAG)")
    elif name not in (PIPELINE, ""):
        ways = "name the parts with --text-encoder and --autoencoder"
        raise InputError(f"{root} is {_OTHERS.get(name, f'a {name}')}: only {PIPELINE} is read; {ways}")
    if (root / "scheduler" / "scheduler_config.json").is_file():
        check_scheduler(Fields.load(root / "scheduler" / "scheduler_config.json"))


def check_chain(fields: Fields) -> None:
    """Refuses a scheduler of diffusers for models that predict something else than noise on DiT's chain."""
    kind = fields.text("_class_name", "")
    for name, values in _CHAIN.items():
        if name in _OTHER_DEFAULTS.get(kind, ()) and name not in fields:
            other = f"{kind}'s default differs from {values[0]}, the only supported value"
            raise InputError(f"{fields.where}: {name} is missing; {other}")
        fields.fixed(name, *values)


def check_scheduler(fields: Fields) -> None:
    """Refuses a scheduler whose pictures differ from those of DPM-Solver++(2M) on DiT's chain, naming the setting."""
    check_chain(fields)
    try:
        _check_sampler(fields)
    except InputError as error:
        ways = "remove scheduler/, or name the parts with --text-encoder and --autoencoder"
        raise InputError(f"{error}; heirloom draws with its own sampler: {ways}") from error


def _check_sampler(fields: Fields) -> None:
    usual = dict(_class_name="DPMSolverMultistepScheduler", algorithm_type="dpmsolver++", solver_type="midpoint")
    usual |= dict(timestep_spacing="linspace", final_sigmas_type="zero")
    for name, value in usual.items():
        fields.fixed(name, value)
    fields.fixed("solver_order", 2)
    for name in ("thresholding", "use_lu_lambdas", "use_dynamic_shifting", *_SIGMAS):
        fields.fixed(name, *_OFF)
    least = fields.value("lambda_min_clipped", float("-inf"))
    if not isinstance(least, int | float) or least > -5.1:  # the chain's own least value is -5.06
        raise fields.refusal("lambda_min_clipped", "only values up to -5.1, which clip nothing, can be sampled")
    # Without effect here: of other predictions, of shorter chains than this one, and of the learned variance.
    fields.skip(
        "lower_order_final", "euler_at_final", "variance_type", "dynamic_thresholding_ratio", "sample_max_value"
    )
    fields.skip(
        "flow_shift", "steps_offset", "time_shift_type", "_*", "clip_sample", "skip_prk_steps", "set_alpha_to_one"
    )
    fields.done("how pictures are drawn")


def copy_parts(donor: Donor, folder: Path) -> None:
    """Writes what a transformer is drawn with, its pipeline or its parts, so that it can lie in a folder of its own."""
    root = pipeline_of(donor)
    named: dict[str, Any] = _sidecar(donor) if root is None else {"pipeline": str(root.resolve())}
    if scale := _trained_scale(donor):
        named |= {"scaling_factor": scale}
    if latents := _latents_of(donor):
        named |= {"latents_of": latents}
    if named:
        write_json(folder / SIDECAR, named)
    copy_empty_text(donor.folder, folder)


def write_parts_of(folder: Path, text_encoder: str, autoencoder: str) -> None:
    """Writes the SOURCEs of the text encoder and the autoencoder that a transformer was trained with."""
    write_json(folder / SIDECAR, {"text_encoder": absolute(text_encoder), "autoencoder": absolute(autoencoder)})


def pipeline_of(donor: Donor) -> Path | None:
    """Returns the pipeline folder that a transformer lies in, or that its sidecar names; None without either."""
    folder = Path(os.path.abspath(donor.folder))  # `.` has no name
    if folder.name.removesuffix("_ema") in MAIN and is_pipeline(folder.parent):  # a student may lie next to them
        return folder.parent
    root = _sidecar(donor).get("pipeline")
    return Path(root) if root else None


def class_names(donor: Donor) -> tuple[str, ...] | None:
    """Returns the names of a DiT's classes by number, from labels.json or the index of its pipeline; None without.

    Raises InputError for a labels.json of another number of classes.
    """
    if (names := read_labels(donor.folder)) is not None:
        if len(names) != donor.cfg.classes:
            given = f"{len(names)} class names, and the model {donor.cfg.classes} classes"
            raise InputError(f"{donor.folder / LABELS} has {given}: give one for each, or remove the file")
        return names
    root = pipeline_of(donor)
    named = read_json(root / INDEX).get("id2label") if root is not None and (root / INDEX).is_file() else None
    numbers = range(getattr(donor.cfg, "classes", 0))
    if not isinstance(named, dict) or {str(i) for i in numbers} != set(named):
        return None
    return tuple(str(named[str(i)]) for i in numbers)


def write_names(folder: Path, names: Sequence[str] | None) -> None:
    """Writes class names as labels.json; nothing where they are not known."""
    if names:  # of a class that has no name in the source, its number stands for it
        write_labels(folder, [name if name.strip() else f"class {i}" for i, name in enumerate(names)])


def is_foreign(donor: Donor) -> bool:
    """Returns whether the weights come from a file of another library, converted or not: such files do not tell whose
    latents, or whether pixels, the model draws.
    """
    return first_format(donor) not in OURS


def other_scale(donor: Donor, scale: float, name: str) -> str:
    """Returns a remark if a foreign model was trained on latents of another scale than those of `name`, else an empty
    string. The model's scale is that of its training's arguments or its pipeline's autoencoder, else that of the
    published models; where the arguments name another autoencoder than theirs, its name is compared instead.
    """
    if read_origin(donor.folder) or not is_foreign(donor):
        return ""
    root, usual = pipeline_of(donor), SDXL_SCALE if isinstance(donor.cfg, PixArtConfig) else SD_SCALE
    file = None if root is None else root / "vae" / "config.json"
    own = Fields.load(file).number("scaling_factor", SD_SCALE, above=0.0) if file and file.is_file() else None
    own, latents = _trained_scale(donor) or own, _latents_of(donor)
    if not own and latents and not (_SDXL_VAES if usual == SDXL_SCALE else _SD_VAES).fullmatch(latents):
        if Path(latents.removesuffix("/vae")).name.lower() in name.lower():
            return ""
        theirs = f"the arguments saved with {donor.path} name the autoencoder {latents!r}"
        return f"{name} has latents with scaling_factor {scale:g}, and {theirs}: check that it is the same"
    if np.isclose(scale, known := own or usual, rtol=1e-3):
        return ""
    trained = f"{donor.path} was trained on latents with {known:g}" if own else (
        f"published models such as {donor.path} were trained on latents with {known:g}"
    )
    return f"{name} has latents with scaling_factor {scale:g}, and {trained}: name the autoencoder of this model"


def _trained_scale(donor: Donor) -> float | None:
    """Returns the scale of the latents by the arguments of a foreign model's training, kept when it was converted."""
    return donor.known.get("scale") or _sidecar(donor).get("scaling_factor")


def _latents_of(donor: Donor) -> str:
    """Returns the autoencoder that the arguments of a foreign model's training name, kept when it was converted."""
    return donor.known.get("autoencoder") or _sidecar(donor).get("latents_of", "")


def _sidecar(donor: Donor) -> dict[str, Any]:
    """Returns what the sidecar of a transformer names: its pipeline, or its text encoder and its autoencoder, the scale
    of its latents, and the name of their autoencoder. Raises InputError for a damaged one.
    """
    file = donor.folder / SIDECAR
    if not file.is_file():
        return {}
    fields = Fields.load(file)
    names = ("pipeline", "text_encoder", "autoencoder", "latents_of")
    found: dict[str, Any] = {name: fields.text(name, None) for name in names}
    found["scaling_factor"] = fields.number("scaling_factor", None, above=0.0)
    fields.done("what it is drawn with")
    return {name: value for name, value in found.items() if value is not None}


def _tokenizer(encoder: Path, root: Path | None) -> Path:
    """Returns the folder of the tokenizer that belongs to a text encoder."""
    folder = encoder if encoder.is_dir() else encoder.parent
    # In a pipeline of two text encoders, such as FLUX, tokenizer/ is that of the other one.
    others = [] if folder.name.startswith("text_encoder") else [folder.parent / "tokenizer"]
    places = [folder, *others, *([root / "tokenizer"] if root else [])]
    if (found := next(filter(None, map(find_tokenizer, places)), None)) is None:
        names = " or ".join((WHOLE, PIECES))
        raise InputError(f"{folder}: no tokenizer ({names}) in it or next to it; fetch the tokenizer/ of the pipeline")
    return found
