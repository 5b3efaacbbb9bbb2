"""Turns samples of a model into pictures: clips pixels, or decodes latents."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.checkpoint.family import Donor
from heirloom.common.checkpoint.pipeline import plain_weights
from heirloom.common.errors import InputError, remark
from heirloom.common.methods import locate_any
from heirloom.common.nn.functional import Functional
from heirloom.common.train.parameters import load_params
from lit_jax import autoencoder_layouts
from lit_jax.autoencoder import AutoencoderConfig, unscale_latents
from lit_jax.components import SD_SCALE, is_foreign, other_scale, pipeline_of
from lit_jax.dit import DitConfig
from lit_jax.origin import Origin, autoencoder_origin, compare_latents, read_origin
from lit_jax.pixart import PixArtConfig
from lit_jax.tiles import decode_tiled

MOST, OVERLAP = 80, 16  # latent positions of a tile: 640 px, for which the published decoder needs 1.5 GB in float32


@dataclass(frozen=True)
class PictureDecoder:
    """`decoder(samples)` returns pictures, uint8 [n, height, width, 3].

    decode: from samples [n, row, col, channel] to pixels in [-1, 1]. factor: pixels along the side of one position of a
    sample. file: the weights of the autoencoder, if known.
    """

    decode: Callable[[jax.Array], ArrayLike]
    factor: int = 1
    file: Path | None = None

    def __call__(self, samples: jax.Array, first: int = 0, where: str = "") -> np.ndarray:
        """Decode. first: number of the first picture; where: start of the error message. Raises InputError for NaN and
        infinity.
        """
        check_finite(samples, "the model's output", first, where)
        return to_uint8(check_finite(self.decode(samples), "the decoder's output", first, where))


def check_finite(values: ArrayLike, what: str, first: int = 0, where: str = "") -> np.ndarray:
    """Return the values [n, ...] on the host. Raises InputError for NaN or infinity, which would become black; it names
    the picture.
    """
    values = np.asarray(values)
    if len(wrong := np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))):
        raise InputError(
            f"{where}picture {first + wrong[0]}: {what} is not finite (NaN or infinity); "
            "the weights are damaged, or the guidance is far too high"
        )
    return values


def to_uint8(pixels: ArrayLike) -> np.ndarray:
    """Convert [-1, 1] to 0..255 as DiT's script does: truncated, not rounded."""
    return np.clip(127.5 * np.asarray(pixels) + 128, 0, 255).astype(np.uint8)


def open_pictures(
    cfg: DitConfig | PixArtConfig, source: str, mesh: Mesh, made_with: Origin | None = None
) -> PictureDecoder | None:
    """Open the decoder of this model's samples; None for latents without an autoencoder.

    made_with: the autoencoder whose latents the model was trained on, if known; a difference to the decoder is printed
    as a note. Raises InputError for a source that is no autoencoder, or whose latents do not fit.
    """
    if not source:
        return PictureDecoder(lambda samples: samples) if cfg.channels == 3 and made_with is None else None
    donor = open_donor(locate_any(source), [autoencoder_layouts.FAMILY])
    if donor.cfg.latent != cfg.channels:
        raise InputError(
            f"{source} has latents of {donor.cfg.latent} channels, the model {cfg.channels}: name the model's"
            " autoencoder"
        )
    if made_with:
        remark(compare_latents(made_with, autoencoder_origin(donor, source), "the model", f"the autoencoder {source}"))
    return replace(picture_decoder(donor.cfg, donor.model, load_params(donor, mesh)), file=donor.file)


def pictures_of(donor: Donor, source: str, mesh: Mesh) -> PictureDecoder | None:
    """Open the decoder of a checkpoint's samples: `source`, or else the autoencoder of the pipeline that it lies in."""
    root = pipeline_of(donor)
    origin = read_origin(donor.folder)
    if source and origin is None:
        named = open_donor(locate_any(source), [autoencoder_layouts.FAMILY])
        remark(other_scale(donor, named.cfg.scaling_factor, source))
    elif not source and root is not None and (root / "vae").is_dir():
        source = str(plain_weights(root / "vae"))
    if not source and donor.cfg.channels == 3 and origin is None and is_foreign(donor):
        remark(f"{donor.path}: its 3 channels are taken for pixels; if they are latents, name their autoencoder")
    return open_pictures(donor.cfg, source, mesh, origin)


def no_pictures(donor: Donor) -> InputError:
    """Returns the error for a model whose samples are no pictures without an autoencoder."""
    if donor.cfg.channels < 3 and read_origin(donor.folder) is None:  # MNIST's, say
        what = f"outputs {donor.cfg.channels} channel{'s' if donor.cfg.channels > 1 else ''}, and pictures have 3"
        return InputError(f"{donor.path} {what}: if these are latents, decode them with --autoencoder SOURCE")
    example = autoencoder_example(donor.cfg.channels, read_origin(donor.folder))
    return InputError(f"this model outputs latents: decode them with --autoencoder SOURCE{example}")


def autoencoder_example(channels: int, origin: Origin | None) -> str:
    """Returns `, such as SOURCE` with the autoencoder that a model was trained with, or else that of published DiTs;
    empty for latents of another kind.
    """
    if origin is not None and origin.source:
        return f", such as {origin.source}"
    published = channels == 4 and (origin is None or origin.cfg.scaling_factor == SD_SCALE)
    return ", such as hf:stabilityai/sd-vae-ft-ema" if published else ""


def picture_decoder(cfg: AutoencoderConfig, model: Functional, params: Mapping[str, Any]) -> PictureDecoder:
    """Make the decoder of scaled latents [n, row, col, latent] from an autoencoder."""
    tiled = jax.jit(partial(decode_tiled, model), static_argnames=("tile", "overlap"))

    def decode(samples: jax.Array) -> np.ndarray:
        tile = tile_side(max(samples.shape[1:3]))
        # One by one: the decoder needs far more memory than the transformer.
        pictures = (tiled(params, unscale_latents(cfg, x[None]), tile=tile, overlap=OVERLAP) for x in samples)
        return np.concatenate([np.asarray(picture) for picture in pictures])

    return PictureDecoder(decode, cfg.factor)


def tile_side(length: int) -> int:
    """Returns the side of the tiles for latents of this longest side: the smallest for the fewest tiles up to MOST."""
    if length <= MOST:
        return MOST
    count = -(-(length - OVERLAP) // (MOST - OVERLAP))
    return -(-(length + (count - 1) * OVERLAP) // count)
