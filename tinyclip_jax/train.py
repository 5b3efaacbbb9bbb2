"""Training a TinyCLIP: the recipe's config, its loss, and one linear trainer."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import log
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from heirloom.common.checkpoint.convert import Donor, Family, hashes
from heirloom.common.checkpoint.weights import write_json
from heirloom.common.compile import Abstract, Outline, abstract_batch, abstract_params
from heirloom.common.config import to_json
from heirloom.common.data.pipeline import Augment, AugmentName, Batches, PipelineConfig, check_first_batch, training_batches
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.sources import Source, SourceConfig, open_source
from heirloom.common.data.text import Tokenizer
from heirloom.common.errors import InputError, positive
from heirloom.common.nn.functional import Functional, functional
from heirloom.common.surgery.axes import Spec, matches
from heirloom.common.surgery.graft import graft
from heirloom.common.surgery.plan import Resolution
from heirloom.common.surgery.report import provenance
from heirloom.common.train.loop import Run
from heirloom.common.train.mesh import MeshConfig, shardings, start
from heirloom.common.train.metrics import WriterName, open_writers
from heirloom.common.train.optim import OptimConfig, make_optimizer
from heirloom.common.train.parameters import best, finite, gathered, load_params, save_params
from heirloom.common.train.state import State, abstract_state, create_state
from heirloom.common.train.step import LossFn, Step, StepConfig, cast, make_step
from tinyclip_jax import cache
from tinyclip_jax.cache import TARGETS
from tinyclip_jax.evaluate import retrieval_on
from tinyclip_jax.inherit import DepthRule, expand, manual, prune
from tinyclip_jax.inputs import check_tokenizer, preprocess_of, tokenizer_of
from tinyclip_jax.losses import affinity_mimicking, contrastive
from tinyclip_jax.masks import (
    MULTIPLIERS,
    PATTERN,
    MaskConfig,
    Masked,
    bounded,
    constraint,
    deterministic_gates,
    initial_masks,
    mask_spec,
    sample,
    sparsity,
    split,
)
from tinyclip_jax.model import Clip, ClipConfig, total_macs
from tinyclip_jax.zoo import FAMILY, open_clip_model, outline

EMBEDDINGS = "embeddings"
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
    """Scale of the very first step: "initial" is 1/0.07, as in the released code, which fixes it only after a step (with masks the
    donor's, as all else)."""


@dataclass(frozen=True)
class Stage:
    """One stage of progressive distillation: what it has instead of the recipe's own."""

    student: ClipConfig
    steps: int
    warmup: int = 2000
    """Steps of linear warm-up; with masks their phase is the warm-up."""
    masks: MaskConfig = field(default_factory=MaskConfig)

    def __post_init__(self) -> None:
        positive(self, "steps")


@dataclass(frozen=True)
class Config:
    """One run of TinyCLIP, or several stages of it."""

    student: ClipConfig = field(default_factory=ClipConfig)
    teacher: str = ""
    """SOURCE of the model to mimic; "embeddings": columns teacher_image and teacher_text of the data; "cache:DIR": what `heirloom cache`
    stored; empty: none."""
    donor: str = ""
    """SOURCE of the weights to inherit; empty: from scratch."""
    depth_rule: DepthRule = "interval"
    """Which layers a shallower student takes: every n-th from the front, as released, or spread evenly."""
    tokenizer: str = ""
    """A tokenizer.json or its folder; "fit": fitted to the captions of the data; empty: the donor's or teacher's, or CLIP's."""
    data: SourceConfig = field(default_factory=SourceConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    augment: AugmentName = "random"
    """Random crops and a random one of several captions, or none: the centre and the first, which a stored teacher needs."""
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
    masks: MaskConfig = field(default_factory=MaskConfig)
    """Automatic inheritance: `student` is the original model, learned masks decide what of it stays."""
    stages: tuple[Stage, ...] = ()
    """Progressive distillation: each stage inherits from the model of the one before it, all have the same teacher. Each has its own
    student, steps, warm-up and masks."""
    stage: int = 0
    """The one stage to run; 0: all in turn, from the first that is not finished."""

    def __post_init__(self) -> None:
        positive(self, "steps", "log_every", "eval_every", "save_every")
        positive(self.pipeline, "batch")

    def train(self, directory: Path) -> None:
        for cfg, folder in self._in_turn(directory):
            train(cfg, folder)

    def inherit(self, destination: Path, *, force: bool = False) -> dict[str, Any]:
        return inherit(self._first(), destination, force=force)

    def evaluate(self) -> list[dict[str, Any]]:
        return evaluate(self._first())

    def cache(self, destination: Path) -> dict[str, Any]:
        return cache_teacher(self._first(), destination)

    def abstract(self, mesh: Mesh) -> Abstract:
        return abstract(self._first(), mesh)

    def describe(self) -> tuple[Family, ClipConfig]:
        return FAMILY, self.stages[-1].student if self.stages else self.student

    def idle(self) -> dict[str, str]:
        """Fields that do nothing here, and what to set instead."""
        each = {"student": "student", "steps": "steps", "masks": "masks", "optim.warmup": "warmup"}
        return {field: f"each stage has its own: set --stages.0.{name}" for field, name in each.items()} if self.stages else {}

    def _in_turn(self, directory: Path) -> Iterator[tuple["Config", Path]]:
        """The config and folder of each stage to run. Raises InputError for a stage that is none, or whose donor is not there yet."""
        if not self.stages:
            yield self, directory
            return
        if not 0 <= self.stage <= len(self.stages):
            raise InputError(f"there are stages 1 to {len(self.stages)}: stage {self.stage} is none of them")
        for n in [self.stage] if self.stage else range(1, len(self.stages) + 1):
            before = directory / f"stage_{n - 1}" / "model"
            if n > 1 and not before.exists():
                raise InputError(f"stage {n} goes on from {before}, which is not there: run stage {n - 1} first")
            yield self.in_stage(n, self.donor if n == 1 else str(before)), directory / f"stage_{n}"

    def _first(self) -> "Config":
        """What a command that trains nothing speaks of: the recipe, or its first stage."""
        return self.in_stage(1, self.donor) if self.stages else self

    def in_stage(self, n: int, donor: str) -> "Config":
        """Stage n = 1, 2, ... as a config of its own."""
        stage = self.stages[n - 1]
        alone = replace(self, donor=donor, stages=(), stage=0)
        return replace(alone, student=stage.student, steps=stage.steps, masks=stage.masks, optim=replace(self.optim, warmup=stage.warmup))


@dataclass(frozen=True)
class Inputs:
    """What stands between pictures and captions and the model."""

    pre: Preprocess
    tokenizer: Tokenizer


def train(cfg: Config, directory: Path) -> None:
    """Run a recipe in its folder, or go on where it stopped. Raises InputError for anything the user can mend."""
    run = Run.open(directory, to_json(cfg))
    mesh = start(cfg.mesh)
    if cfg.masks.round_to < 1:
        raise InputError(f"masks.round_to is {cfg.masks.round_to}: widths are rounded to a multiple of 1 or more")
    if cfg.masks.prune_step and cfg.masks.prune_step >= cfg.steps:
        raise InputError(f"masks.prune_step is {cfg.masks.prune_step} of {cfg.steps} steps: leave some for the model that is cut")
    if run.finished(cfg.steps):
        print(f"{directory} is finished: {cfg.steps:,} steps, weights in {run.model}")
        return

    donor, teacher = opened(cfg.donor), opened(cfg.teacher, "teacher")
    source = open_source(cfg.data)
    inputs = read_inputs(cfg, donor or teacher, source)
    if cfg.teacher.startswith(cache.PREFIX):
        if cfg.augment != "none":
            raise InputError('a stored teacher saw every picture uncropped: set augment to "none", or take the live teacher')
        source = cache.Cached(source, Path(cfg.teacher.removeprefix(cache.PREFIX)), cfg.data, inputs.pre, inputs.tokenizer)
    if cfg.teacher == EMBEDDINGS and (missing := set(TARGETS) - source[0].keys()):
        raise InputError(f"{cfg.data.path} has no {min(missing)}: teacher embeddings are columns of the data, named in data.columns")
    augment = Augment(inputs.pre, inputs.tokenizer, cfg.student.text.context, cfg.pipeline.tags, cfg.augment)
    augment.check(source[0])
    data = training_batches(source, cfg.pipeline, augment, mesh=mesh)
    if run.checkpoints.latest() is None:
        first_look(run, data, inputs)
    setting = Setting(cfg, run, mesh, donor, teacher, load_params(teacher, mesh) if teacher else None, inputs, data)
    if cfg.masks.prune_step:
        distil(setting, *learn_masks(setting))
    else:
        distil(setting, cfg.student, partial(initial, cfg, functional(Clip, cfg.student), donor))


@dataclass(frozen=True)
class Setting:
    """What the phases of a run share."""

    cfg: Config
    run: Run
    mesh: Mesh
    donor: Donor | None
    teacher: Donor | None
    frozen: Any
    """The teacher's parameters on the devices."""
    inputs: Inputs
    data: Batches

    def fit(
        self, state: State, step: Step, total: int, student: Functional, model: Any, scored: Callable[[State], Any], **ends: Any
    ) -> State:
        """Up to step `total`; `model` computes what `scored(state)` gives it, for retrieval on the held-out pairs."""
        cfg = self.cfg
        args = (cfg.held_out, model, self.inputs.pre, self.inputs.tokenizer, cfg.student, self.mesh)
        score = retrieval_on(*args) if cfg.held_out.path else None
        return self.run.fit(
            state,
            step,
            self.data,
            total,
            examples_per_step=cfg.pipeline.batch,
            writers=open_writers(cfg.writers, self.run.directory, self.run.config, int(state.step)),
            log_every=cfg.log_every,
            save_every=cfg.save_every,
            eval_every=cfg.eval_every,
            evaluate=(lambda state: score(scored(state)).summary()) if score else None,
            flops_per_example=flops(cfg, student, self.teacher),
            **ends,
        )


def distil(s: Setting, student_cfg: ClipConfig, make: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
    """Train the student from `make(place)`, or on from where it was, to the end of the run, and write its weights.

    After a mask phase the optimizer is new, and the cosine goes from the full rate without a warm-up.
    """
    cfg, student = s.cfg, functional(Clip, student_cfg)
    begun = cfg.masks.prune_step
    optim = replace(cfg.optim, warmup=0) if begun else cfg.optim
    place, optimizer = shardings(student.spec, s.mesh), make_optimizer(optim, student.spec, cfg.steps - begun)
    loss = loss_fn(cfg, student, s.teacher)
    step = make_step(loss, optimizer, student.spec, s.mesh, cfg.step, frozen=s.frozen, project=partial(hold_scale, cfg.loss))

    def new() -> State:
        state = create_state(make(place), optimizer, student.spec, s.mesh, cfg.step.ema)
        return replace(state, step=jax.device_put(np.int32(begun), state.step.sharding))

    state = s.run.restore_or(new, abstract_state(optimizer, student.spec, s.mesh, cfg.step.ema), after=begun)
    beside = partial(companions, s.inputs)

    def finish(state: State) -> None:
        save_params(s.run.model, FAMILY.name, student_cfg, best(state), beside, spec=student.spec, force=True)

    s.fit(state, step, cfg.steps, student, student, best, on_finish=finish)


def learn_masks(s: Setting) -> tuple[ClipConfig, Callable[[Mapping[str, Any]], dict[str, Any]]]:
    """The mask phase: weights, masks and multipliers together up to `prune_step`, then the cut.

    Returns the pruned model's config and its parameters as a function of shardings; it also stands in RUN/pruned, so that a resume
    knows its shape.
    """
    cfg, folder = s.cfg, s.run.directory / "pruned"
    if (s.run.checkpoints.latest() or 0) > cfg.masks.prune_step:
        found = open_clip_model(str(folder))
        return found.cfg, lambda place: load_params(found, s.mesh)
    student = functional(Clip, cfg.student)
    masked, spec = Masked(student), student.spec | mask_spec(cfg.student)
    optimizer = mask_optimizer(cfg, spec)
    plain = loss_fn(cfg, masked, s.teacher)

    def loss(params: dict[str, Any], batch: dict[str, Any], key: jax.Array, given: Any) -> tuple[jax.Array, dict[str, Any]]:
        weights, masks = split(params)
        frozen, wanted = given
        total, metrics = plain(weights | sample(key, masks), batch, key, frozen)
        gone = sparsity(cfg.student, masks)
        penalty = constraint(gone, wanted, masks)
        return total + penalty, metrics | {"sparsity": (gone, 1.0), "wanted": (wanted, 1.0), "constraint": (penalty, 1.0)}

    def project(params: dict[str, Any]) -> dict[str, Any]:
        return bounded(hold_scale(cfg.loss, params))

    def gates(state: State) -> dict[str, Any]:
        return deterministic_gates({path: gathered(x) for path, x in split(best(state))[1].items()}, cfg.masks.round_to)

    step = make_step(loss, optimizer, spec, s.mesh, cfg.step, frozen=s.frozen, project=project, scheduled=cfg.masks.wanted)
    place = shardings(spec, s.mesh)

    def new() -> State:
        start = initial_masks(s.donor.cfg if s.donor else cfg.student, cfg.student)
        return create_state(initial(cfg, student, s.donor, place) | start, optimizer, spec, s.mesh, cfg.step.ema)

    state = s.run.restore_or(new, abstract_state(optimizer, spec, s.mesh, cfg.step.ema))
    state = s.fit(state, step, cfg.masks.prune_step, student, masked, lambda state: split(best(state))[0] | gates(state))
    weights = {path: gathered(x) for path, x in split(best(state))[0].items()}
    pruned = prune(cfg.student, weights, gates(state), cfg.masks)
    small = functional(Clip, pruned.cfg).spec
    record = {"source": f"the masks of {s.run.directory.name} at step {cfg.masks.prune_step}"} | provenance(pruned.resolution)

    def beside(folder: Path) -> None:
        companions(s.inputs, folder)
        write_json(folder / "provenance.json", record)

    save_params(folder, FAMILY.name, pruned.cfg, pruned.params, beside, spec=small, force=True)
    return pruned.cfg, lambda place: pruned.params


def mask_optimizer(cfg: Config, spec: Spec) -> optax.GradientTransformation:
    """AdamW for the weights, its rate rising over the whole phase; Adam down for the masks and up for the multipliers.

    The gradient is clipped over all of them together.
    """
    optim, steps = cfg.optim, cfg.masks.prune_step
    rising = replace(optim, warmup=steps, clip=None, no_decay=(*optim.no_decay, PATTERN))
    groups = {
        "weights": make_optimizer(rising, spec, steps),
        "masks": optax.adam(cfg.masks.lr, b1=cfg.masks.momentum),
        "multipliers": optax.adam(-cfg.masks.lr, b1=cfg.masks.momentum),
    }
    kind = {path: "multipliers" if path.rpartition("/")[2] in MULTIPLIERS else "masks" for path in spec if matches(PATTERN, path)}
    clip = optax.identity() if optim.clip is None else optax.clip_by_global_norm(optim.clip)
    return optax.chain(clip, optax.partition(groups, {path: kind.get(path, "weights") for path in spec}))


def flops(cfg: Config, student: Functional, teacher: Donor | Outline | None) -> float:
    """Of one pair: two operations per multiply-accumulate forward, twice that backward; the teacher goes forward only."""
    return 6 * total_macs(cfg.student, student.spec) + (2 * total_macs(teacher.cfg, teacher.model.spec) if teacher else 0)


def abstract(cfg: Config, mesh: Mesh) -> Abstract:
    """The step of `train` with shapes for arrays; of an automatic recipe the one after the cut, at the size before it."""
    student, stored = functional(Clip, cfg.student), _stored(cfg.teacher)
    teacher = outline(cfg.teacher) if cfg.teacher and not stored else None
    optimizer = make_optimizer(cfg.optim, student.spec, cfg.steps)
    frozen = abstract_params(teacher.model.spec, mesh) if teacher else None
    loss, project = loss_fn(cfg, student, teacher), partial(hold_scale, cfg.loss)
    step = make_step(loss, optimizer, student.spec, mesh, cfg.step, frozen=frozen, project=project)
    n, size = cfg.pipeline.batch, cfg.student.image.size
    arrays: Any = {"image": ((n, size, size, 3), jnp.float32), "text": ((n, cfg.student.text.context), jnp.int32)}
    if stored:
        arrays |= {name: ((n, cfg.student.joint), jnp.float32) for name in TARGETS}
    state = abstract_state(optimizer, student.spec, mesh, cfg.step.ema)
    return Abstract(step, state, abstract_batch(mesh, **arrays), n * flops(cfg, student, teacher))


def opened(source: str, role: str = "donor") -> Donor | None:
    """The checkpoint a config names, if it names one."""
    return finite(open_clip_model(source), role) if source and not _stored(source) else None


def _stored(teacher: str) -> bool:
    """Whether its embeddings come with the batch."""
    return teacher == EMBEDDINGS or teacher.startswith(cache.PREFIX)


def loss_fn(cfg: Config, student: Functional | Masked, teacher: Donor | Outline | None) -> LossFn:
    """Affinity mimicking of a live teacher or of embeddings in the batch, and the contrastive loss, weighted by alpha."""

    def loss(params: dict[str, Any], batch: dict[str, Any], key: jax.Array, frozen: Any) -> tuple[jax.Array, dict[str, Any]]:
        image, text, scale = student.apply(params, batch["image"], batch["text"], train=True)
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
    if not 0 <= cfg.loss.alpha <= 1:
        raise InputError(f"loss.alpha is {cfg.loss.alpha}: the share of affinity mimicking lies between 0 and 1")
    if cfg.loss.teacher_scale is not None and cfg.loss.teacher_scale <= 0:
        raise InputError(f"loss.teacher_scale is {cfg.loss.teacher_scale}: a scale is above 0 (the release has 50)")
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
    plan = expand(donor.cfg, cfg.student) if cfg.masks.prune_step else manual(donor.cfg, cfg.student, cfg.depth_rule)
    return plan.resolve(donor.source, student.spec)


def inherit(cfg: Config, destination: Path, *, force: bool = False) -> dict[str, Any]:
    """Cut the student of a recipe from its donor and write it as a weights folder; returns its provenance."""
    if cfg.masks.prune_step:
        raise InputError("automatic inheritance learns what to cut: run the recipe with heirloom train, the cut model is RUN/pruned")
    if not cfg.donor:
        raise InputError("this recipe trains from scratch: it names no donor to inherit from")
    donor, student = finite(open_clip_model(cfg.donor), "donor"), functional(Clip, cfg.student)
    record = {"source": cfg.donor, "hashes": hashes(donor.file)} | provenance(resolve(cfg, student, donor))
    inputs = read_inputs(cfg, donor, None)

    def beside(folder: Path) -> None:
        write_json(folder / "provenance.json", record)
        companions(inputs, folder)

    save_params(destination, FAMILY.name, cfg.student, initial(cfg, student, donor, None), beside, force=force)
    return record


def evaluate(cfg: Config) -> list[dict[str, Any]]:
    """Retrieval of the student as it starts, on the recipe's held-out pairs."""
    if not cfg.held_out.path:
        raise InputError("this recipe names no held-out data; give --held-out.path")
    mesh = start(cfg.mesh)
    donor, student = opened(cfg.donor), functional(Clip, cfg.student)
    inputs = read_inputs(cfg, donor or opened(cfg.teacher, "teacher"), open_source(cfg.data) if cfg.tokenizer == "fit" else None)
    params: dict[str, Any] = initial(cfg, student, donor, shardings(student.spec, mesh))
    model: Functional | Masked = student
    if cfg.masks.prune_step:
        masks = initial_masks(donor.cfg if donor else cfg.student, cfg.student)
        params, model = params | deterministic_gates(masks, cfg.masks.round_to), Masked(student)
    return retrieval_on(cfg.held_out, model, inputs.pre, inputs.tokenizer, cfg.student, mesh)(params).rows()


def cache_teacher(cfg: Config, destination: Path) -> dict[str, Any]:
    """Store the embeddings of the recipe's teacher on its data; returns what they are of."""
    teacher = opened(cfg.teacher, "teacher")
    if teacher is None:
        raise InputError("this recipe has no live teacher whose embeddings could be stored: give --teacher SOURCE")
    mesh, source = start(cfg.mesh), open_source(cfg.data)
    inputs = read_inputs(cfg, opened(cfg.donor) or teacher, source)
    return cache.write(destination, source, cfg.data, teacher, inputs.pre, inputs.tokenizer, mesh)


def read_inputs(cfg: Config, donor: Donor | None, source: Source | None) -> Inputs:
    """Preprocessing and tokenizer: what the config names, else the donor's, else CLIP's."""
    pre = Preprocess(size=cfg.student.image.size)
    stored = Path(cfg.teacher.removeprefix(cache.PREFIX)) if cfg.teacher.startswith(cache.PREFIX) else None
    if donor or stored:
        theirs = preprocess_of(donor).announced() if donor else Preprocess.load(stored or "")
        pre = theirs.at(cfg.student.image.size)
    if cfg.tokenizer == "fit":
        if source is None:
            raise InputError("a tokenizer is fitted in training only; name a tokenizer.json")
        tokenizer = Tokenizer.train(captions(source), cfg.student.text.vocab)
    elif cfg.tokenizer:
        tokenizer = Tokenizer.load(cfg.tokenizer)
    else:
        found = tokenizer_of(donor) if donor else Tokenizer.load(stored) if stored else Tokenizer.clip()
        if found is None:
            raise InputError(f"{donor and donor.path} comes without a tokenizer; name one with --tokenizer")
        tokenizer = found
    check_tokenizer(tokenizer, cfg.student.text, "student.text")
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
    """Draw the first batch and print a caption: what is fed is what is meant. The stream is put back to its start.

    Raises InputError when all pictures or all captions are the same: data that was never real trains to chance, without a word.
    """
    before = data.state()
    batch = next(data)
    for name, what in (("image", "pictures"), ("text", "captions")):
        rows = np.asarray(batch[name].addressable_data(0))
        if len(rows) > 1 and (rows == rows[0]).all():
            raise InputError(f"all {what} of the first batch are the same: is {run.config['data']['path']} the data you mean?")
    if jax.process_index() == 0:
        picture = run.directory / "first_batch.png"
        print(f'first caption: "{check_first_batch(batch, inputs.tokenizer, picture, inputs.pre)}"; pictures: {picture}')
    data.restore(before)


def companions(inputs: Inputs, folder: Path) -> None:
    """Preprocessing and tokenizer, beside the weights."""
    inputs.pre.save(folder)
    inputs.tokenizer.save(folder)
