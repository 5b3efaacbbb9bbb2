"""Pretrained DiTs, LiTs and autoencoders for notebooks, and the verbs load and train."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from PIL import Image

from heirloom.common.checkpoint.convert import kept_provenance, open_donor
from heirloom.common.checkpoint.family import Donor, Family
from heirloom.common.checkpoint.pipeline import is_pipeline, main_part
from heirloom.common.errors import InputError, with_settings
from heirloom.common.mesh import start
from heirloom.common.methods import locate_any
from heirloom.common.notebook.model import Loaded
from heirloom.common.notebook.run import Trained
from heirloom.common.notebook.run import train as train_recipe
from heirloom.common.train.parameters import load_params
from lit_jax.autoencoder import AutoencoderConfig, scale_latents
from lit_jax.autoencoder_layouts import FAMILY as AUTOENCODERS
from lit_jax.components import find_components
from lit_jax.decode import PictureDecoder, autoencoder_example, picture_decoder, pictures_of
from lit_jax.dit import DitConfig
from lit_jax.formats import sidecars
from lit_jax.generate import BATCH, class_keys, default_sampling, draw_batches
from lit_jax.origin import Origin, read_origin, write_origin
from lit_jax.pixart import PixArtConfig
from lit_jax.sample import Draw, SampleConfig, check_whole, drawer
from lit_jax.text_to_image import Dtype, TextToImage, open_text_to_image
from lit_jax.zoo import FAMILIES, FAMILY


@dataclass(frozen=True, repr=False)
class Pretrained(Loaded):
    """A DiT or LiT with its decoder.

    params: the flat tree that `model.apply` takes. pictures: None for latents without an autoencoder. origin: the
    autoencoder whose latents the model draws, if known. donor: the checkpoint, whose sidecar files `save` copies.
    """

    cfg: DitConfig
    mesh: Mesh
    pictures: PictureDecoder | None
    origin: Origin | None
    donor: Donor | None = field(default=None, kw_only=True)
    _drawers: dict[SampleConfig, Draw] = field(default_factory=dict, repr=False)

    def sample(
        self, classes: int | Sequence[int], *, count: int = 1, seed: int = 0, batch: int = BATCH, **settings: Any
    ) -> np.ndarray:
        """Draw pictures, `count` of each class: uint8 [classes x count, height, width, 3]. settings: fields of
        `SampleConfig` (steps=50).

        A picture depends only on seed, class and its number within the class. Raises InputError for an unknown class or
        setting, for a picture that is not finite, and for latents without an autoencoder.
        """
        given = np.atleast_1d(np.asarray(classes))
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise InputError(f"classes is {str(classes)[:40]!r}: give the number of a class, or a list of numbers")
        labels = given.astype(int).tolist()
        sampling = with_settings(default_sampling(self.cfg), settings)
        check_whole("count", count)
        check_whole("batch", batch)
        if not labels:
            raise InputError("no class is given: give the number of a class, or a list of numbers")
        if self.pictures is None:
            example = autoencoder_example(self.cfg.channels, self.origin)
            raise InputError(f"this model outputs latents: decode them with load(SOURCE, autoencoder=...){example}")
        draw = self._drawers.setdefault(sampling, drawer(self.model, self.cfg, sampling, self.mesh))
        repeated, keys = np.repeat(labels, count), class_keys(seed, labels, count)
        draw.check(repeated)
        return np.concatenate(list(draw_batches(draw, self.params, self.pictures, repeated, keys, batch)))

    def draw(self, classes: int | Sequence[int], **options: Any) -> list[Image.Image]:
        """Draw pictures of classes as PIL images; the options are those of `sample`."""
        return [Image.fromarray(picture) for picture in self.sample(classes, **options)]

    @property
    def family(self) -> Family:
        return FAMILY

    def _sidecars(self, folder: Path) -> None:
        if self.donor is not None:
            sidecars(self.donor, folder, "heirloom")
        write_origin(folder, self.origin)

    def _about(self) -> dict[str, str]:
        c = self.cfg
        heads = f"{c.heads} heads of {c.attention} attention"
        return {
            "draws": f"{c.classes} classes, {c.size} x {c.size} x {c.channels}",
            "blocks": f"{c.layers} of width {c.width}, {heads}, patch {c.patch}",
        }


@dataclass(frozen=True, repr=False)
class PretrainedAutoencoder(Loaded):
    """An autoencoder that converts between pictures and the scaled latents of a diffusion model."""

    cfg: AutoencoderConfig
    pictures: PictureDecoder

    @property
    def family(self) -> Family:
        return AUTOENCODERS

    def encode(self, images: np.ndarray) -> jax.Array:
        """Encode pictures uint8 [n, height, width, 3]; returns the scaled means of their latents, [n, row, col, latent]
        f32.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise InputError(
                f"pictures must be uint8 [n, height, width, 3], these are {images.dtype} {list(images.shape)}"
            )
        return scale_latents(self.cfg, self._encode(self.params, images.astype(np.float32) / 127.5 - 1).mean)

    def decode(self, latents: ArrayLike) -> np.ndarray:
        """Decode scaled latents [n, row, col, latent]; returns pictures uint8 [n, height, width, 3]."""
        if np.ndim(latents) != 4 or np.shape(latents)[-1] != self.cfg.latent:
            raise InputError(f"latents must be [n, row, col, {self.cfg.latent}], these are {list(np.shape(latents))}")
        return self.pictures(jax.numpy.asarray(latents, jax.numpy.float32))

    @cached_property
    def _encode(self) -> Any:
        return jax.jit(partial(self.model.apply, method="encode"))


