"""Training a TinyCLIP: the recipe's config, its loss, and one linear trainer (spec §2, §3, §6)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from math import log
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from common.checkpoint import weights
from common.checkpoint.convert import Donor, Family, hashes
from common.compile import Abstract, Outline, abstract_batch, abstract_params
from common.config import to_json
from common.data.images import Preprocess
from common.data.pipeline import Augment, PipelineConfig, check_first_batch, training_batches
from common.data.sources import Source, SourceConfig, open_source
from common.data.text import Tokenizer
from common.errors import InputError
from common.nn.functional import Functional, functional
from common.surgery.graft import graft
from common.surgery.plan import Resolution
from common.surgery.report import provenance
from common.train.loop import Run
from common.train.mesh import MeshConfig, shardings, start
from common.train.metrics import WriterName, open_writers
from common.train.optim import OptimConfig, make_optimizer
from common.train.parameters import best, load_params, save_params
from common.train.state import abstract_state, create_state
from common.train.step import LossFn, StepConfig, cast, make_step
from tinyclip_jax.evaluate import retrieval_on
from tinyclip_jax.formats import read_preprocess, read_tokenizer
from tinyclip_jax.inherit import DepthRule, manual
from tinyclip_jax.losses import affinity_mimicking, contrastive
from tinyclip_jax.model import Clip, ClipConfig, total_macs
from tinyclip_jax.zoo import FAMILY, open_clip_model, outline

EMBEDDINGS = "embeddings"
TARGETS = ("teacher_image", "teacher_text")
LARGEST_SCALE = 100.0


@dataclass(frozen=True)
class LossConfig:
    """Affinity mimicking, plain contrastive, or a mixture."""

    alpha: float = 1.0
    """Weight of affinity mimicking; the rest goes to the contrastive loss (the released scripts use 1)."""
    scale: Literal["fixed", "learned"] = "fixed"
    """The student's similarity scale: held at the teacher's `teacher_scale`, or learned and kept below 100."""
    teacher_scale: float | None = 50.0
    """The teacher's similarity scale; None: what its checkpoint says."""
    first_scale: Literal["fixed", "initial"] = "fixed"
    """Scale of the very first step: "initial" is 1/0.07, as in the released code, which fixes it only after a step."""


