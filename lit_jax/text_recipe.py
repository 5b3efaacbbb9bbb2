"""Trains a text-to-image model, such as a LiT that inherits from PixArt-Σ: its config and its parts for the runner."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from heirloom.common.checkpoint.family import Donor, Family
from heirloom.common.data.pipeline import PipelineConfig, training_batches
from heirloom.common.data.sources import SourceConfig
from heirloom.common.diffusion import linear_schedule
from heirloom.common.errors import InputError, positive, remark
from heirloom.common.nn.functional import functional
from heirloom.common.nn.moments import Moments
from heirloom.common.surgery.plan import Resolution
from heirloom.common.train import recipe
from heirloom.common.train.abstract import Abstract
from heirloom.common.train.loop import Data
from heirloom.common.train.optim import OptimConfig
from heirloom.common.train.parts import Evaluator, Model, Opened, Parts, Shapes, Teacher
from heirloom.common.train.recipe import BaseConfig
from heirloom.common.train.step import Batch, LossFn, LossOutput, Params, StepConfig, cast
from lit_jax.aspect import Ratios
from lit_jax.autoencoder import sample_latents
from lit_jax.components import copy_parts, other_scale, write_parts_of
from lit_jax.denoiser import Null, PromptConfig
from lit_jax.inherit import Keep, graft_attention
from lit_jax.kernels import check_device
from lit_jax.losses import DistillConfig, hybrid
from lit_jax.origin import compare_latents, copy_origin, read_origin, write_origin
from lit_jax.pixart import NULL_TEXT, PixArt, PixArtConfig
from lit_jax.text_cache import EmptyText, Encoding, TextCache, TextExample, unknown_encoding
from lit_jax.text_inputs import Caches, check_teacher, named_data, open_caches, open_drawer, write_cache
from lit_jax.text_origin import read_empty_text, same_encoder, write_empty_text
from lit_jax.text_progress import grids, held_out_error
from lit_jax.zoo import PIXART, open_pixart, text_outline

PIXART_OPTIMIZER = OptimConfig(
    algorithm="came", lr=2e-5, warmup=1000, schedule="constant", b1=0.9, b2=0.999, weight_decay=0.0, clip=0.01
)


@dataclass(frozen=True)
class Stage:
    """A later stage of a training, such as 1024 pixels after 512: fields that replace those of the recipe."""

    size: int
    """Side of the latents; the interpolation follows as in the published models."""
    teacher: str
    data: str
    """Path of the pictures or the cache of this stage."""
    steps: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """Configures a training run of a text-to-image model."""

    student: PixArtConfig = field(default_factory=PixArtConfig)
    keep: Keep = "o"
    """Projections of self-attention that are inherited as well: "o" as the released text-to-image code, "none" as the
    paper says, "all" from a LiT of another resolution.
    """
    distill: DistillConfig = field(default_factory=lambda: DistillConfig(noise=1.0, variance=0.05))
    noisy_weight: float = 1.0
    """Greatest factor of the loss at noisy times: the squared error of the noise is divided by alpha_bar up to this.
    PixArt and LiT have 1; a small model from scratch learns shapes sooner with 10.
    """
    text_drop: float = 0.1
    """Share of the examples whose text is dropped, for classifier-free guidance."""
    null: Null = "prompt mask"
    """Mask of a dropped text, which becomes the empty text: the prompt's (PixArt), or that of the empty text itself."""
    data: SourceConfig = field(default_factory=SourceConfig)
    """Pictures with captions: the column data.text and the data.columns; or a cache (`heirloom cache RECIPE DIR`)."""
    mix: tuple[float, ...] = ()
    """Share of each column of captions, data.text first; empty: all alike (PixArt: the caption and ShareGPT4V's)."""
    ratios: Ratios = "forty"
    """Heights and widths of the pictures: PixArt's forty ratios, ten of them, or the square alone. Each is compiled."""
    pipeline: PipelineConfig = field(default_factory=lambda: PipelineConfig(batch=384))
    autoencoder: str = ""
    """SOURCE of the autoencoder."""
    text_encoder: str = ""
    """SOURCE of the text encoder."""
    prompts: tuple[str, ...] = ()
    """Prompts that are drawn at every evaluation, to RUN/samples/STEP.png."""
    sample: PromptConfig = field(default_factory=PromptConfig)
    """Sampler of these pictures."""
    optim: OptimConfig = PIXART_OPTIMIZER
    step: StepConfig = field(default_factory=lambda: StepConfig(compute="bfloat16"))
    stages: tuple[Stage, ...] = ()
    """Further stages, each from the model of the one before, in RUN/stage_2 and so on; the first is RUN/stage_1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.text_drop <= 1:
            raise InputError(f"text_drop is {self.text_drop:g}: give a share from 0 to 1")
        if self.noisy_weight < 1:
            raise InputError(f"noisy_weight is {self.noisy_weight:g}: give 1 (the published loss) or more")
        if any(share < 0 for share in self.mix) or (self.mix and not sum(self.mix)):
            raise InputError(f"mix is {list(self.mix)}: give a share of 0 or more for each column of captions")
        for stage in self.stages:
            positive(stage, "size", "steps", "batch")

    def needs(self) -> dict[str, tuple[str, ...]]:
        return {"donor": ("keep",), "teacher": ("distill",), "prompts": ("sample",)}

    def idle(self) -> dict[str, str]:
        tags = {"pipeline.tags": "its captions are encoded before, without tags"}
        return tags | ({} if self.stages else super().idle())  # later stages have their own donors and teachers

    def parts(self) -> Parts:
        return parts(self)

    def check(self, mesh: Mesh) -> None:
        check_device(self.student.implementation, mesh)

    def train(self, directory: Path) -> None:
        for stage, folder in self._in_stages(directory):
            cfg = stage._as_donor()
            recipe.run(cfg, folder, parts(cfg, folder))

    def inherit(self, destination: Path, *, force: bool = False) -> dict[str, Any]:
        if not self.donor:
            raise InputError("this recipe has no donor: give --donor SOURCE, such as a PixArt-Σ pipeline folder")
        cfg = self._as_donor()
        return recipe.inherit(cfg, cfg.parts(), destination, force=force)

    def cache(self, destination: Path) -> dict[str, Any]:
        """Write the latents and captions of `data` as DESTINATION/train, and those of `held_out` next to them."""
        abouts = [write_cache(self, data, destination / name) for name, data in named_data(self).items()]
        return abouts[0]

    def abstract(self, mesh: Mesh) -> Abstract:
        return recipe.outline(self, parts(self, outline=True), mesh)

    def _as_donor(self) -> "Config":
        """The same with the features of the empty text, which are not trained, if the donor has them (a .pth)."""
        if not self.donor or not open_pixart(self.donor).cfg.null_text:
            return replace(self, student=replace(self.student, null_text=False))
        optim = self.optim
        spared: dict[str, Any] = dict(frozen=(*optim.frozen, NULL_TEXT), no_decay=(*optim.no_decay, NULL_TEXT))
        return replace(self, student=replace(self.student, null_text=True), optim=replace(optim, **spared))

    def _in_stages(self, directory: Path) -> Iterator[tuple["Config", Path]]:
        """Yield config and folder of each stage."""
        if not self.stages:
            yield self, directory
            return
        yield replace(self, stages=()), directory / "stage_1"
        for n, stage in enumerate(self.stages, 2):
            student = replace(self.student, size=stage.size, interpolation=stage.size / 64)
            data, pipeline = replace(self.data, path=stage.data), replace(self.pipeline, batch=stage.batch)
            previous = str(directory / f"stage_{n - 1}" / "model")
            fields: dict[str, Any] = dict(student=student, data=data, pipeline=pipeline, steps=stage.steps, stages=())
            yield replace(self, donor=previous, teacher=stage.teacher, keep="all", **fields), directory / f"stage_{n}"

    def describe(self) -> tuple[Family, Any]:
        return PIXART, self.student


def parts(cfg: Config, directory: Path | None = None, *, outline: bool = False) -> Parts:
    """Make the parts of a run: inherit all but self-attention, and distill (LiT §3, §4.2).

    directory: the run folder, where pictures are encoded that no cache holds yet. outline: nothing is opened.
    """
    model, caches = functional(PixArt, cfg.student), cache(partial(open_caches, cfg, directory))

    def about() -> Encoding:
        return unknown_encoding(cfg.student) if outline else caches()["train"].encoding

    def resolve(donor: Donor) -> Resolution:
        return graft_attention(donor.cfg, cfg.student, cfg.keep).resolve(donor.source, model.spec)

    def sidecars(opened: Opened, folder: Path) -> None:
        data = caches()["train"]
        write_origin(folder, read_origin(data.folder))
        write_empty_text(folder, data.encoding.null.seen)
        write_parts_of(folder, data.about["text_encoder"], data.about["autoencoder"])

    def inherited(opened: Opened, folder: Path) -> None:
        assert opened.donor
        copy_origin(opened.donor.folder, folder)
        copy_parts(opened.donor, folder)

    return Parts(
        family=PIXART,
        student=cfg.student.kept,
        model=model,
        loss=lambda teacher: loss_fn(cfg, model, teacher, about()),
        batch_shapes=partial(batch_shapes, cfg),
        batches=lambda opened: batches(cfg, opened, caches()["train"]),
        examples=cfg.pipeline.batch,
        donor=cfg.donor,
        teacher=cfg.teacher if cfg.distill.active else "",
        open=open_pixart,
        outline=text_outline,
        resolve=resolve,
        evaluator=lambda opened: evaluator(cfg, opened, caches()),
        sidecars=sidecars,
        inherited_sidecars=inherited,
    )


def loss_fn(cfg: Config, student: Model, teacher: Teacher | None, about: Encoding) -> LossFn:
    """Make the loss: PixArt's, on latents drawn from cached moments, plus the two distillation terms."""
    schedule, null = linear_schedule(), about.null

    def loss(params: Params, batch: Batch, key: jax.Array, frozen: Any) -> LossOutput:
        time_key, noise_key, drop_key, latent_key = jax.random.split(key, 4)
        clean = sample_latents(about.autoencoder, Moments(*jnp.split(batch["moments"], 2, axis=-1)), latent_key)
        text = batch["text"].astype(jnp.float32), jnp.arange(batch["text"].shape[1]) < batch["length"][:, None]
        seen = drop_text(*text, jax.random.uniform(drop_key, (len(clean),)) < cfg.text_drop, null, cfg.null)
        given = seen if cfg.distill.dropped == "shared" else text

        def target(noisy: jax.Array, step: jax.Array) -> jax.Array:
            assert teacher
            return teacher.model.apply(cast(frozen, cfg.step.compute), noisy, step, *given)

        def network(noisy: jax.Array, step: jax.Array) -> jax.Array:
            return student.apply(params, noisy, step, *seen)

        keys = time_key, noise_key
        total, parts = hybrid(
            schedule, cfg.distill, clean, keys, network, target if teacher else None, cfg.noisy_weight
        )
        return total.mean(), {name: (value.sum(), float(len(clean))) for name, value in parts.items()}

    return loss


