"""Caches latents: the moments of every picture and of its mirror image. Each epoch draws new latents from them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.progress import track

from heirloom.common.checkpoint.family import Donor
from heirloom.common.data.caches import new_cache, write_columns
from heirloom.common.data.sources import Record, Source, SourceConfig
from heirloom.common.errors import InputError, remark
from heirloom.common.evaluate.features import embedder
from heirloom.common.nn.functional import Functional
from heirloom.common.paths import AnyPath, place
from lit_jax.autoencoder import AutoencoderConfig, Moments, sample_latents
from lit_jax.components import other_scale, write_names
from lit_jax.data import cropped, is_latent
from lit_jax.origin import FILE, Origin, compare_latents, read_origin, write_origin


def cache_latents(
    cfg: AutoencoderConfig,
    model: Functional,
    params: Mapping[str, Any],
    source: Source,
    path: Path,
    mesh: Mesh,
    *,
    size: int = 256,
    batch: int = 16,
    origin: Origin | None = None,
    force: bool = False,
) -> None:
    """Encode the pictures of `source`, cropped as in training (`adm_crop`), into a folder that `open_source` reads by
    index.

    origin: the identity of the autoencoder, which is saved with the cache; None: only `cfg` is saved. The arrays are
    `moments`, [n, 2, row, col, 2 latent]: of the picture and of its mirror image, mean before logvar, not scaled; and
    `label`, int32, if the records have one. labels.json has the class names of the source, if known. The folder is
    renamed to `path` when it is complete. Raises InputError for a picture that does not decode, a moment that float16
    cannot hold, in a job of several processes, and if `path` exists already (unless forced).
    """

    def encode(params: Mapping[str, Any], images: jax.Array) -> jax.Array:
        images = images.astype(jnp.float32) / 127.5 - 1
        views = jnp.stack([images, images[:, :, ::-1]])
        moments = jax.lax.map(lambda x: jnp.concatenate(model.apply(params, x, method="encode"), -1), views)
        return jnp.moveaxis(moments, 0, 1).astype(jnp.float16)

    if "image" not in source[0]:
        raise InputError("these records have no pictures to encode: name their column with image")
    embed = embedder(encode, mesh, batch)
    with new_cache(path, force=force) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def parts() -> Iterator[dict[str, np.ndarray]]:
            for start in track(range(0, len(source), batch), description="encoding"):
                records = [source[i] for i in range(start, min(start + batch, len(source)))]
                moments = embed(params, np.stack(list(pool.map(partial(cropped, size=size), records))))
                columns = {"moments": held(moments, records)}
                if "label" in records[0]:
                    columns["label"] = np.array([record["label"] for record in records], np.int32)
                yield columns

        write_columns(folder, len(source), parts())
        write_origin(folder, origin or Origin(cfg))
        write_names(folder, getattr(source, "classes", ()))


def held(moments: np.ndarray, records: Sequence[Record]) -> np.ndarray:
    """Return moments in float16. Raises InputError with the key of the first record whose moments it cannot hold."""
    whole = np.isfinite(moments).reshape(len(moments), -1).all(1)
    if not whole.all():
        raise InputError(f"{records[whole.argmin()]['key']} has moments that float16 cannot hold")
    return moments


def cache_origin(path: AnyPath) -> Origin:
    """Read which autoencoder a cache was made with, and its scaling factor. Raises InputError if the file is
    missing.
    """
    origin = read_origin(path)
    if origin is None:
        raise InputError(
            f"{path} holds latents without {FILE}, so their scaling factor is not known: make the cache again"
        )
    return origin


def data_origin(data: SourceConfig, held_out: SourceConfig, *models: Donor | None) -> Origin | None:
    """Find the autoencoder whose latents `data` holds; None for pictures. Raises InputError if held-out data or a model
    has others.
    """
    origin = cache_origin(place(data.path)) if is_latent(data) else None
    if origin is None:
        return None
    if not origin.encoder:
        remark(
            f"{data.path}: a cache of an earlier version, which does not say which autoencoder made it; {origin} is"
            " assumed to fit"
        )
    others = {held_out.path: place(held_out.path)} if is_latent(held_out) else {}
    others |= {str(model.path): model.folder for model in models if model}
    for name, folder in others.items():
        if other := read_origin(folder):
            remark(compare_latents(origin, other, data.path, name))
    for model in models:
        remark(other_scale(model, origin.cfg.scaling_factor, data.path) if model else "")
    return origin


def sample_cached(cfg: AutoencoderConfig, moments: jax.Array, key: jax.Array, flips: float = 0.5) -> jax.Array:
    """Draw scaled latents [batch, row, col, latent] f32 from cached moments [batch, 2, row, col, 2 latent]; a share of
    `flips` is mirrored.
    """
    mirror, noise = jax.random.split(key)
    view = jax.random.bernoulli(mirror, flips, (len(moments),)).astype(jnp.int32)
    drawn = jnp.take_along_axis(moments, view[:, None, None, None, None], axis=1)[:, 0]
    mean, logvar = jnp.split(drawn, 2, axis=-1)
    return sample_latents(cfg, Moments(mean, logvar), noise)
