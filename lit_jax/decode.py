"""From what a model draws to pictures: clipped pixels, or latents through a decoder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.checkpoint.hub import locate
from heirloom.common.errors import InputError, remark
from heirloom.common.nn.functional import Functional
from heirloom.common.train.parameters import load_params
from lit_jax import autoencoder_layouts
from lit_jax.autoencoder import AutoencoderConfig, unscale_latents
from lit_jax.dit import DitConfig
from lit_jax.origin import Origin, origin_of, same_latents
from lit_jax.tiles import decode_tiled

TILE, OVERLAP = 64, 16  # latent positions: pictures up to 512 px are decoded whole


@dataclass(frozen=True)
class Pictures:
    """`pictures(drawn)`: uint8 [n, height, width, 3]. factor: pixels along the side of one position of what is drawn."""

    decode: Callable[[Any], Any]
    factor: int = 1

    def __call__(self, drawn: jax.Array, first: int = 0, where: str = "") -> np.ndarray:
        """first: number of the first picture, where: what they are of, for the message. Raises InputError for NaN and infinity."""
        finite(drawn, "the model's output", first, where)
        return to_uint8(finite(self.decode(drawn), "the decoder's output", first, where))


def finite(values: Any, what: str, first: int = 0, where: str = "") -> np.ndarray:
    """The values [n, ...] on the host. Raises InputError naming the first of n that holds a number that is none: it would turn black."""
    values = np.asarray(values)
    if len(wrong := np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))):
        raise InputError(
            f"{where}picture {first + wrong[0]}: {what} is not finite (NaN or infinity); "
            "the weights are damaged, or the guidance is far too high"
        )
    return values


def to_uint8(pixels: Any) -> np.ndarray:
    """[-1, 1] to 0..255 as DiT's script does: truncated, not rounded."""
    return np.clip(127.5 * np.asarray(pixels) + 128, 0, 255).astype(np.uint8)


def open_pictures(cfg: DitConfig, source: str, mesh: Mesh, made_with: Origin | None = None) -> Pictures | None:
    """The way from this model's samples to pictures; None for latents without a decoder.

    made_with: the autoencoder that the model's latents are of, where that is known; what differs in the decoder is printed.
    Raises InputError for a source that is no autoencoder, or has other latents.
    """
    if not source:
        return Pictures(lambda drawn: drawn) if cfg.channels == 3 and made_with is None else None
    donor = open_donor(locate(source), [autoencoder_layouts.FAMILY])
    if donor.cfg.latent != cfg.channels:
        raise InputError(f"{source} has latents of {donor.cfg.latent} channels, the model {cfg.channels}: name its own autoencoder")
    if made_with:
        remark(same_latents(made_with, origin_of(donor, source), "the model", f"the autoencoder {source}"))
    return decoded(donor.cfg, donor.model, load_params(donor, mesh))


def decoded(cfg: AutoencoderConfig, model: Functional, params: Mapping[str, Any]) -> Pictures:
    """Scaled latents [n, row, col, latent] to pictures, by this autoencoder."""
    tiled = jax.jit(partial(decode_tiled, model, tile=TILE, overlap=OVERLAP))

    def decode(drawn: jax.Array) -> np.ndarray:
        # One by one: the decoder needs far more memory than the transformer.
        return np.concatenate([np.asarray(tiled(params, unscale_latents(cfg, x[None]))) for x in drawn])

    return Pictures(decode, cfg.factor)


