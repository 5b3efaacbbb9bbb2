"""Trains a DiT or LiT: its config, its parts for the runner (`heirloom.common.train.recipe`), and its loss."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.checkpoint.family import Donor
from heirloom.common.data.bad import first_good
from heirloom.common.data.grid import save_grid
from heirloom.common.data.labelled import LABELS, Labelled, open_labelled
from heirloom.common.data.pipeline import PipelineConfig, training_batches
from heirloom.common.data.sources import SourceConfig
from heirloom.common.diffusion import linear_schedule
from heirloom.common.errors import InputError, between, remark
from heirloom.common.mesh import start
from heirloom.common.methods import locate_any
from heirloom.common.nn.functional import functional
from heirloom.common.notebook.modules import make_callable
from heirloom.common.paths import place
from heirloom.common.surgery.plan import Resolution
from heirloom.common.train.loop import Data
from heirloom.common.train.optim import OptimConfig
from heirloom.common.train.parameters import load_params
from heirloom.common.train.parts import Evaluator, Model, Opened, Parts, Shapes, Teacher
from heirloom.common.train.recipe import BaseConfig, unread_captions
from heirloom.common.train.step import Batch, LossFn, LossOutput, Params, StepConfig, cast
from lit_jax import autoencoder_layouts
from lit_jax.autoencoder import AutoencoderConfig
from lit_jax.components import class_names, write_names
from lit_jax.data import Pixels, check_latent, is_latent, latents
from lit_jax.decode import open_pictures, to_uint8
from lit_jax.dit import Dit, DitConfig
from lit_jax.inherit import Keep, graft_attention
from lit_jax.kernels import check_device
from lit_jax.latents import cache_latents, cache_origin, data_origin, sample_cached
from lit_jax.losses import DistillConfig, hybrid
from lit_jax.origin import autoencoder_origin, copy_origin, write_origin
from lit_jax.progress import grids, held_out_loss
from lit_jax.sample import SampleConfig
from lit_jax.zoo import FAMILY, open_dit, outline

DIT_OPTIMIZER = OptimConfig(lr=1e-4, warmup=0, schedule="constant", b2=0.999, eps=1e-8, weight_decay=0.0, clip=None)


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """Configures a training run of a DiT or LiT."""

    student: DitConfig = field(default_factory=DitConfig)
    keep: Keep = "none"
    """Projections of self-attention that are inherited, too: none (the paper), o, v, ...; all, from another LiT."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    label_drop: float = 0.1
    """Share of the examples whose label is dropped, for classifier-free guidance."""
    data: SourceConfig = field(default_factory=SourceConfig)
    """Labelled pictures, cropped to student.size pixels; or a latent cache."""
    label: str = "label"
    """Column of the class: integers from 0, or names, which are numbered in alphabetical order."""
    flips: float = 0.5
    """Share of the pictures that are mirrored; a latent cache holds both views of each."""
    pipeline: PipelineConfig = field(default_factory=lambda: PipelineConfig(batch=256))
    autoencoder: str = ""
    """SOURCE of the decoder that turns sampled latents into pictures; not needed to train on a cache."""
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(steps=50, guidance=4.0))
    """Sampler of the progress grid; its settings are not the paper's."""
    samples: int = 16
    """Pictures in the grid, classes in turn; 0: no grid."""
    optim: OptimConfig = DIT_OPTIMIZER
    step: StepConfig = field(default_factory=lambda: StepConfig(ema=0.9999))
    steps: int = 400_000
    """Optimizer steps of the whole run."""
    log_every: int = 100
    eval_every: int = 10_000
    """Steps between sample grids, RUN/samples/STEP.png, and between evaluations on held-out data."""
    save_every: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, "label_drop", "flips", most=1.0)
        between(self, "samples", below=2**30)

    def needs(self) -> dict[str, tuple[str, ...]]:
        return {"donor": ("keep",), "teacher": ("distill",), "samples": ("sample",)}

    def idle(self) -> dict[str, str]:
        off = "both weights of distill are 0; set --distill.noise above 0"
        return super().idle() | unread_captions(self) | ({} if self.distill.active else {"teacher": off})

    def parts(self) -> Parts:
        return parts(self)

    def cache(self, destination: Path) -> dict[str, Any]:
        """Write the latents of the pictures of `data` and of their mirror images into a folder."""
        return write_cache(self, destination)

    def check(self, mesh: Mesh) -> None:
        check_device(self.student.implementation, mesh)