def load(
    source: str,
    autoencoder: str = "",
    *,
    pipeline: str = "",
    text_encoder: str = "",
    resident: bool = False,
    cache: str | Path | None = None,
    dtype: Dtype | None = None,
    **overrides: Any,
) -> Pretrained | PretrainedAutoencoder | TextToImage:
    """Load a DiT or LiT as a `Pretrained`, a text-to-image model as a `TextToImage`, an autoencoder as its own class.

    source: `hf:org/name/folder`, a folder, a run, a pipeline folder or a file of any format, `embedded:digits_dit`.
    autoencoder: SOURCE of the decoder of a latent model. pipeline: the pipeline folder with text encoder and decoder of
    a transformer alone; text_encoder: another T5. resident: keep the text encoder in memory, instead of reading it
    layer by layer. cache: a folder of encoded prompts. dtype: of a text-to-image transformer; the parameters of other
    models are f32. overrides: settings that a bare weights file lacks (`heads=6`); guesses are printed as notes. Raises
    InputError.
    """
    path = locate_any(str(source))
    path = main_part(path) if is_pipeline(path) else path
    donor: Donor = open_donor(path, FAMILIES, **overrides)
    mesh, origin = start(), read_origin(donor.folder)
    if isinstance(donor.cfg, PixArtConfig):
        components = find_components(donor, pipeline=pipeline, text=text_encoder, autoencoder=autoencoder)
        folder = None if cache is None else Path(cache)
        options: dict[str, Any] = dict(resident=resident, cache=folder, dtype=dtype, origin=origin)
        return open_text_to_image(donor, components, mesh, **options)
    if isinstance(donor.cfg, AutoencoderConfig):
        params = load_params(donor, mesh)
        decoder = picture_decoder(donor.cfg, donor.model, params)
        about: dict[str, Any] = dict(pictures=decoder, source=str(source), loaded_from=kept_provenance(donor))
        return PretrainedAutoencoder(cfg=donor.cfg, model=donor.model, params=params, **about)
    if not isinstance(donor.cfg, DitConfig):
        raise InputError(f"{path} is a text encoder, which draws nothing: load the transformer or the pipeline folder")
    pictures = pictures_of(donor, autoencoder, mesh)
    params = load_params(donor, mesh)
    about = dict(mesh=mesh, pictures=pictures, origin=origin, source=str(source), donor=donor)
    about |= dict(loaded_from=kept_provenance(donor))
    return Pretrained(cfg=donor.cfg, model=donor.model, params=params, **about)


def train(recipe: Any, run: str | os.PathLike[str] | None = None, **fields: Any) -> Trained[Any]:
    """Train a recipe in a run folder, or resume it there: train("lit/digits", steps=100).

    recipe: its name, a Python file, or a config. run: the folder; None: a new one in `runs`. fields: of the config,
    nested ones as dictionaries: optim={"lr": 3e-4}. Returns the run, with `metrics`, `plot()` and `model`. Raises
    InputError for bad input.
    """
    return train_recipe(recipe, run, fields, "lit_jax", load)
