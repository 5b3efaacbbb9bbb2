"""From what a model draws to pictures: clipped pixels, or latents through a decoder."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from common.checkpoint.convert import open_donor
from common.checkpoint.hub import locate
from common.errors import InputError
from common.train.parameters import load_params
from lit_jax import autoencoder_layouts
from lit_jax.autoencoder import unscale_latents
from lit_jax.dit import DitConfig
from lit_jax.tiles import decode_tiled

TILE, OVERLAP = 64, 16  # latent positions: pictures up to 512 px are decoded whole


@dataclass(frozen=True)
class Pictures:
    """`pictures(drawn)`: uint8 [n, height, width, 3]."""

    decode: Callable[[Any], Any]

    def __call__(self, drawn: jax.Array) -> np.ndarray:
        return self.to_uint8(self.decode(drawn))

    @staticmethod
    def to_uint8(pixels: Any) -> np.ndarray:
        """[-1, 1] to 0..255 as DiT's script does: truncated, not rounded."""
        return np.clip(127.5 * np.asarray(pixels) + 128, 0, 255).astype(np.uint8)


def open_pictures(cfg: DitConfig, source: str, mesh: Mesh) -> Pictures | None:
    """The way from this model's samples to pictures; None for latents without a decoder.

    Raises InputError for a source that is no autoencoder, or has other latents.
    """
    if not source:
        return Pictures(lambda drawn: drawn) if cfg.channels == 3 else None
    donor = open_donor(locate(source), [autoencoder_layouts.FAMILY])
    if donor.cfg.latent != cfg.channels:
        raise InputError(f"{source} has latents of {donor.cfg.latent} channels, the model {cfg.channels}: name its own autoencoder")
    tiled = jax.jit(partial(decode_tiled, donor.model, tile=TILE, overlap=OVERLAP))
    params = load_params(donor, mesh)

    def decode(drawn: jax.Array) -> np.ndarray:
        # One by one: the decoder needs far more memory than the transformer.
        return np.concatenate([np.asarray(tiled(params, unscale_latents(donor.cfg, x[None]))) for x in drawn])

    return Pictures(decode)
