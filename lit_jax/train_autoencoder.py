"""Trains an autoencoder of pictures (Rombach et al. 2022, without its perceptual and adversarial losses): for pictures
that no public autoencoder fits, such as icons of 64 pixels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from heirloom.common.data.bad import BadMode, Examples, first_good
from heirloom.common.data.grid import save_grid
from heirloom.common.data.pipeline import PipelineConfig, training_batches
from heirloom.common.data.sources import Source, SourceConfig, open_source
from heirloom.common.errors import InputError, between
from heirloom.common.evaluate.features import embedder
from heirloom.common.evaluate.scored import Scored
from heirloom.common.nn.functional import functional
from heirloom.common.train.optim import OptimConfig
from heirloom.common.train.parts import Evaluator, Model, Opened, Parts, Shapes, Teacher
from heirloom.common.train.recipe import RunConfig
from heirloom.common.train.step import Batch, LossFn, LossOutput, Params
from lit_jax.autoencoder import Autoencoder, AutoencoderConfig
from lit_jax.autoencoder_layouts import FAMILY
from lit_jax.data import Pixels
from lit_jax.decode import to_uint8
from lit_jax.progress import save_samples

HELD_OUT, SHOWN, BATCH = 512, 32, 32  # pictures that are scored, that the grid shows, and at a time


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Configures a training run of an autoencoder from scratch."""

    student: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    kl: float = 1e-6
    """Weight of the KL divergence of the latents from N(0, 1), in nats of a whole picture, next to the mean error of a
    value. LDM has 1e-6 next to the sum over all values, which would be 1e-6 / (3 x size x size) here.
    """
    data: SourceConfig = field(default_factory=SourceConfig)
    """Pictures, cropped to student.size pixels."""
    held_out: SourceConfig = field(default_factory=SourceConfig)
    flips: float = 0.5
    """Share of the pictures that are mirrored."""
    pipeline: PipelineConfig = field(default_factory=lambda: PipelineConfig(batch=64))
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=2e-3, warmup=100, b2=0.99, eps=1e-8, weight_decay=0.0, clip=1.0)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, "kl")
        between(self, "flips", most=1.0)

    def parts(self) -> Parts:
        return parts(self)


def parts(cfg: Config) -> Parts:
    """Make the parts of a run: nothing is inherited or distilled."""
    model = functional(Autoencoder, cfg.student)
    return Parts(
        family=FAMILY,
        student=cfg.student,
        model=model,
        loss=lambda teacher: loss_fn(cfg, model, teacher),
        batch_shapes=partial(batch_shapes, cfg),
        batches=partial(batches, cfg),
        examples=cfg.pipeline.batch,
        look=describe_first_batch,
        evaluator=partial(evaluator, cfg, model),
        final=partial(standardised, cfg, model),
    )


def loss_fn(cfg: Config, model: Model, teacher: Teacher | None) -> LossFn:
    """Make the loss: absolute error of the pixels in [-1, 1], plus the weighted KL divergence.

    Deviation: the error is the mean over the values of a picture. LDM's is the sum, so that the same weight of the KL
    divergence is 3 x size x size times smaller there.
    """

    def loss(params: Params, batch: Batch, key: jax.Array, frozen: Any) -> LossOutput:
        images, n = batch["image"], float(len(batch["image"]))
        moments = model.apply(params, images, method="encode")
        error = jnp.abs(model.apply(params, moments.sample(key), method="decode") - images).mean((1, 2, 3))
        kl = moments.kl()
        return (error + cfg.kl * kl).mean(), {"error": (error.sum(), n), "kl": (kl.sum(), n)}

    return loss


def batch_shapes(cfg: Config) -> Shapes:
    """Return the shapes of a batch."""
    return {"image": ((cfg.pipeline.batch, cfg.student.size, cfg.student.size, 3), jnp.float32)}


def batches(cfg: Config, opened: Opened) -> Any:
    """Open the training batches."""
    return training_batches(_pictures(cfg.data), cfg.pipeline, _example(cfg, cfg.flips), mesh=opened.mesh)


