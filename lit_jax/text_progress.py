"""Evaluation of a text-to-image training: the error on held-out data, and pictures of prompts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from heirloom.common.diffusion import add_noise, linear_schedule
from heirloom.common.evaluate.scored import Score, Scored
from heirloom.common.mesh import split_rows
from heirloom.common.nn.moments import Moments
from heirloom.common.train.parts import Model
from lit_jax.autoencoder import sample_latents
from lit_jax.decode import PictureDecoder
from lit_jax.denoiser import Condition, Denoiser, PromptConfig, unconditional
from lit_jax.progress import noise_errors, save_samples
from lit_jax.sample import picture_keys
from lit_jax.text.encoder import TextEncoder, TowerEncoder
from lit_jax.text_cache import TextCache, TextExample

HELD_OUT, BATCH = 512, 64  # pictures in the held-out error, and how many at a time


def held_out_error(student: Model, data: TextCache, mesh: Mesh) -> Score:
    """Make the held-out score: squared error of the noise, averaged over evenly spread times and over pictures.

    Of each picture the first caption is read. Noise and times are always the same. Besides `mse` it tells
    `mse_swapped`, the error with captions of other pictures: a model that reads its text has a higher one.
    """
    rng, schedule, example = np.random.default_rng(0), linear_schedule(), _first_caption(data)
    where = rng.permutation(len(data))[:HELD_OUT]
    times = rng.permutation(len(where)) * len(schedule) // len(where)
    parts: list[list[np.ndarray]] = []
    for group in range(len(data.sizes)):
        members = np.flatnonzero(data.groups[where] == group)
        for first in range(0, len(members), BATCH):
            rows = members[first : first + BATCH]
            examples = [example(data[int(i)], rng) for i in where[rows]]
            batch = {name: np.stack([x[name] for x in examples]) for name in examples[0]}
            mean, logvar = np.split(batch["moments"], 2, axis=-1)
            moments = Moments(jnp.asarray(mean), jnp.asarray(logvar))
            keys = jax.random.split(jax.random.fold_in(jax.random.key(0), len(parts)))
            clean = sample_latents(data.encoding.autoencoder, moments, keys[0])
            noise, step = jax.random.normal(keys[1], clean.shape), jnp.asarray(times[rows], jnp.int32)
            mask = np.arange(batch["text"].shape[1]) < batch["length"][:, None]
            columns = add_noise(schedule, clean, step, noise), step, noise, batch["text"].astype(np.float32), mask
            parts.append([np.asarray(column) for column in columns])

    errors = noise_errors(student, mesh)

    def error(params: Mapping[str, Any], parts: list[list[np.ndarray]]) -> float:
        with jax.set_mesh(mesh):
            found = [
                np.asarray(errors(params, *(split_rows(_filled(x), mesh) for x in part)))[: len(part[0])]
                for part in parts
            ]
        return float(np.concatenate(found).mean())

    swapped = [_swapped(part, parts[i - 1]) for i, part in enumerate(parts)]

    def score(params: Mapping[str, Any]) -> Scored:
        metrics = {"mse": error(params, parts), "mse_swapped": error(params, swapped)}
        return Scored(dataset=str(data.folder), n=len(where), metrics=metrics)

    return score


def _first_caption(data: TextCache) -> Callable[..., dict[str, Any]]:
    example = TextExample(data.about["tokens"], (1.0,) * len(data.columns))

    def first(record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        column = next(column for column in record["text"] if column)
        return example(record | {"text": [column[:1]] + [[]] * (len(data.columns) - 1)}, rng)

    return first


def _swapped(part: list[np.ndarray], other: list[np.ndarray]) -> list[np.ndarray]:
    """Gives every picture the text of the one half the rows away; a single one the first text of another part."""
    noisy, step, noise, text, mask = part
    if len(noisy) == 1:
        text, mask = other[3][:1], other[4][:1]
    half = max(1, len(noisy) // 2)
    return [noisy, step, noise, np.roll(text, half, 0), np.roll(mask, half, 0)]


def _filled(rows: np.ndarray) -> np.ndarray:
    """Repeat the last row up to BATCH, so that a size is compiled once."""
    return rows[np.minimum(np.arange(BATCH), len(rows) - 1)]


Drawer = Callable[[Mapping[str, Any]], np.ndarray]


def prompt_drawer(
    denoiser: Denoiser,
    text: TextEncoder | TowerEncoder,
    pictures: PictureDecoder,
    sampling: PromptConfig,
    prompts: Sequence[str],
    seed: int,
) -> Drawer:
    """Make `(params)`, which draws a square picture of each prompt, uint8 [prompt, height, width, 3].

    Every call begins with the same noise, which depends on the seed and on the number of the prompt.
    """
    found = text.encode([*(sampling.text(prompt) for prompt in prompts), ""], padding=[""])
    texts = Condition(found.features[:-1], found.mask[:-1])
    null = unconditional(texts, Condition(found.features[-1:], found.mask[-1:]), sampling.null)
    keys, c = picture_keys(jax.random.key(seed), np.arange(len(prompts))), denoiser.cfg
    noise = jax.vmap(lambda key: jax.random.normal(key, (c.size, c.size, c.channels)))(keys)

    def draw(params: Mapping[str, Any]) -> np.ndarray:
        drawn = []
        for first in range(0, len(prompts), BATCH):
            rows = np.minimum(np.arange(first, first + min(BATCH, len(prompts))), len(prompts) - 1)
            unguided = None if sampling.guidance == 1 else null.rows(rows)
            samples = denoiser(params, noise[rows], keys[rows], texts.rows(rows), unguided, sampling)
            drawn.append(pictures(samples[: len(prompts) - first], first=first))
        return np.concatenate(drawn)

    return draw


def grids(draw: Drawer) -> Callable[[Mapping[str, Any], int, Path], None]:
    """Make `(params, step, run folder)`, which saves what `draw` draws."""

    def write(params: Mapping[str, Any], step: int, directory: Path) -> None:
        save_samples(draw(params), step, directory)

    return write
