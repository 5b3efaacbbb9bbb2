"""Latents computed once: the moments of every picture and of its mirror image, which each epoch draws from anew."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from common.checkpoint.weights import read_json, staged, write_json
from common.data.images import Preprocess
from common.data.pipeline import evaluation_batches
from common.data.sources import Source
from common.errors import InputError
from common.evaluate.features import embedder
from common.nn.functional import Functional
from lit_jax.autoencoder import AutoencoderConfig, Moments, sample_latents
from lit_jax.autoencoder_layouts import config

CONFIG = "autoencoder.json"


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
) -> None:
    """Encode the pictures of `source`, their central squares at `size` pixels, into a folder that `open_source` reads by index.

    Its arrays are `moments`, [n, 2, row, col, 2 latent]: of the picture and of its mirror image, mean before logvar, not scaled;
    and each column of numbers (`label`) under its own name. The folder gets its name when it is complete.
    Raises InputError for a picture that does not decode, a moment that `dtype` cannot hold, and where `path` exists already.
    """
    pre = Preprocess(size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    def encode(params: Mapping[str, Any], images: jax.Array) -> jax.Array:
        views = jnp.stack([images, images[:, :, ::-1]])
        moments = jax.lax.map(lambda x: jnp.concatenate(model.apply(params, x, method="encode"), -1), views)
        return jnp.moveaxis(moments, 0, 1).astype(dtype)

    embed = embedder(encode, mesh, batch)
    with staged(path, force=force) as folder:
        folder.mkdir()
        arrays: dict[str, np.memmap] = {}
        done = 0
        for examples in evaluation_batches(source, batch, pre):
            if "image" not in examples:
                raise InputError("these records have no pictures to encode: name their column with image")
            columns = {name: value for name, value in examples.items() if name != "image" and value.dtype.kind in "iuf"}
            columns["moments"] = embed(params, examples["image"])
            if not np.isfinite(columns["moments"]).all():
                raise InputError(f"a picture among {done} to {done + len(columns['moments'])} has moments that {dtype} cannot hold")
            for name, value in columns.items():
                if name not in arrays:
                    shape = (len(source), *value.shape[1:])
                    arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", value.dtype, shape)
                arrays[name][done : done + len(value)] = value
            done += len(columns["moments"])
        for array in arrays.values():
            array.flush()
        write_json(folder / CONFIG, asdict(cfg))
        pre.save(folder)


def cached_config(path: Path) -> AutoencoderConfig:
    """The autoencoder a cache was made with: its scaling factor goes with the latents."""
    return config(read_json(path / CONFIG))


def sample_cached(cfg: AutoencoderConfig, moments: jax.Array, key: jax.Array) -> jax.Array:
    """Scaled latents [batch, row, col, latent] f32 from moments as `cache_latents` keeps them, mirrored every second time."""
    mirror, noise = jax.random.split(key)
    view = jax.random.bernoulli(mirror, shape=(len(moments),)).astype(jnp.int32)
    drawn = jnp.take_along_axis(moments, view[:, None, None, None, None], axis=1)[:, 0]
    mean, logvar = jnp.split(drawn, 2, axis=-1)
    return sample_latents(cfg, Moments(mean, logvar), noise)