@dataclass(frozen=True)
class Config:
    """One run of TinyCLIP."""

    student: ClipConfig = field(default_factory=ClipConfig)
    teacher: str = ""
    """SOURCE of the model to mimic; "embeddings": columns teacher_image and teacher_text of the data; empty: none."""
    donor: str = ""
    """SOURCE of the weights to inherit; empty: from scratch."""
    depth_rule: DepthRule = "interval"
    """Which layers a shallower student takes: every n-th from the front, as released, or spread evenly."""
    tokenizer: str = ""
    """A tokenizer.json or its folder; "fit": fitted to the captions of the data; empty: the donor's or teacher's, or CLIP's."""
    data: SourceConfig = field(default_factory=SourceConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    held_out: SourceConfig = field(default_factory=SourceConfig)
    """Pairs for retrieval while training; an empty path: no evaluation."""
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    step: StepConfig = field(default_factory=StepConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    steps: int = 100_000
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Seed of freshly initialised parameters."""
    writers: tuple[WriterName, ...] = ()
    """Where metrics go beside metrics.jsonl: tensorboard (needs tensorboardX), wandb."""
    log_every: int = 50
    eval_every: int = 1000
    save_every: int = 1000
    published: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the paper to print beside ours, by metric."""

    def train(self, directory: Path) -> None:
        train(self, directory)

    def inherit(self, destination: Path, *, force: bool = False) -> dict[str, Any]:
        return inherit(self, destination, force=force)

    def evaluate(self) -> list[dict[str, Any]]:
        return evaluate(self)

    def abstract(self, mesh: Mesh) -> Abstract:
        return abstract(self, mesh)

    def describe(self) -> tuple[Family, ClipConfig]:
        return FAMILY, self.student


@dataclass(frozen=True)
class Inputs:
    """What stands between pictures and captions and the model."""

    pre: Preprocess
    tokenizer: Tokenizer


def train(cfg: Config, directory: Path) -> None:
    """Run a recipe in its folder, or go on where it stopped. Raises InputError for anything the user can mend."""
    run = Run.open(directory, to_json(cfg))
    mesh = start(cfg.mesh)
    if run.finished(cfg.steps):
        print(f"{directory} is finished: {cfg.steps:,} steps, weights in {run.model}")
        return

    donor, teacher = opened(cfg.donor), opened(cfg.teacher)
    source = open_source(cfg.data)
    inputs = read_inputs(cfg, donor or teacher, source)
    if cfg.teacher == EMBEDDINGS and (missing := set(TARGETS) - source[0].keys()):
        raise InputError(f"{cfg.data.path} has no {min(missing)}: teacher embeddings are columns of the data, named in data.columns")
    augment = Augment(inputs.pre, inputs.tokenizer, cfg.student.text.context, cfg.pipeline.tags)
    augment.check(source[0])
    data = training_batches(source, cfg.pipeline, augment, mesh=mesh)

    student = functional(Clip, cfg.student)
    place = shardings(student.spec, mesh)
    optimizer = make_optimizer(cfg.optim, student.spec, cfg.steps)
    step = make_step(
        loss_fn(cfg, student, teacher),
        optimizer,
        student.spec,
        mesh,
        cfg.step,
        frozen=load_params(teacher, mesh) if teacher else None,
        project=partial(hold_scale, cfg.loss),
    )
    state = run.restore_or(
        lambda: create_state(initial(cfg, student, donor, place), optimizer, student.spec, mesh, cfg.step.ema),
        like=abstract_state(optimizer, student.spec, mesh, cfg.step.ema),
    )
    if int(state.step) == 0:
        first_look(run, data, inputs)
    score = retrieval_on(cfg.held_out, student, inputs.pre, inputs.tokenizer, cfg.student, mesh) if cfg.held_out.path else None
    run.fit(
        state,
        step,
        data,
        cfg.steps,
        examples_per_step=cfg.pipeline.batch,
        writers=open_writers(cfg.writers, directory, run.config, int(state.step)),
        log_every=cfg.log_every,
        save_every=cfg.save_every,
        eval_every=cfg.eval_every,
        evaluate=(lambda state: score(best(state)).summary()) if score else None,
        on_finish=lambda state: save_params(run.model, FAMILY.name, cfg.student, best(state), partial(companions, inputs), force=True),
        flops_per_example=flops(cfg, student, teacher),
    )


def flops(cfg: Config, student: Functional, teacher: Donor | Outline | None) -> float:
    """Of one pair: two operations per multiply-accumulate forward, twice that backward; the teacher goes forward only."""
    return 6 * total_macs(cfg.student, student.spec) + (2 * total_macs(teacher.cfg, teacher.model.spec) if teacher else 0)


def abstract(cfg: Config, mesh: Mesh) -> Abstract:
    """The step of `train` with shapes for arrays."""
    student, teacher = functional(Clip, cfg.student), None
    if cfg.teacher not in ("", EMBEDDINGS):
        teacher = outline(cfg.teacher)
    optimizer = make_optimizer(cfg.optim, student.spec, cfg.steps)
    frozen = abstract_params(teacher.model.spec, mesh) if teacher else None
    loss, project = loss_fn(cfg, student, teacher), partial(hold_scale, cfg.loss)
    step = make_step(loss, optimizer, student.spec, mesh, cfg.step, frozen=frozen, project=project)
    n, size = cfg.pipeline.batch, cfg.student.image.size
    arrays: Any = {"image": ((n, size, size, 3), jnp.float32), "text": ((n, cfg.student.text.context), jnp.int32)}
    if cfg.teacher == EMBEDDINGS:
        arrays |= {name: ((n, cfg.student.joint), jnp.float32) for name in TARGETS}
    state = abstract_state(optimizer, student.spec, mesh, cfg.step.ema)
    return Abstract(step, state, abstract_batch(mesh, **arrays), n * flops(cfg, student, teacher))


def opened(source: str) -> Donor | None:
    """The checkpoint a config names, if it names one."""
    return None if source in ("", EMBEDDINGS) else open_clip_model(source)


def loss_fn(cfg: Config, student: Functional, teacher: Donor | Outline | None) -> LossFn:
    """Affinity mimicking of a live teacher or of embeddings in the batch, and the contrastive loss, weighted by alpha."""

    def loss(params: dict[str, Any], batch: dict[str, Any], key: jax.Array, frozen: Any) -> tuple[jax.Array, dict[str, Any]]:
        image, text, scale = student.apply(params, batch["image"], batch["text"])
        parts = {}
        if cfg.loss.alpha > 0:
            if teacher:
                targets = jax.lax.stop_gradient(teacher.model.apply(cast(frozen, cfg.step.compute), batch["image"], batch["text"]))
                target_image, target_text, own_scale = targets
            else:
                (target_image, target_text), own_scale = (batch[name] for name in TARGETS), None
            target_scale = own_scale if cfg.loss.teacher_scale is None else cfg.loss.teacher_scale
            parts["affinity"] = (cfg.loss.alpha, affinity_mimicking(image, text, target_image, target_text, scale, target_scale))
        if cfg.loss.alpha < 1:
            parts["contrastive"] = (1 - cfg.loss.alpha, contrastive(image, text, scale, batch.get("group")))
        total = sum(weight * value for weight, value in parts.values())
        return jnp.asarray(total), {name: (value, 1.0) for name, (_, value) in parts.items()} | {"scale": (scale, 1.0)}

    if cfg.step.accumulate > 1:
        raise InputError("step.accumulate compares pairs within micro-batches only, TinyCLIP's loss needs the whole batch: set it to 1")
    if cfg.loss.alpha > 0 and not cfg.teacher:
        raise InputError('loss.alpha is above 0 but there is no teacher: give teacher a SOURCE or "embeddings", or set loss.alpha to 0')
    if teacher and (teacher.cfg.image.size, teacher.cfg.text.context) != (cfg.student.image.size, cfg.student.text.context):
        theirs = f"{teacher.cfg.image.size} px and {teacher.cfg.text.context} tokens"
        raise InputError(f"the teacher sees {theirs}, the student other inputs: set student.image.size and student.text.context to these")
    if cfg.loss.teacher_scale is None and teacher is None and cfg.loss.alpha > 0:
        raise InputError("loss.teacher_scale is None, and embeddings carry no scale: give it a number")
    if cfg.loss.scale == "fixed" and cfg.loss.teacher_scale is None:
        raise InputError('loss.scale "fixed" needs a number for loss.teacher_scale')
    return loss


def hold_scale(cfg: LossConfig, params: dict[str, Any]) -> dict[str, Any]:
    """After each update: the scale fixed, or kept between 1 and 100 (train.py of the release)."""
    if cfg.scale == "fixed":
        assert cfg.teacher_scale is not None
        return params | {"logit_scale": jnp.full_like(params["logit_scale"], log(cfg.teacher_scale))}
    return params | {"logit_scale": jnp.clip(params["logit_scale"], 0.0, log(LARGEST_SCALE))}


def initial(cfg: Config, student: Functional, donor: Donor | None, place: Mapping[str, Any] | None) -> dict[str, jax.Array]:
    """The student before the first step: inherited or from scratch, in its shardings."""
    init = partial(student.init, jax.random.key(cfg.seed))
    params = graft(resolve(cfg, student, donor), donor.source, student.spec, place, init) if donor else init(place=place)
    if cfg.loss.scale == "fixed" and cfg.loss.first_scale == "fixed":
        params = hold_scale(cfg.loss, params)
    return params


def resolve(cfg: Config, student: Functional, donor: Donor) -> Resolution:
    return manual(donor.cfg, cfg.student, cfg.depth_rule).resolve(donor.source, student.spec)


def inherit(cfg: Config, destination: Path, *, force: bool = False) -> dict[str, Any]:
    """Cut the student of a recipe from its donor and write it as a weights folder; returns its provenance."""
    if not cfg.donor:
        raise InputError("this recipe trains from scratch: it names no donor to inherit from")
    donor, student = open_clip_model(cfg.donor), functional(Clip, cfg.student)
    record = {"source": cfg.donor, "hashes": hashes(donor.file)} | provenance(resolve(cfg, student, donor))
    inputs = read_inputs(cfg, donor, None)

    def beside(folder: Path) -> None:
        weights.write_json(folder / "provenance.json", record)
        companions(inputs, folder)

    save_params(destination, FAMILY.name, cfg.student, initial(cfg, student, donor, None), beside, force=force)
    return record


def evaluate(cfg: Config) -> list[dict[str, Any]]:
    """Retrieval of the student as it starts, on the recipe's held-out pairs."""
    if not cfg.held_out.path:
        raise InputError("this recipe names no held-out data; give --held-out.path")
    mesh = start(cfg.mesh)
    donor, student = opened(cfg.donor), functional(Clip, cfg.student)
    inputs = read_inputs(cfg, donor or opened(cfg.teacher), open_source(cfg.data) if cfg.tokenizer == "fit" else None)
    score = retrieval_on(cfg.held_out, student, inputs.pre, inputs.tokenizer, cfg.student, mesh)
    return score(initial(cfg, student, donor, shardings(student.spec, mesh))).rows(cfg.published)


def read_inputs(cfg: Config, donor: Donor | None, source: Source | None) -> Inputs:
    """Preprocessing and tokenizer: what the config names, else the donor's, else CLIP's."""
    pre = Preprocess(size=cfg.student.image.size)
    if donor:
        theirs = read_preprocess(donor.folder, donor.cfg.image.size)
        pre = Preprocess(cfg.student.image.size, theirs.mean, theirs.std, theirs.interpolation, theirs.scale)
    if cfg.tokenizer == "fit":
        if source is None:
            raise InputError("a tokenizer is fitted in training only; name a tokenizer.json")
        tokenizer = Tokenizer.train(captions(source), cfg.student.text.vocab)
    elif cfg.tokenizer:
        tokenizer = Tokenizer.load(cfg.tokenizer)
    else:
        found = read_tokenizer(donor.folder, donor.cfg) if donor else Tokenizer.clip()
        if found is None:
            raise InputError(f"{donor and donor.path} comes without a tokenizer; name one with --tokenizer")
        tokenizer = found
    if tokenizer.vocab_size > cfg.student.text.vocab:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} entries, student.text.vocab is {cfg.student.text.vocab}")
    return Inputs(pre, tokenizer)


def captions(source: Source) -> list[str]:
    """Every distinct caption with its tags, in a stable order."""
    found: set[str] = set()
    for i in range(len(source)):
        record = source[i]
        texts = [record["text"]] if isinstance(record["text"], str) else record["text"]
        found.update([*texts, *record.get("tags", ())])
    return sorted(found)


def first_look(run: Run, data: Any, inputs: Inputs) -> None:
    """Draw the first batch and print a caption: what is fed is what is meant. The stream is put back to its start."""
    before = data.state()
    batch = next(data)
    if jax.process_index() == 0:
        picture = run.directory / "first_batch.png"
        print(f'first caption: "{check_first_batch(batch, inputs.tokenizer, picture, inputs.pre)}"; pictures: {picture}')
    data.restore(before)


def companions(inputs: Inputs, folder: Path) -> None:
    """Preprocessing and tokenizer, beside the weights."""
    inputs.pre.save(folder)
    inputs.tokenizer.save(folder)