def drop_text(
    text: jax.Array, mask: jax.Array, dropped: jax.Array, null: EmptyText, rule: Null
) -> tuple[jax.Array, jax.Array]:
    """Replace the features of dropped texts [batch, token, width] by those of the empty text.

    dropped: bool [batch]. rule: "prompt mask": the mask [batch, token] stays that of the prompt; "own mask": it becomes
    that of the empty text.
    """
    text = jnp.where(dropped[:, None, None], null.features, text)
    return text, mask if rule == "prompt mask" else jnp.where(dropped[:, None], null.mask, mask)


def batches(cfg: Config, opened: Opened, data: TextCache) -> Data:
    """Open the training batches: each of pictures of one size."""
    mix = cfg.mix or (1.0,) * len(data.columns)
    if len(mix) != len(data.columns):
        raise InputError(f"mix has {len(mix)} shares, the columns of captions are {', '.join(data.columns)}")
    if opened.teacher:
        check_teacher(cfg.student, opened.teacher)
    origin = read_origin(data.folder)
    for model in (opened.donor, opened.teacher):
        if model and origin and (other := read_origin(model.folder)):
            remark(compare_latents(origin, other, str(data.folder), str(model.path)))
        elif model and origin:
            remark(other_scale(model, origin.cfg.scaling_factor, str(data.folder)))
        known = read_empty_text(model.folder) if model else None
        if model and known is not None and not same_encoder(known, data.encoding.null.seen):
            encoded = f"{data.folder} was encoded with {data.about['text_encoder']}"
            text = f"{encoded}; {model.path} was trained with another text encoder"
            if model is opened.teacher:
                raise InputError(f"{text}: make the cache with that one")
            remark(f"{text}, so its attention to the text must be learned again")
    example = TextExample(cfg.student.text_tokens, mix)
    return training_batches(data, cfg.pipeline, example, mesh=opened.mesh, groups=data.groups)


def batch_shapes(cfg: Config) -> Shapes:
    """Return the shapes of a batch of square pictures."""
    n, c = cfg.pipeline.batch, cfg.student
    moments = {"moments": ((n, c.size, c.size, 2 * c.channels), jnp.float16)}
    return moments | {"text": ((n, c.text_tokens, c.text_width), jnp.float16), "length": ((n,), jnp.int32)}


def evaluator(cfg: Config, opened: Opened, caches: Caches) -> Evaluator | None:
    """Make the evaluator: the error on held-out data, and pictures of `prompts`."""
    # A kernel that is named for training does not support the f32 weights used for evaluation and sampling.
    model = functional(PixArt, cfg.student.kept)
    held_out = caches.get("held_out")
    score = held_out_error(model, held_out, opened.mesh) if held_out else None
    draw = grids(open_drawer(cfg, model, caches["train"], opened.mesh, cfg.prompts)) if cfg.prompts else None
    return Evaluator(score=score, draw=draw) if score or draw else None
