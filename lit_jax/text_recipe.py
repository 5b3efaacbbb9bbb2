"""Trains a text-to-image model, such as a LiT that inherits from PixArt-Σ: its config and its parts for the runner."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from heirloom.common.checkpoint.convert import Donor, Family, open_donor
from heirloom.common.data.pipeline import PipelineConfig, training_batches
from heirloom.common.data.sources import SourceConfig
from heirloom.common.diffusion import linear_schedule
from heirloom.common.errors import InputError, positive, remark
from heirloom.common.methods import locate_any
from heirloom.common.nn.functional import functional
from heirloom.common.nn.moments import Moments
from heirloom.common.paths import Address, place
from heirloom.common.surgery.plan import Resolution
from heirloom.common.train import recipe
from heirloom.common.train.abstract import Abstract
from heirloom.common.train.loop import Data
from heirloom.common.train.mesh import MeshConfig, start
from heirloom.common.train.optim import OptimConfig
from heirloom.common.train.parts import Evaluator, Model, Opened, Parts, Shapes, Teacher
from heirloom.common.train.recipe import BaseConfig
from heirloom.common.train.step import Batch, LossFn, Params, StepConfig, cast
from lit_jax import autoencoder_layouts
from lit_jax.aspect import Ratios, bucket_sizes
from lit_jax.autoencoder import sample_latents
from lit_jax.components import pipeline_of, write_parts_of, write_pipeline_of
from lit_jax.decode import open_pictures
from lit_jax.denoiser import Denoiser, Null, PromptConfig
from lit_jax.inherit import Keep, graft_attention
from lit_jax.losses import DistillConfig, hybrid
from lit_jax.origin import compare_latents, copy_origin, read_origin, write_origin
from lit_jax.pixart import PixArt, PixArtConfig
from lit_jax.text.encoder import open_text
from lit_jax.text_cache import (
    EmptyText,
    Encoding,
    TextCache,
    TextExample,
    is_text_cache,
    unknown_encoding,
    write_text_cache,
)
from lit_jax.text_progress import Drawer, grids, held_out_error, prompt_drawer
from lit_jax.zoo import PIXART, open_pixart, text_outline

PIXART_OPTIMIZER = OptimConfig(
    algorithm="came", lr=2e-5, warmup=1000, schedule="constant", b1=0.9, b2=0.999, weight_decay=0.0, clip=0.01
)


Caches = dict[str, TextCache]
"""The caches of a run: "train", and "held_out" if there is one."""


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
    text_drop: float = 0.1
    """Share of the examples whose text is dropped, for classifier-free guidance."""
    null: Null = "prompt mask"
    """What a dropped text leaves: the empty text at as many tokens as the prompt had (PixArt), or its own tokens."""
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
        if any(share < 0 for share in self.mix) or (self.mix and not sum(self.mix)):
            raise InputError(f"mix is {list(self.mix)}: give a share of 0 or more for each column of captions")
        for stage in self.stages:
            positive(stage, "size", "steps", "batch")

    def parts(self) -> Parts:
        return parts(self)

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
        """The same with the leaf of the empty text if the donor has it: files of diffusers lack it."""
        null_text = bool(self.donor) and open_pixart(self.donor).cfg.null_text
        return replace(self, student=replace(self.student, null_text=null_text))

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
        write_parts_of(folder, data.about["text_encoder"], data.about["autoencoder"])

    def inherited(opened: Opened, folder: Path) -> None:
        assert opened.donor
        copy_origin(opened.donor.folder, folder)
        write_pipeline_of(folder, pipeline_of(opened.donor))

    return Parts(
        family=PIXART,
        student=cfg.student.kept,
        model=model,
        loss=lambda teacher: loss_fn(cfg, model, teacher, about()),
        batch=partial(batch_shapes, cfg),
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


def named_data(cfg: Config) -> dict[str, SourceConfig]:
    """Return the data of a run by the names of its caches."""
    return {"train": cfg.data} | ({"held_out": cfg.held_out} if cfg.held_out.path else {})


def write_cache(cfg: Config, data: SourceConfig, folder: Path) -> dict[str, Any]:
    """Encode pictures and captions. Raises InputError without an autoencoder and a text encoder."""
    for name in ("autoencoder", "text_encoder"):
        if not getattr(cfg, name):
            raise InputError(f"give --{name.replace('_', '-')} SOURCE: the data is encoded with it")
    autoencoder = open_donor(locate_any(cfg.autoencoder), [autoencoder_layouts.FAMILY])
    text = open_text(locate_any(cfg.text_encoder), tokens=cfg.student.text_tokens)
    factor = autoencoder.cfg.factor
    sizes = bucket_sizes(cfg.ratios, cfg.student.size * factor, cfg.student.patch * factor)
    mesh = start(MeshConfig())
    return write_text_cache(folder, data, sizes, autoencoder, cfg.autoencoder, text, cfg.text_encoder, mesh)


def open_caches(cfg: Config, directory: Path | None) -> Caches:
    """Open the caches that the config names; pictures are encoded into `directory`/cache first.

    Raises InputError for pictures without a directory, and for caches that do not fit the student or one another.
    """
    caches = {}
    for name, data in named_data(cfg).items():
        path = place(data.path)
        if isinstance(path, Address):
            raise InputError(f"{path}: pictures with captions are encoded, and caches read, from local folders")
        if not is_text_cache(path):
            if directory is None:
                raise InputError(f"{data.path} is no cache of latents: make one with heirloom cache RECIPE DIR")
            path = directory / "cache" / name
            if not is_text_cache(path):
                print(f"{data.path}: encoding pictures and captions into {path}")
                write_cache(cfg, data, path)
        caches[name] = TextCache(path)
        check_cache(cfg.student, caches[name])
    for other in caches.values():
        if other.about["empty"] != caches["train"].about["empty"]:
            given = f"{other.about['text_encoder']}, the training data with {caches['train'].about['text_encoder']}"
            raise InputError(f"{other.folder} was made with the text encoder {given}: make both with the same")
    return caches


def check_cache(student: PixArtConfig, cache: TextCache) -> None:
    """Raise InputError if the student takes other latents or texts than the cache has."""
    channels = cache[0]["moments"].shape[-1] // 2
    found = dict(channels=channels, text_width=cache.about["width"], text_tokens=cache.about["tokens"])
    for name, value in found.items():
        if getattr(student, name) != value:
            takes = f"the student {getattr(student, name)}: set student.{name}"
            raise InputError(f"{cache.folder} has {name} {value}, {takes}")


def loss_fn(cfg: Config, student: Model, teacher: Teacher | None, about: Encoding) -> LossFn:
    """Make the loss: PixArt's, on latents drawn from cached moments, plus the two distillation terms."""
    schedule, null = linear_schedule(), about.null

    def loss(params: Params, batch: Batch, key: jax.Array, frozen: Any) -> tuple[jax.Array, dict[str, Any]]:
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
        total, parts = hybrid(schedule, cfg.distill, clean, keys, network, target if teacher else None)
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
    example = TextExample(cfg.student.text_tokens, mix)
    return training_batches(data, cfg.pipeline, example, mesh=opened.mesh, groups=data.groups)


def check_teacher(student: PixArtConfig, teacher: Donor) -> None:
    """Raise InputError if the teacher takes other latents or texts than the student."""
    for name in ("channels", "text_width"):
        if getattr(teacher.cfg, name) != getattr(student, name):
            sizes = f"{getattr(teacher.cfg, name)}, the student's {getattr(student, name)}"
            raise InputError(f"the teacher's {name} is {sizes}: both must see the same latents and texts")


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


def open_drawer(cfg: Config, model: Model, data: TextCache, mesh: Mesh, prompts: Sequence[str]) -> Drawer:
    """Open text encoder and autoencoder to draw prompts with the parameters of a training.

    Raises InputError without an autoencoder and a text encoder.
    """
    text_encoder, autoencoder = (getattr(cfg, name) or data.about[name] for name in ("text_encoder", "autoencoder"))
    pictures = open_pictures(cfg.student, autoencoder, mesh, read_origin(data.folder))
    assert pictures  # a latent model has an autoencoder
    text = open_text(locate_any(text_encoder), tokens=cfg.student.text_tokens)
    return prompt_drawer(Denoiser(cfg.student, model, mesh), text, pictures, cfg.sample, prompts, cfg.seed)
