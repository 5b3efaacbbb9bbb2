"""Sampling a class-conditional model: guidance, and all that time and label say computed before the loop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, isqrt
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from common.checkpoint.weights import staged
from common.diffusion import Prediction, Sampler, ddim, ddpm, dpm_solver, linear_schedule, respace
from common.errors import InputError
from common.nn.functional import Functional
from common.train.mesh import batch_sharding, replicated
from lit_jax.dit import DitConfig, Modulation
from lit_jax.losses import split

AHEAD = 2**30  # bytes: beyond this the modulations of all steps are computed step by step


@dataclass(frozen=True)
class SampleConfig:
    """How pictures are drawn."""

    sampler: Literal["ddpm", "ddim", "dpm"] = "ddpm"
    """Ancestral with the learned variance (the paper's numbers), DDIM, or DPM-Solver++(2M)."""
    steps: int = 250
    guidance: float = 1.0
    """Classifier-free guidance: 1 is none, 1.5 the paper's, 4 for pictures one likes to look at."""
    guided: Literal["all", "first three"] = "first three"
    """Channels of the noise that are guided; DiT's numbers guide three of four latent channels."""

    def make(self) -> Sampler:
        """Raises InputError for steps that the chain of 1000 cannot be cut to."""
        chain = linear_schedule()
        try:
            if self.sampler == "dpm":
                return dpm_solver(chain, self.steps)
            return ddpm(respace(chain, self.steps)) if self.sampler == "ddpm" else ddim(respace(chain, self.steps, "integer"))
        except ValueError as error:
            raise InputError(f"--steps {self.steps} with {self.sampler}: {error}") from error


@dataclass(frozen=True)
class Draw:
    """`draw(params, labels, key)`: pixels or scaled latents [n, size, size, channels] f32 for labels [n] int."""

    cfg: DitConfig
    how: SampleConfig
    mesh: Mesh
    jitted: Any

    def __call__(self, params: Mapping[str, Any], labels: np.ndarray | Sequence[int], key: jax.Array) -> jax.Array:
        """Raises InputError for a label that the model does not have."""
        labels, shards = np.asarray(labels, np.int32), self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        if len(wrong := labels[(labels < 0) | (labels > self.cfg.classes)]):
            raise InputError(f"no class {wrong[0]}: this model has 0 to {self.cfg.classes - 1}, and {self.cfg.classes} for none")
        unique, which = np.unique(labels, return_inverse=True)
        if self.how.guidance != 1:
            unique = np.append(unique, self.cfg.classes).astype(np.int32)
        which = np.pad(which, (0, -len(labels) % shards)).astype(np.int32)
        with jax.set_mesh(self.mesh):
            return self.jitted(params, unique, which, key)[: len(labels)]


def drawer(model: Functional, cfg: DitConfig, how: SampleConfig, mesh: Mesh) -> Draw:
    """Compile the sampler: one `lax.scan` over its steps."""
    sampler = how.make()
    times = jnp.asarray(sampler.time, jnp.float32)

    def draw(params: Mapping[str, Any], unique: jax.Array, which: jax.Array, key: jax.Array) -> jax.Array:
        n = len(which)
        modulations = partial(model.apply, params, method="modulations")
        size = len(sampler) * len(unique) * (6 * cfg.layers + 2) * cfg.width * 4
        ahead = None
        if size <= AHEAD:
            t, labels = (x.ravel() for x in jnp.meshgrid(times, unique, indexing="ij"))
            ahead = jax.tree.map(lambda x: x.reshape(*x.shape[:-2], len(sampler), len(unique), -1), modulations(t, labels))

        def denoise(x: jax.Array, i: jax.Array) -> Prediction:
            told = modulations(jnp.full(len(unique), times[i]), unique) if ahead is None else jax.tree.map(lambda x: x[..., i, :, :], ahead)

            def predict(rows: jax.Array) -> Prediction:
                return split(model.apply(params, x, Modulation(*(m[..., rows, :] for m in told)), method="denoise"))

            if how.guidance == 1:
                return predict(which)
            return guide(predict(which), predict(jnp.full(n, len(unique) - 1)), how)

        start, noise = jax.random.split(key)
        x = jax.lax.with_sharding_constraint(jax.random.normal(start, (n, cfg.size, cfg.size, cfg.channels)), batch_sharding(mesh))
        return sampler.run(denoise, x, noise)

    return Draw(cfg, how, mesh, jax.jit(draw, out_shardings=replicated(mesh)))


def guide(conditional: Prediction, free: Prediction, how: SampleConfig) -> Prediction:
    """Away from the unconditional noise, on the channels that are guided; the variance stays the conditional one."""
    guided = free.noise + how.guidance * (conditional.noise - free.noise)
    if how.guided == "first three":
        guided = jnp.concatenate([guided[..., :3], conditional.noise[..., 3:]], axis=-1)
    return Prediction(guided, conditional.ratio)


def grid(pictures: np.ndarray, columns: int | None = None) -> Image.Image:
    """uint8 [n, side, side, 3] as one picture, row by row; missing ones are white."""
    n, side = len(pictures), pictures.shape[1]
    columns = columns or isqrt(n - 1) + 1
    rows = ceil(n / columns)
    padded = np.concatenate([pictures, np.full((rows * columns - n, *pictures.shape[1:]), 255, np.uint8)])
    return Image.fromarray(padded.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3))


def save_grid(pictures: np.ndarray, path: Path, columns: int | None = None, least: int = 256) -> None:
    """Write a grid as PNG, small pictures enlarged to whole multiples of their pixels."""
    image = grid(pictures, columns)
    zoom = max(1, least // max(image.size))
    with staged(path, force=True) as file:
        image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(file, format="PNG")
