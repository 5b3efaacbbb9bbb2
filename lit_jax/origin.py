"""Which autoencoder latents are of: caches and trained models remember it, and every decoder is compared with it."""

import hashlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from heirloom.common.checkpoint.convert import Donor
from heirloom.common.checkpoint.weights import read_json, write_json
from heirloom.common.errors import InputError
from lit_jax.autoencoder import AutoencoderConfig
from lit_jax.autoencoder_layouts import config

FILE = "autoencoder.json"


@dataclass(frozen=True)
class Origin:
    """An autoencoder by what its latents depend on.

    source: as it was named, empty where an older cache does not say. encoder: SHA-256 of the encoder's weights, empty likewise.
    """

    cfg: AutoencoderConfig
    source: str = ""
    encoder: str = ""

    def __str__(self) -> str:
        return f"{self.source or 'an autoencoder that is not named'} (scaling_factor {self.cfg.scaling_factor:g})"


def autoencoder_origin(donor: Donor, source: str) -> Origin:
    """The identity of an opened autoencoder. Weights count in half precision, so that a copy in half precision is the same encoder."""
    digest = hashlib.sha256()
    for path, value in sorted(donor.source.values.items()):
        if path.startswith(("encoder/", "quant/")):
            with np.errstate(over="ignore"):
                digest.update(path.encode() + np.ascontiguousarray(np.asarray(value).astype(np.float16)).tobytes())
    return Origin(donor.cfg, source, digest.hexdigest())


def read_origin(folder: Path) -> Origin | None:
    """What a latent cache or a model's folder says, or None. Caches of earlier versions hold the config alone."""
    file = folder / FILE
    if not file.is_file():
        return None
    saved = read_json(file)
    if "model" not in saved:
        return Origin(config(saved))
    return Origin(config(saved["model"]), str(saved.get("source", "")), str(saved.get("encoder", "")))


def write_origin(folder: Path, origin: Origin | None) -> None:
    """Write it next to latents or weights; of a model of pixels there is none."""
    if origin is not None:
        write_json(folder / FILE, {"source": origin.source, "encoder": origin.encoder, "model": asdict(origin.cfg)})


def copy_origin(source: Path, destination: Path) -> None:
    """Carry it from one weights folder to another."""
    if (source / FILE).is_file():
        shutil.copy(source / FILE, destination / FILE)


def compare_latents(one: Origin, other: Origin, of_one: str, of_other: str) -> str:
    """What to say where two autoencoders differ, or nothing. of_one, of_other: what each belongs to, for the message.

    Raises InputError where latents of one are nothing to the other: another scaling factor or another number of channels.
    """
    a, b = one.cfg, other.cfg
    for name in ("scaling_factor", "latent", "factor"):
        if getattr(a, name) != getattr(b, name):
            raise InputError(
                f"{of_one} has latents of {one.source or 'an autoencoder'} with {name} {getattr(a, name):g}, {of_other} of "
                f"{other.source or 'an autoencoder'} with {getattr(b, name):g}: use the same autoencoder for both"
            )
    if not one.encoder or not other.encoder:
        unknown = of_other if one.encoder else of_one
        return f"{unknown} does not say which autoencoder its latents are of; its scaling_factor, {a.scaling_factor:g}, fits"
    if one.encoder != other.encoder:
        return f"{of_one} has latents of {one}, {of_other} of {other}: their encoders have other weights, and latents may not fit"
    return ""