def _pictures(cfg: SourceConfig) -> Source:
    source = open_source(replace(cfg, text=""))
    if not first_good(source, lambda record: "image" in record):
        raise InputError(f"{cfg.path} has no pictures: name their column with data.image")
    return source


def _example(cfg: Config, flips: float) -> Callable[[Any, np.random.Generator], dict[str, Any]]:
    pixels = Pixels(cfg.student.size, flips)

    def example(record: Any, rng: np.random.Generator) -> dict[str, Any]:
        return {"image": pixels(record | {"label": 0}, rng)["image"]}

    return example


def evaluator(cfg: Config, model: Model, opened: Opened) -> Evaluator | None:
    """Make the evaluator: the error on held-out pictures, and a grid of them next to what is left of them."""
    if not cfg.held_out.path:
        return None
    images = _some(cfg, cfg.held_out, "stop")
    restore = embedder(lambda params, x: model.apply(params, x), opened.mesh, BATCH)

    def restored(params: Mapping[str, Any], images: np.ndarray) -> np.ndarray:
        parts = [restore(params, images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
        return np.concatenate(parts)

    def score(params: Mapping[str, Any]) -> Scored:
        mse = float(np.square(restored(params, images) - images).mean())
        psnr = float(10 * np.log10(4 / mse))  # decibels; pixels span 2
        return Scored(dataset=cfg.held_out.path, n=len(images), metrics={"mse": mse, "psnr": psnr})

    def draw(params: Mapping[str, Any], step: int, directory: Path) -> None:
        shown = images[:SHOWN]
        pairs = np.stack([shown, restored(params, shown)], axis=1).reshape(-1, *shown.shape[1:])
        save_samples(to_uint8(pairs), step, directory)

    return Evaluator(score=score, draw=draw)


def _some(cfg: Config, data: SourceConfig, bad: BadMode) -> np.ndarray:
    """Read evenly spread pictures, f32 [up to HELD_OUT, size, size, 3]."""
    source = _pictures(data)
    example = Examples(source, _example(cfg, 0.0), bad)
    where = np.unique(np.linspace(0, len(source) - 1, min(HELD_OUT, len(source))).astype(int))
    return np.stack([example(int(i), np.random.default_rng(int(i)))["image"] for i in where])


def standardised(cfg: Config, model: Model, params: Params) -> Params:
    """Rescale the 1 x 1 convolutions around the latents, so that the scaled latents of training pictures have unit
    variance. Pictures are restored as before. Raises InputError for latents that are all alike or not finite.
    """
    images = _some(cfg, cfg.data, cfg.pipeline.bad)
    encode = jax.jit(partial(model.apply, method="encode"))
    means = [np.asarray(encode(params, images[i : i + BATCH]).mean) for i in range(0, len(images), BATCH)]
    std = float(np.concatenate(means).std())
    if not 0 < std < float("inf"):
        spread = f"the latents of training pictures have a standard deviation of {std}"
        raise InputError(f"{spread}: train again with a lower optim.lr")
    scale = 1 / (std * cfg.student.scaling_factor)
    half = np.arange(2 * cfg.student.latent) < cfg.student.latent  # means before logarithms of variances
    factor = jnp.asarray(np.where(half, scale, 1), jnp.float32)
    kernel, bias = params["quant/kernel"] * factor, params["quant/bias"] * factor
    bias = bias + jnp.where(half, 0.0, 2 * np.log(scale))
    changed = {"quant/kernel": kernel, "quant/bias": bias, "post_quant/kernel": params["post_quant/kernel"] / scale}
    return params | changed


def describe_first_batch(opened: Opened, batch: Batch, picture: Path | None) -> str:
    """Save the first batch as a grid."""
    if picture:
        save_grid(to_uint8(np.asarray(batch["image"].addressable_data(0))[:64]), picture)
    return f"pictures: {len(batch['image'])} in a batch"
