"""Latents computed once: the moments of every picture and of its mirror image, which each epoch draws from anew."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.progress import track

from heirloom.common.checkpoint.staging import staged
from heirloom.common.data.sources import Source
from heirloom.common.errors import InputError
from heirloom.common.evaluate.features import embedder
from heirloom.common.nn.functional import Functional
from lit_jax.autoencoder import AutoencoderConfig, Moments, sample_latents
from lit_jax.data import cropped
from lit_jax.origin import FILE, Origin, read_origin, write_origin


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
    dtype: Literal["float16", "float32"] = "float16",
    force: bool = False,
    origin: Origin | None = None,
) -> None:
    """Encode the pictures of `source`, cropped as in training (`adm_crop`), into a folder that `open_source` reads by index.

    origin: the identity of the autoencoder, which the cache keeps; None: of `cfg`, without a name.
    Its arrays are `moments`, [n, 2, row, col, 2 latent]: of the picture and of its mirror image, mean before logvar, not scaled;
    and `label`, int32, where the records have one. The folder gets its name when it is complete.
    Raises InputError for a picture that does not decode, a moment that `dtype` cannot hold, and where `path` exists already.
    """

    def encode(params: Mapping[str, Any], images: jax.Array) -> jax.Array:
        images = images.astype(jnp.float32) / 127.5 - 1
        views = jnp.stack([images, images[:, :, ::-1]])
        moments = jax.lax.map(lambda x: jnp.concatenate(model.apply(params, x, method="encode"), -1), views)
        return jnp.moveaxis(moments, 0, 1).astype(dtype)

    if "image" not in source[0]:
        raise InputError("these records have no pictures to encode: name their column with image")
    embed = embedder(encode, mesh, batch)
    with staged(path, force=force) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder.mkdir()
        arrays: dict[str, np.memmap] = {}
        for start in track(range(0, len(source), batch), description="encoding"):
            records = [source[i] for i in range(start, min(start + batch, len(source)))]
            columns = {"moments": embed(params, np.stack(list(pool.map(partial(cropped, size=size), records))))}
            if not np.isfinite(columns["moments"]).all():
                raise InputError(f"a picture among {start} to {start + len(records)} has moments that {dtype} cannot hold")
            if "label" in records[0]:
                columns["label"] = np.array([record["label"] for record in records], np.int32)
            for name, value in columns.items():
                if name not in arrays:
                    shape = (len(source), *value.shape[1:])
                    arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", value.dtype, shape)
                arrays[name][start : start + len(value)] = value
        for array in arrays.values():
            array.flush()
        write_origin(folder, origin or Origin(cfg))


def cached_origin(path: Path) -> Origin:
    """The autoencoder a cache was made with: its scaling factor goes with the latents. Raises InputError where it is not there."""
    origin = read_origin(path)
    if origin is None:
        raise InputError(f"{path} holds latents without {FILE}, so their scaling factor is not known: make the cache again")
    return origin


def sample_cached(cfg: AutoencoderConfig, moments: jax.Array, key: jax.Array) -> jax.Array:
    """Scaled latents [batch, row, col, latent] f32 from moments as `cache_latents` keeps them, mirrored every second time."""
    mirror, noise = jax.random.split(key)
    view = jax.random.bernoulli(mirror, shape=(len(moments),)).astype(jnp.int32)
    drawn = jnp.take_along_axis(moments, view[:, None, None, None, None], axis=1)[:, 0]
    mean, logvar = jnp.split(drawn, 2, axis=-1)
    return sample_latents(cfg, Moments(mean, logvar), noise)
