"""Evaluation during training: the loss on held-out data, and grids of samples."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from heirloom.common.data.class_names import Names
from heirloom.common.data.grid import save_grid
from heirloom.common.data.labelled import open_labelled
from heirloom.common.diffusion import add_noise, linear_schedule
from heirloom.common.errors import InputError
from heirloom.common.evaluate.scored import Score, Scored
from heirloom.common.mesh import replicated, split_rows
from heirloom.common.paths import place
from heirloom.common.train.parts import Model
from lit_jax.data import Pixels, check_latent, is_latent, latents
from lit_jax.decode import PictureDecoder
from lit_jax.latents import cache_origin, sample_cached
from lit_jax.losses import split
from lit_jax.sample import drawer

if TYPE_CHECKING:
    from lit_jax.train import Config

HELD_OUT, BATCH = 512, 128  # pictures in the held-out loss, and how many at a time


def held_out_loss(cfg: "Config", student: Model, mesh: Mesh, names: Names = ()) -> Score:
    """Make the held-out score: squared error of the noise, averaged over evenly spread times. Noise and times are
    always the same. names: of the classes, in the order of the training data; empty: unknown.

    Raises InputError for held-out data that is not like the student's.
    """
    check_latent(cfg.held_out)
    source, schedule = open_labelled(cfg.held_out, cfg.label, cfg.student.classes, names or None), linear_schedule()
    cached = cache_origin(place(cfg.held_out.path)).cfg if is_latent(cfg.held_out) else None
    example, rng = latents if cached else Pixels(cfg.student.size, flips=0.0), np.random.default_rng(0)
    examples = [example(source[int(i)], rng) for i in rng.permutation(len(source))[:HELD_OUT]]
    batch = {name: np.stack([x[name] for x in examples]) for name in examples[0]}
    n = len(examples)
    clean = (
        sample_cached(cached, jnp.asarray(batch["moments"]), jax.random.key(0), flips=0.0)
        if cached
        else jnp.asarray(batch["image"])
    )
    c = cfg.student
    if (given := clean.shape[1:]) != (c.size, c.size, c.channels):
        takes = f"the student takes {[c.size, c.size, c.channels]}"
        held_out = f"{cfg.held_out.path}: the held-out data is {list(given)}"
        raise InputError(f"{held_out}, {takes}: give data like the training's")
    step = jnp.asarray(rng.permutation(n) * len(schedule) // n, jnp.int32)
    noise = jax.random.normal(jax.random.key(1), clean.shape)
    noisy = add_noise(schedule, clean, step, noise)

    errors, columns = noise_errors(student, mesh), [np.asarray(x) for x in (noisy, step, noise, batch["label"])]

    def score(params: Mapping[str, Any]) -> Scored:
        with jax.set_mesh(mesh):
            parts = [[x[i : i + BATCH] for x in columns] for i in range(0, n, BATCH)]
            rows = [np.asarray(errors(params, *(split_rows(x, mesh) for x in part)))[: len(part[0])] for part in parts]
        return Scored(dataset=cfg.held_out.path, n=n, metrics={"mse": float(np.concatenate(rows).mean())})

    return score


def noise_errors(model: Model, mesh: Mesh) -> Callable[..., jax.Array]:
    """Compile `(params, noisy, step, noise, *condition) -> [row]`: mean squared error of each row's predicted noise."""

    @partial(jax.jit, out_shardings=replicated(mesh))
    def errors(
        params: Mapping[str, Any], noisy: jax.Array, step: jax.Array, noise: jax.Array, *condition: jax.Array
    ) -> jax.Array:
        return jnp.square(split(model.apply(params, noisy, step, *condition)).noise - noise).mean((1, 2, 3))

    return errors


def save_samples(pictures: np.ndarray, step: int, directory: Path) -> None:
    """Save a grid of pictures as samples/STEP.png of the run folder, in the first process."""
    if jax.process_index() == 0:
        folder = directory / "samples"
        folder.mkdir(exist_ok=True)
        save_grid(pictures, folder / f"{step:07d}.png")


def grids(
    cfg: "Config", model: Model, pictures: PictureDecoder, mesh: Mesh
) -> Callable[[Mapping[str, Any], int, Path], None]:
    """Make `(params, step, run folder)`, which writes a grid of samples drawn from the same noise every time."""
    draw, labels = drawer(model, cfg.student, cfg.sample, mesh), np.arange(cfg.samples) % cfg.student.classes

    def write(params: Mapping[str, Any], step: int, directory: Path) -> None:
        samples = pictures(draw(params, labels, jax.random.key(cfg.seed)), where=f"samples at step {step}: ")
        save_samples(samples, step, directory)

    return write