def parts(cfg: Config) -> Parts:
    """Make the parts of a run: inherit all but self-attention, and distill (LiT §3)."""
    model, cached = functional(Dit, cfg.student), cache_autoencoder(cfg)

    def resolve(donor: Donor) -> Resolution:
        return graft_attention(donor.cfg, cfg.student, cfg.keep).resolve(donor.source, model.spec)

    return Parts(
        family=FAMILY,
        student=cfg.student.kept,
        model=model,
        loss=lambda teacher: loss_fn(cfg, model, teacher, cached),
        batch_shapes=partial(batch_shapes, cfg),
        batches=partial(batches, cfg),
        examples=cfg.pipeline.batch,
        donor=cfg.donor,
        teacher=cfg.teacher if cfg.distill.active else "",
        open=open_dit,
        outline=outline,
        inputs=partial(data_origin, cfg.data, cfg.held_out),
        resolve=resolve,
        look=None if cached else describe_first_batch,
        evaluator=partial(evaluator, cfg),
        sidecars=partial(sidecars, cfg),
        inherited_sidecars=partial(inherited_sidecars, cfg),
    )


def sidecars(cfg: Config, opened: Opened, folder: Path) -> None:
    """Write the autoencoder of the latents, and the class names where they are known."""
    write_origin(folder, opened.inputs)
    names = labelled(cfg, opened).classes
    write_names(folder, names if len(names) == cfg.student.classes else None)


def inherited_sidecars(cfg: Config, opened: Opened, folder: Path) -> None:
    """Copy the donor's autoencoder, and its class names if the student has the same classes."""
    if donor := opened.donor:
        copy_origin(donor.folder, folder)
        write_names(folder, class_names(donor) if donor.cfg.classes == cfg.student.classes else None)


def write_cache(cfg: Config, destination: Path) -> dict[str, Any]:
    """Encode the labelled pictures of a recipe. Raises InputError without an autoencoder, for one that does not fit the
    student, and for data that is a cache already. Class names go with the latents: training matches them to a model's.
    """
    if not cfg.autoencoder:
        raise InputError("give --autoencoder SOURCE: the pictures are encoded with it")
    if is_latent(cfg.data):
        raise InputError(f"{cfg.data.path} is a latent cache already: name pictures with --data.path")
    pictures = SourceConfig()
    data = replace(cfg.data, image=cfg.data.image or pictures.image, text=pictures.text, columns=pictures.columns)
    source = open_labelled(data, cfg.label, cfg.student.classes)
    donor, mesh = open_donor(locate_any(cfg.autoencoder), [autoencoder_layouts.FAMILY]), start(cfg.mesh)
    if donor.cfg.latent != cfg.student.channels:
        has = f"this autoencoder has {donor.cfg.latent} channels"
        raise InputError(f"{cfg.autoencoder}: {has}, and the student takes {cfg.student.channels}")
    params, size = load_params(donor, mesh), cfg.student.size * donor.cfg.factor
    origin = autoencoder_origin(donor, cfg.autoencoder)
    cache_latents(donor.cfg, donor.model, params, source, destination, mesh, size=size, origin=origin)
    return {"records": len(source), "autoencoder": str(origin)}


def cache_autoencoder(cfg: Config) -> AutoencoderConfig | None:
    """Find the autoencoder of the latent cache (before the cache exists, the default one); None for pictures."""
    if is_latent(cfg.data):
        return cache_origin(place(cfg.data.path)).cfg
    return AutoencoderConfig() if cfg.autoencoder else None


