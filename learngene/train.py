"""Training a teacher, a gene or a descendant: the recipe's config, its loss, and one linear trainer."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from heirloom.common.checkpoint.convert import Donor, Family, hashes
from heirloom.common.checkpoint.weights import write_json
from heirloom.common.compile import Abstract, Outline, abstract_batch, abstract_params
from heirloom.common.config import to_json
from heirloom.common.data.labelled import open_labelled, write_labels
from heirloom.common.data.pipeline import PipelineConfig, training_batches
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.sources import SourceConfig
from heirloom.common.errors import InputError, positive
from heirloom.common.nn.functional import Functional, functional
from heirloom.common.surgery.graft import graft
from heirloom.common.surgery.plan import Plan, Resolution
from heirloom.common.surgery.report import provenance
from heirloom.common.train.loop import Run
from heirloom.common.train.mesh import MeshConfig, shardings, start
from heirloom.common.train.metrics import WriterName, open_writers
from heirloom.common.train.optim import OptimConfig, make_optimizer
from heirloom.common.train.parameters import best, finite, load_params, save_params
from heirloom.common.train.state import abstract_state, create_state
from heirloom.common.train.step import LossFn, StepConfig, cast, make_step
from learngene import ligo, relatives
from learngene.augment import AugmentConfig, augment
from learngene.convnet import FAMILY as CONVNET
from learngene.convnet import ConvConfig
from learngene.data import LOGITS, Evaluation, Example, Resident, columns, decoded, evaluation
from learngene.evaluate import normalised, rows, scorer
from learngene.expand import Head, layer_map
from learngene.inputs import CROP, IMAGENET, preprocess_of
from learngene.labels import labels_of
from learngene.losses import DistillConfig, cross_entropy, distillation
from learngene.relatives import Method
from learngene.vit import VitConfig, counts
from learngene.zoo import FAMILY, open_classifier, outline

CACHED = "logits"
# DeiT's AdamW. Deviation: the cosine runs per step and ends at 0; the release steps per epoch, a step late, and ends at a minimum.
ADAMW = OptimConfig(lr=5e-4, warmup=0, b2=0.999, eps=1e-8, weight_decay=0.05, no_decay=("**position",), clip=None)
CONVNET_ADAMW = replace(ADAMW, no_decay=())  # it has no positions to spare


@dataclass(frozen=True)
class Config:
    """One run: a teacher learns from labels, a gene from a teacher, a descendant starts from a gene."""

    student: VitConfig = field(default_factory=VitConfig)
    donor: str = ""
    """SOURCE of the gene, or of another ViT, to start from; empty: none."""
    method: Method = "expand"
    """How the student comes from its donor: a gene's expansion, or a relative of it."""
    layers: tuple[int, ...] = ()
    """Stage of each layer, for the method expand; empty: SWS's rule."""
    head: Head = "inherit"
    """The classifier: inherited where the number of classes is the same, or fresh, for other labels of the same number."""
    init: Literal["random", "mimetic"] = "random"
    """Initial values of a student without donor."""
    teacher: str = ""
    """SOURCE of the model to distil from; "logits": the column teacher_logits of the data; empty: none."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Weight and form of distillation, where there is a teacher."""
    data: SourceConfig = field(default_factory=SourceConfig)
    label: str = "label"
    """Column of the class: numbers from 0, or names, which are numbered in alphabetical order."""
    storage: Literal["stream", "device"] = "stream"
    """Read pictures as they are needed, or decode them once and keep them on the devices, as fits small data."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    preprocess: Preprocess = IMAGENET
    """Mean, standard deviation, interpolation; its size is the student's, and its margin, where it has none, that of `crop`."""
    pipeline: PipelineConfig = field(default_factory=lambda: PipelineConfig(batch=512))
    held_out: SourceConfig = field(default_factory=SourceConfig)
    """Labelled pictures for accuracy while training; an empty path: no evaluation."""
    crop: float = CROP
    """Share of the side that a held-out picture's centre crop keeps, where preprocess.resize is not set; 1 for small pictures."""
    optim: OptimConfig = ADAMW
    step: StepConfig = field(default_factory=StepConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    steps: int = 100_000
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Seed of freshly initialised parameters."""
    writers: tuple[WriterName, ...] = ()
    """Where metrics go beside metrics.jsonl: tensorboard (needs tensorboardX), wandb."""
    log_every: int = 100
    eval_every: int = 2500
    save_every: int = 2500

    def __post_init__(self) -> None:
        positive(self, "steps", "log_every", "eval_every", "save_every")
        positive(self.pipeline, "batch")

    @property
    def family(self) -> Family:
        return FAMILY

    @property
    def pre(self) -> Preprocess:
        pre = self.preprocess.at(self.student.size)
        return pre.cropped(self.crop) if pre.resize is None else pre

    @property
    def pictures(self) -> int:
        """In a batch, every view counted."""
        return self.pipeline.batch * self.augment.views

    def train(self, directory: Path) -> None:
        train(self, directory)

    def inherit(self, destination: Path, *, force: bool = False) -> dict[str, Any]:
        return inherit(self, destination, force=force)

    def evaluate(self) -> list[dict[str, Any]]:
        return evaluate(self)

    def abstract(self, mesh: Mesh) -> Abstract:
        return abstract(self, mesh)

    def describe(self) -> tuple[Family, Any]:
        return self.family, self.student


@dataclass(frozen=True)
class TeacherConfig(Config):
    """The same run with a convnet: a teacher where no pretrained one is at hand."""

    student: ConvConfig = field(default_factory=ConvConfig)  # type: ignore[assignment]
    optim: OptimConfig = CONVNET_ADAMW

    @property
    def family(self) -> Family:
        return CONVNET


@dataclass(frozen=True)
class Teacher:
    """Any frozen classifier over the same labels. logits(weights, pixels): pixels [batch, size, size, 3] f32 in 0..1, not normalised."""

    weights: Any
    logits: Callable[[Any, jax.Array], jax.Array]
    macs: int = 0
    """Multiply-accumulates of one picture, for the share of the devices' peak that is shown."""


def train(cfg: Config, directory: Path, teacher: Teacher | None = None, made: Resolution | None = None) -> None:
    """Run a recipe in its folder, or go on where it stopped. `teacher` takes the place of the SOURCE that the config names.

    made: what `resolve` returned for this config, where the caller has it already: LiGO's maps are trained there.
    Raises InputError for anything the user can mend.
    """
    run = Run.open(directory, to_json(cfg))
    mesh = start(cfg.mesh)
    if run.finished(cfg.steps):
        print(f"{directory} is finished: {cfg.steps:,} steps, weights in {run.model}")
        return

    check(cfg, teacher)
    donor, teacher = opened(cfg.donor), teacher or open_teacher(cfg, mesh)
    data = batches(cfg, mesh)
    student = functional(cfg.family.module, cfg.student)
    optimizer = make_optimizer(cfg.optim, student.spec, cfg.steps)
    step = make_step(loss_fn(cfg, student, teacher), optimizer, student.spec, mesh, cfg.step, frozen=teacher and teacher.weights)
    state = run.restore_or(
        lambda: create_state(
            initial(cfg, student, donor, shardings(student.spec, mesh), made), optimizer, student.spec, mesh, cfg.step.ema
        ),
        like=abstract_state(optimizer, student.spec, mesh, cfg.step.ema),
    )
    if int(state.step) == 0:
        first_look(cfg, run, data)
    score = scorer(cfg.family, cfg.student, held_out(cfg), cfg.pre, mesh) if cfg.held_out.path else None
    run.fit(
        state,
        step,
        data,
        cfg.steps,
        examples_per_step=cfg.pictures,
        writers=open_writers(cfg.writers, directory, run.config, int(state.step)),
        log_every=cfg.log_every,
        save_every=cfg.save_every,
        eval_every=cfg.eval_every,
        evaluate=(lambda state: score(best(state))) if score else None,
        on_finish=lambda state: save_params(run.model, cfg.family.name, cfg.student, best(state), cfg.pre.save, force=True),
        flops_per_example=flops(cfg, student, teacher),
    )


def flops(cfg: Config, student: Functional, teacher: Teacher | None) -> float:
    """Of one picture: two operations per multiply-accumulate forward, twice that backward; the teacher goes forward only."""
    return 6 * cfg.family.macs(cfg.student, student.spec) + (2 * teacher.macs if teacher else 0)


def abstract(cfg: Config, mesh: Mesh) -> Abstract:
    """The step of `train` with shapes for arrays."""
    student = functional(cfg.family.module, cfg.student)
    teacher = None
    if cfg.teacher not in ("", CACHED) and cfg.distill.alpha > 0:
        sees = outline(cfg.teacher)
        family = sees.family if isinstance(sees, Donor) else FAMILY
        teacher = classifier(cfg, sees, family, IMAGENET, abstract_params(sees.model.spec, mesh))
    optimizer = make_optimizer(cfg.optim, student.spec, cfg.steps)
    step = make_step(loss_fn(cfg, student, teacher), optimizer, student.spec, mesh, cfg.step, frozen=teacher and teacher.weights)
    n, views = cfg.pipeline.batch, (cfg.augment.views,) if cfg.augment.views > 1 else ()
    arrays: Any = {"image": ((n, *views, cfg.student.size, cfg.student.size, 3), jnp.uint8), "label": ((n,), jnp.int32)}
    if cfg.teacher == CACHED:
        arrays |= {LOGITS: ((n, cfg.student.classes), jnp.float32)}
    state = abstract_state(optimizer, student.spec, mesh, cfg.step.ema)
    return Abstract(step, state, abstract_batch(mesh, **arrays), cfg.pictures * flops(cfg, student, teacher))


def opened(source: str, role: str = "donor") -> Donor | None:
    """The checkpoint a config names, if it names one."""
    return None if source in ("", CACHED) else finite(open_classifier(source), role)


def check(cfg: Config, teacher: Teacher | None = None) -> None:
    """Raises InputError where the parts of a config contradict each other."""
    if getattr(cfg.student, "channels", 3) != 3:
        raise InputError(f"pictures are read with 3 channels, the student has {cfg.student.channels}: set student.channels to 3")
    if cfg.init != "random" and (cfg.donor or cfg.family is not FAMILY):
        raise InputError("init 'mimetic' is for a ViT without donor: leave donor empty, or init 'random'")
    if getattr(cfg.student, "gene", "none") != "none" and not (cfg.teacher or teacher) and cfg.distill.alpha == 1:
        raise InputError("this gene would learn from labels alone: name a teacher, or say so with --distill.alpha 0")
    if cfg.teacher == CACHED and cfg.augment.changes:
        raise InputError(
            "a teacher's cached logits belong to unchanged pictures: turn augmentation off, or let the teacher look (a SOURCE)"
        )
    if cfg.augment.views > 1 and cfg.storage == "device":
        raise InputError("data on the devices has one view of each picture: set augment.views to 1, or storage to 'stream'")
    if cfg.storage == "device" and (cfg.augment.crop == "resized" or cfg.augment.randaugment):
        raise InputError("resized crops and RandAugment happen while reading: set storage to 'stream', or augment.crop to 'shift'")


def open_teacher(cfg: Config, mesh: Mesh) -> Teacher | None:
    """The teacher a config names, sharded like a student. Raises InputError when it sees other pictures or other classes."""
    donor = opened(cfg.teacher, "teacher") if cfg.distill.alpha > 0 else None
    if donor is None:
        return None
    sees, student = donor.cfg, cfg.student
    if (sees.size, sees.classes) != (student.size, student.classes):
        theirs = f"{sees.size} px and {sees.classes} classes"
        raise InputError(f"the teacher has {theirs}, the student {student.size} px and {student.classes}: they must be the same")
    return classifier(cfg, donor, donor.family, preprocess_of(donor).pre, load_params(donor, mesh))


def classifier(cfg: Config, source: Donor | Outline, family: Family, pre: Preprocess, weights: Any) -> Teacher:
    """A model as the teacher of `cfg`, which hands it pixels that are not normalised yet."""

    def logits(weights: Any, pixels: jax.Array) -> jax.Array:
        return source.model.apply(cast(weights, cfg.step.compute), normalised(pixels, pre))

    return Teacher(weights, logits, family.macs(source.cfg, source.model.spec))


def batches(cfg: Config, mesh: Mesh) -> Any:
    """Training batches from the source or from the devices."""
    data, example = columns(cfg.data, cfg.teacher == CACHED), Example(cfg.augment, cfg.pre)
    if cfg.storage == "device":
        return Resident(decoded(data, cfg.label, cfg.student.classes, example), cfg.pipeline, mesh)
    return training_batches(open_labelled(data, cfg.label, cfg.student.classes), cfg.pipeline, example, mesh=mesh)


def loss_fn(cfg: Config, student: Functional, teacher: Teacher | None) -> LossFn:
    """(1 - alpha) times cross-entropy with the labels, plus alpha times the teacher's term; without a teacher the labels alone."""
    alpha = cfg.distill.alpha if teacher or cfg.teacher == CACHED else 0.0
    classes = cfg.student.classes

    def loss(params: dict[str, Any], batch: dict[str, Any], key: jax.Array, frozen: Any) -> tuple[jax.Array, dict[str, Any]]:
        augment_key, drop_key = jax.random.split(key)
        images, labels = batch["image"], batch["label"]
        if cfg.augment.views > 1:
            images, labels = images.reshape(-1, *images.shape[2:]), jnp.repeat(labels, cfg.augment.views)
        seen = augment(cfg.augment, cfg.pre, images, labels, classes, augment_key)
        logits = student.apply(params, normalised(seen.pixels, cfg.pre), drop_key)
        parts = {}
        if alpha < 1:
            parts["labels"] = (1 - alpha, cross_entropy(logits, seen.targets))
        if alpha > 0:
            target = teacher.logits(frozen, seen.pixels) if teacher else batch[LOGITS]
            parts["teacher"] = (alpha, distillation(logits, jax.lax.stop_gradient(target), cfg.distill))
        total = sum(weight * value for weight, value in parts.values())
        right = (logits.argmax(-1) == seen.targets.argmax(-1)).mean()
        return jnp.asarray(total), {name: (value, 1.0) for name, (_, value) in parts.items()} | {"accuracy": (right, 1.0)}

    return loss


def initial(
    cfg: Config, student: Functional, donor: Donor | None, place: Mapping[str, Any] | None, made: Resolution | None = None
) -> dict[str, jax.Array]:
    """The student before the first step: inherited, or freshly initialised, in its shardings. made: as in `train`."""
    key = jax.random.key(cfg.seed)
    init = partial(student.init, key)
    if donor:
        return graft(made or resolve(cfg, student, donor), donor.source, student.spec, place, init)
    params = init(place=place)
    if cfg.init == "mimetic":
        params |= {path: jax.device_put(value, params[path].sharding) for path, value in relatives.mimetic(cfg.student, key).items()}
    return params


def resolve(cfg: Config, student: Functional, donor: Donor) -> Resolution:
    """Where each tensor of the student comes from. LiGO trains its maps here, so call it once and pass the result on.

    Raises InputError where donor, method and student do not go together.
    """
    if donor.family is not FAMILY or cfg.family is not FAMILY:
        raise InputError(f"a {cfg.family.name} cannot start from a {donor.family.name}: both must be ViTs")
    if donor.cfg.heads != cfg.student.heads:
        regrouped = f"{donor.cfg.heads} heads become {cfg.student.heads}"
        print(f"note: {regrouped}: the projections are kept, but what attention computes with them changes")
    made = grown(cfg, student, donor) if cfg.method == "ligo" else relatives.plan(cfg.method, donor.cfg, cfg.student, cfg.layers, cfg.head)
    return made.resolve(donor.source, student.spec)


def grown(cfg: Config, student: Functional, donor: Donor) -> Plan:
    """LiGO's plan, its matrices learned from the labels of the recipe's data."""
    mesh = start(cfg.mesh)
    loss = loss_fn(replace(cfg, teacher=""), student, None)
    data = batches(replace(cfg, teacher=""), mesh)
    return ligo.fit(
        donor.cfg,
        donor.source,
        cfg.student,
        student.spec,
        lambda params, batch, key: loss(dict(params), batch, key, None)[0],
        data,
        cfg.seed,
    )


def inherit(cfg: Config, destination: Path, *, force: bool = False) -> dict[str, Any]:
    """Make the student of a recipe from its donor and write it as a weights folder; returns its provenance."""
    if not cfg.donor:
        raise InputError("this recipe starts from scratch: it names no donor to inherit from")
    return write_descendant(cfg, open_classifier(cfg.donor), destination, force=force)


def write_descendant(cfg: Config, donor: Donor, destination: Path, *, force: bool = False) -> dict[str, Any]:
    """The student of `cfg` out of an opened donor, as a weights folder; returns its provenance.

    Its class names are the donor's where it inherits the donor's head. Raises InputError for a donor that holds NaN or infinity.
    """
    donor = finite(donor, "donor")
    labels = labels_of(donor) if cfg.head == "inherit" and cfg.student.classes == donor.cfg.classes else None
    student = functional(cfg.family.module, cfg.student)
    made = resolve(cfg, student, donor)
    record = {"source": str(donor.path), "hashes": hashes(donor.file)} | provenance(made)

    def beside(folder: Path) -> None:
        write_json(folder / "provenance.json", record)
        if labels is not None:
            write_labels(folder, labels)
        cfg.pre.save(folder)

    save_params(destination, cfg.family.name, cfg.student, initial(cfg, student, donor, None, made), beside, force=force)
    return record


def expand_folder(donor: Donor, args: Namespace) -> dict[str, Any]:
    """`heirloom expand`: a descendant of another depth, and where asked for of another resolution or label set; an ordinary ViT of
    that depth is only resized. Raises InputError where the donor is no gene and its depth differs.
    """
    if donor.family is not FAMILY:
        raise InputError(f"{donor.path} is a {donor.family.name}: only genes and ViTs expand")
    student = replace(donor.cfg.of_depth(args.depth), size=args.size or donor.cfg.size, classes=args.classes or donor.cfg.classes)
    layers = counts(args.map, "--map") if args.map else ()
    if donor.cfg.gene == "sws" and args.depth < donor.cfg.layers and not layers:
        kept = layer_map(args.depth, donor.cfg.layers)
        print(f"note: nothing is published for {args.depth} layers of {donor.cfg.layers} stages; taking stages {', '.join(map(str, kept))}")
    cfg = Config(student, layers=layers, preprocess=preprocess_of(donor).announced(), seed=args.seed)
    return write_descendant(cfg, donor, args.destination, force=args.force)


def held_out(cfg: Config, pre: Preprocess | None = None) -> Evaluation:
    """The held-out pictures as the student sees them, or a model of another preprocessing."""
    return evaluation(cfg.held_out, cfg.label, pre or cfg.pre, min(cfg.pipeline.batch, 256), cfg.student.classes)


def evaluate(cfg: Config) -> list[dict[str, Any]]:
    """Accuracy of the student as it starts, on the recipe's held-out pictures."""
    if not cfg.held_out.path:
        raise InputError("this recipe names no held-out data; give --held-out.path")
    mesh, student, data = start(cfg.mesh), functional(cfg.family.module, cfg.student), held_out(cfg)
    params = initial(cfg, student, opened(cfg.donor), shardings(student.spec, mesh))
    return rows(scorer(cfg.family, cfg.student, data, cfg.pre, mesh)(params), data.name, len(data))


def first_look(cfg: Config, run: Run, data: Any) -> None:
    """Draw the first batch as it is read, and say what a step is. The stream is put back to its start."""
    before = data.state()
    batch = next(data)
    if jax.process_index() == 0:
        images, labels = (np.asarray(batch[name].addressable_data(0)) for name in ("image", "label"))
        pictures = images.reshape(-1, *images.shape[-3:])[:64]
        side = int(np.ceil(len(pictures) ** 0.5))
        grid = np.concatenate([pictures, np.full((side**2 - len(pictures), *pictures.shape[1:]), 255, np.uint8)])
        grid = grid.reshape(side, side, *pictures.shape[1:])
        Image.fromarray(np.concatenate(np.concatenate(grid, axis=1), axis=1)).save(run.directory / "first_batch.png")
        print(
            f"{cfg.pictures} pictures a step at a peak learning rate of {cfg.optim.lr:.2e}; "
            f"first labels {', '.join(map(str, labels[:8]))}; pictures: {run.directory / 'first_batch.png'}"
        )
    data.restore(before)
