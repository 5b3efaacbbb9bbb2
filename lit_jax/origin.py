"""Records which autoencoder made the latents of a cache or a model, and compares every decoder with it."""

import hashlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from heirloom.common.checkpoint.family import Donor
from heirloom.common.errors import InputError
from heirloom.common.files import read_json, write_json
from heirloom.common.paths import AnyPath
from heirloom.common.typed import from_json
from lit_jax.autoencoder import AutoencoderConfig

FILE = "autoencoder.json"


@dataclass(frozen=True)
class Origin:
    """The properties of an autoencoder that its latents depend on.

    source: the SOURCE that was given, empty in older caches. encoder: SHA-256 of the encoder's weights, empty in older
    caches.
    """

    cfg: AutoencoderConfig
    source: str = ""
    encoder: str = ""

    def __str__(self) -> str:
        return f"{self.source or 'an unnamed autoencoder'} (scaling_factor {self.cfg.scaling_factor:g})"


def autoencoder_origin(donor: Donor, source: str) -> Origin:
    """Compute the identity of an opened autoencoder. Weights are hashed in half precision, so that a half-precision
    copy is the same.
    """
    digest = hashlib.sha256()
    for path, value in sorted(donor.source.values.items()):
        if path.startswith(("encoder/", "quant/")):
            with np.errstate(over="ignore"):
                digest.update(path.encode() + np.ascontiguousarray(np.asarray(value).astype(np.float16)).tobytes())
    return Origin(donor.cfg, source, digest.hexdigest())


def read_origin(folder: AnyPath) -> Origin | None:
    """Read the autoencoder of a latent cache or a model's folder; None without the file. Older caches hold the config
    alone. Raises InputError for a damaged file.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    saved = read_json(file)
    if not (model := saved.get("model", saved)):
        raise InputError(f"{file} says nothing of an autoencoder: copy it again from where it came from")
    cfg = from_json(AutoencoderConfig, model, str(file))
    return Origin(cfg, str(saved.get("source", "")), str(saved.get("encoder", "")))


def write_origin(folder: Path, origin: Origin | None) -> None:
    """Write the autoencoder's identity next to latents or weights; nothing for a model of pixels."""
    if origin is not None:
        write_json(folder / FILE, {"source": origin.source, "encoder": origin.encoder, "model": asdict(origin.cfg)})


def copy_origin(source: Path, destination: Path) -> None:
    """Copy the autoencoder's identity from one weights folder to another."""
    if (source / FILE).is_file():
        shutil.copy(source / FILE, destination / FILE)


def compare_latents(one: Origin, other: Origin, owner: str, other_owner: str) -> str:
    """Return a warning if two autoencoders differ, else an empty string. owner, other_owner: what each belongs to, for
    the message.

    Raises InputError if their latents cannot be mixed: another scaling factor, or another number of channels or pixels.
    """
    a, b = one.cfg, other.cfg
    for name in ("scaling_factor", "latent", "factor"):
        if getattr(a, name) != getattr(b, name):
            raise InputError(
                f"{owner} has latents of {one.source or 'an autoencoder'} with {name} {getattr(a, name):g},"
                f" {other_owner} of {other.source or 'an autoencoder'} with {getattr(b, name):g}: use the same"
                " autoencoder for both"
            )
    if not one.encoder or not other.encoder:
        unknown = other_owner if one.encoder else owner
        return (
            f"{unknown} does not say which autoencoder its latents are of; its scaling_factor, {a.scaling_factor:g},"
            " fits"
        )
    if one.encoder != other.encoder:
        return (
            f"{owner} has latents of {one}, {other_owner} of {other}: their encoders have other weights, and latents"
            " may not fit"
        )
    return ""