def check_shapes(cfg: Config, example: Mapping[str, np.ndarray], teacher: Donor | None) -> None:
    """Raise InputError if the shapes or classes of data, student and teacher differ."""
    c, moments = cfg.student, example.get("moments")
    if moments is not None and (moments.ndim != 4 or len(moments) != 2):
        needed = "a cache has [2, row, column, 2 channels], mean and logvar of each picture and of its mirror image"
        raise InputError(f"{cfg.data.path}: a row of moments is {list(moments.shape)}, and {needed}: heirloom cache")
    given = example["image"].shape if moments is None else (*moments.shape[1:3], moments.shape[3] // 2)
    if given != (c.size, c.size, c.channels):
        takes = f"the student takes {[c.size, c.size, c.channels]}"
        raise InputError(f"the data is {list(given)}, {takes}: set student.size and student.channels")
    if cfg.label_drop and not c.null_class:
        raise InputError(f"label_drop is {cfg.label_drop:g}, and the student has no null class: set label_drop 0")
    if teacher and cfg.label_drop and cfg.distill.dropped == "shared" and not teacher.cfg.null_class:
        ways = "set distill.dropped student, so that it sees every label, or label_drop 0"
        raise InputError(f"the teacher has no null class: {ways}")
    if teacher and (t := teacher.cfg) and (t.size, t.channels, t.classes) != (c.size, c.channels, c.classes):
        takes = f"{t.size} x {t.size} x {t.channels} of {t.classes} classes"
        raise InputError(f"the teacher takes {takes}, the student {c.size} x {c.size} x {c.channels} of {c.classes}")


def loss_fn(cfg: Config, student: Model, teacher: Teacher | None, cached: AutoencoderConfig | None) -> LossFn:
    """Make the loss: DiT's, on pixels or on latents drawn from cached moments, plus the two distillation terms."""
    schedule = linear_schedule()

    def loss(params: Params, batch: Batch, key: jax.Array, frozen: Any) -> LossOutput:
        time_key, noise_key, drop_key, latent_key = jax.random.split(key, 4)
        clean = sample_cached(cached, batch["moments"], latent_key, cfg.flips) if cached else batch["image"]
        n, labels = len(clean), batch["label"]
        dropped = jnp.where(jax.random.uniform(drop_key, (n,)) < cfg.label_drop, cfg.student.classes, labels)

        def network(noisy: jax.Array, step: jax.Array) -> jax.Array:
            return student.apply(params, noisy, step, dropped)

        def target(noisy: jax.Array, step: jax.Array) -> jax.Array:
            assert teacher
            seen = dropped if cfg.distill.dropped == "shared" else labels
            return teacher.model.apply(cast(frozen, cfg.step.compute), noisy, step, seen)

        keys = time_key, noise_key
        total, parts = hybrid(schedule, cfg.distill, clean, keys, network, target if teacher else None)
        return total.mean(), {name: (value.sum(), float(n)) for name, value in parts.items()}

    return loss


def labelled(cfg: Config, opened: Opened) -> Labelled:
    """Open the training data; names of classes are numbered as those of the donor, or else of the teacher, if known."""
    check_latent(cfg.data)
    models = [model for model in (opened.donor, opened.teacher) if model]
    names = next((found for model in models if (found := class_names(model))), None)
    source = open_labelled(cfg.data, cfg.label, cfg.student.classes, names)
    if models and source.classes and names is None:
        order = f"the order of its {LABELS}" if is_latent(cfg.data) else "alphabetical order"
        numbered = f"its classes are numbered in {order}, which is taken for the donor's and the teacher's"
        remark(f"{cfg.data.path}: {numbered}")
    if names and not source.classes and is_latent(cfg.data):
        unknown = f"a cache without {LABELS}, so its numbers are taken for the donor's and the teacher's"
        remark(f"{cfg.data.path}: {unknown}; if its pictures had class names, make the cache again")
    return source


def batches(cfg: Config, opened: Opened) -> Data:
    """Open the training batches: labelled pictures, or the latents of a cache. Raises InputError for pictures of a
    latent model.
    """
    source = labelled(cfg, opened)
    if cfg.autoencoder and not opened.inputs:
        ways = "cache their latents first (heirloom cache), or leave out autoencoder"
        raise InputError(f"{cfg.data.path}: these are pictures, and autoencoder is set: {ways}")
    example = latents if opened.inputs else Pixels(cfg.student.size, cfg.flips)
    first = first_good(source, lambda record: example(record, np.random.default_rng(0)))
    check_shapes(cfg, first, opened.teacher)
    return training_batches(source, cfg.pipeline, example, mesh=opened.mesh)


def batch_shapes(cfg: Config) -> Shapes:
    """Return the shapes of a batch: cached moments if there is an autoencoder, else pixels."""
    n, size, channels = cfg.pipeline.batch, cfg.student.size, cfg.student.channels
    label = {"label": ((n,), jnp.int32)}
    if cache_autoencoder(cfg):
        return {"moments": ((n, 2, size, size, 2 * channels), jnp.float16)} | label
    return {"image": ((n, size, size, channels), jnp.float32)} | label


def evaluator(cfg: Config, opened: Opened) -> Evaluator | None:
    """Make the evaluator: the loss on held-out data, and grids of samples."""
    # A kernel that is named for training does not support the f32 weights used for evaluation and sampling.
    model = functional(Dit, cfg.student.kept)
    score = held_out_loss(cfg, model, opened.mesh, labelled(cfg, opened).classes) if cfg.held_out.path else None
    pictures = open_pictures(cfg.student, cfg.autoencoder, opened.mesh, opened.inputs)
    draw = grids(cfg, model, pictures, opened.mesh) if cfg.samples and pictures else None
    return Evaluator(score=score, draw=draw) if score or draw else None


def describe_first_batch(opened: Opened, batch: Batch, picture: Path | None) -> str:
    """Save the first batch as a grid and return a line with its first labels."""
    pixels, labels = (np.asarray(batch[name].addressable_data(0))[:64] for name in ("image", "label"))
    if picture:
        save_grid(to_uint8(pixels), picture)
    return f"first labels: {', '.join(map(str, labels[:8]))}"


make_callable(__name__, "lit_jax.pretrained:train")
