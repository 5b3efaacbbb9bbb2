"""The runner that all methods share: from a recipe's config to a finished run folder.

A run opens the folder, builds the mesh, opens donor and teacher, sets up the data, builds optimizer and step, draws the
first batch, restores or inherits the state, trains, and saves. A method defines its `Parts`; `run`, `inherit`,
`evaluate` and `outline` (for the ahead-of-time compiler) use the same ones.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from heirloom.common.checkpoint.convert import files, first_format, hashes
from heirloom.common.checkpoint.family import Donor, Family
from heirloom.common.checkpoint.state import Keep, steps_on_disk
from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.errors import InputError, between, check_seed, positive
from heirloom.common.evaluate.scored import Scored
from heirloom.common.fetch import origin
from heirloom.common.files import check_outside, read_json, sha256, staged, write_json
from heirloom.common.mesh import MeshConfig, shardings, start
from heirloom.common.nn.functional import functional
from heirloom.common.processes import on_first
from heirloom.common.surgery.graft import graft
from heirloom.common.surgery.plan import Resolution
from heirloom.common.surgery.report import provenance
from heirloom.common.train.about import note_start, note_student
from heirloom.common.train.abstract import Abstract, abstract_batch, abstract_params
from heirloom.common.train.agreement import agree, one_place, versions
from heirloom.common.train.bucket import apart, portable, share
from heirloom.common.train.liveness import watch_each_other
from heirloom.common.train.loop import Cadence, Data, Run
from heirloom.common.train.optim import OptimConfig, frozen_paths, make_optimizer
from heirloom.common.train.parameters import best, finite, load_params, save_params
from heirloom.common.train.parts import Look, Opened, Parts, Place, Teacher
from heirloom.common.train.resume import with_defaults
from heirloom.common.train.sharing import share_indexes
from heirloom.common.train.state import State, abstract_state, create_state
from heirloom.common.train.step import Params, Step, StepConfig, make_step
from heirloom.common.train.watch import keep_compiled
from heirloom.common.train.writers import WriterName, open_writers


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Config that every training has. A method's config adds fields and `parts`."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    step: StepConfig = field(default_factory=StepConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    steps: int = 100_000
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Seed of freshly initialised parameters."""
    writers: tuple[WriterName, ...] = ()
    """Further writers of metrics, next to metrics.jsonl: tensorboard, wandb, trackio; each is an extra of that name."""
    log_every: int = 50
    """Steps between two lines of metrics."""
    eval_every: int = 1000
    """Steps between two evaluations on held-out data."""
    save_every: int = 1000
    """Steps between two training states on disk."""
    keep_last: int = 2
    """Training states that stay on disk: the last ones."""
    keep_every: int = 0
    """Further states that stay: those of each multiple of this number of steps, a multiple of save_every; 0: none."""
    keep_minutes: int = 0
    """Further states that stay: one in this number of minutes; 0: none."""
    stuck_seconds: int = 900
    """Seconds without a step, and ten times the usual step, after which a training says what every thread was doing and
    ends with exit code 70; 0: never.
    """
    profile: int = 0
    """Steps, after the first ten, that are recorded to RUN/profile for xprof or TensorBoard."""
    keep_compiled: bool = True
    """Keep compiled programs in RUN/compiled, so that a resume starts without compiling again; where JAX has a cache
    already (JAX_COMPILATION_CACHE_DIR), they go there.
    """

    def __post_init__(self) -> None:
        check_seed(self.seed)
        positive(self, "steps", "log_every", "eval_every", "save_every", "keep_last")
        between(self, "keep_every", "keep_minutes", "stuck_seconds", "profile", below=2**30)
        if self.keep_every % self.save_every:
            given = f"keep_every is {self.keep_every}, but states are saved every {self.save_every} steps"
            raise InputError(f"{given}: choose a multiple of save_every")

    def parts(self) -> Parts:
        """Returns the method's parts of this training."""
        raise NotImplementedError

    def check(self, mesh: Mesh) -> None:
        """Raises InputError where the config contradicts itself or does not fit the mesh; called first of all."""

    def train(self, directory: Path) -> None:
        run(self, directory)

    def inherit(self, destination: Path, *, force: bool = False) -> dict[str, Any]:
        return inherit(self, self.parts(), destination, force=force)

    def evaluate(self) -> list[dict[str, Any]]:
        return evaluate(self, self.parts()).rows()

    def abstract(self, mesh: Mesh) -> Abstract:
        return outline(self, self.parts(), mesh)

    def describe(self) -> tuple[Family, Any]:
        parts = self.parts()
        return parts.family, parts.student


@dataclass(frozen=True, kw_only=True)
class BaseConfig(RunConfig):
    """Config of a student that may inherit from a donor and learn from a teacher, on data with a held-out part."""

    donor: str = ""
    """SOURCE of the weights to inherit; empty: from scratch."""
    teacher: str = ""
    """SOURCE of the model to distil from; empty: none."""
    data: SourceConfig = field(default_factory=SourceConfig)
    held_out: SourceConfig = field(default_factory=SourceConfig)
    """Data for the evaluation during training; an empty path: no evaluation."""
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)

    def needs(self) -> dict[str, tuple[str, ...]]:
        """Fields that have no effect unless another one, the key, is set."""
        return {}

    def idle(self) -> dict[str, str]:
        """Fields that have no effect in this recipe, and why."""
        missing = {source: names for source, names in self.needs().items() if not getattr(self, source)}
        return {name: f"it has no {source}; set --{source}, too" for source, names in missing.items() for name in names}


def unread_captions(cfg: BaseConfig) -> dict[str, str]:
    """Fields of captions, for `idle` of a recipe that reads none; to leave the column of them empty is no mistake."""
    named = [f"{name}.text" for name in ("data", "held_out") if getattr(cfg, name).text]
    return {name: "it reads no captions" for name in ("pipeline.tags", *named)}


@dataclass(frozen=True, kw_only=True)
class Session:
    """An open run. frozen: the teacher's weights on the devices. data: the stream of batches."""

    cfg: RunConfig
    run: Run
    parts: Parts
    opened: Opened
    frozen: Params | None
    data: Data


def run(cfg: RunConfig, directory: Path, parts: Parts | None = None) -> None:
    """Runs a recipe in a run folder, or resumes it there. parts: in place of `cfg.parts()`.

    Raises InputError for bad input, and Stopped after a graceful shutdown.
    """
    if session := begin(cfg, directory, parts):
        train(session, session.parts)


def begin(cfg: RunConfig, directory: Path, parts: Parts | None = None) -> Session | None:
    """Opens a run before its first phase. Returns None when the run is finished."""
    mesh = start(cfg.mesh)
    agree({"config": portable(asdict(cfg)), "versions": versions()})
    if not apart():
        one_place(directory)
    watch_each_other()
    cfg.check(mesh)
    keep = Keep(last=cfg.keep_last, every=cfg.keep_every, minutes=cfg.keep_minutes)
    run = Run.open(directory, asdict(cfg), keep=keep, defaults=partial(with_defaults, cfg=cfg))
    if run.finished(cfg.steps):
        on_first(lambda: unchanged(run.directory))
        print(f"{directory} is finished: {cfg.steps:,} steps, weights in {run.model}")
        return None
    share_indexes(cfg)
    if cfg.keep_compiled:
        keep_compiled(run.directory / "compiled")
    parts = parts or cfg.parts()
    opened = replace(open_sources(parts, mesh), directory=directory)
    on_first(lambda: same_sources(run, parts, opened))
    on_first(lambda: note_start(run.directory, max(steps_on_disk(run.directory / "checkpoints"), default=0)))
    frozen = load_params(opened.teacher, mesh) if opened.teacher else None
    return Session(cfg=cfg, run=run, parts=parts, opened=opened, frozen=frozen, data=parts.batches(opened))


def open_sources(parts: Parts, mesh: Mesh) -> Opened:
    """Opens donor and teacher and reads the method's inputs. Raises InputError where a weight is NaN or infinite."""
    sources = {"donor": parts.donor, "teacher": parts.teacher}
    found = {
        role: finite(parts.open(source), role) if source and parts.open else None for role, source in sources.items()
    }
    donor, teacher = found["donor"], found["teacher"]
    inputs = parts.inputs(donor, teacher) if parts.inputs else None
    return Opened(mesh=mesh, donor=donor, teacher=teacher, inputs=inputs)


def same_sources(run: Run, parts: Parts, opened: Opened) -> None:
    """Compares donor and teacher with those that the run began with, whose SHA-256 are in `RUN/sources.json`.

    Reads the weights of a new run, and of a resume with another path, or with files of another size or time. Raises
    InputError when these are others.
    """
    file, now = run.directory / "sources.json", {"donor": parts.donor, "teacher": parts.teacher}
    donors = {"donor": opened.donor, "teacher": opened.teacher}
    before: dict[str, Any] = read_json(file) if file.exists() else {}
    known = dict(before)
    for role, donor in donors.items():
        if donor is None:
            continue
        found = {str(part.absolute()): _version(part) for part in files(donor.file)}
        about: dict[str, Any] = {"path": now[role], "files": found}
        if role in before and before[role] | about == before[role]:
            continue
        known[role] = about | {"sha256": sorted(hashes(donor.file).values())}
        if role in before and before[role]["sha256"] != known[role]["sha256"]:
            raise _others(now[role], role, run.directory, before[role]["path"])
    if known != before:
        with staged(file, force=True) as part:
            write_json(part, known)


def unchanged(run: Path) -> None:
    """Raises InputError where donor or teacher of a run have other weights now than it began with.

    Reads the weights only where they are still there, with another size or time.
    """
    file = run / "sources.json"
    for role, about in (read_json(file) if file.exists() else {}).items():
        stored = {Path(part): version for part, version in about.get("files", {}).items()}
        if not all(part.is_file() for part in stored) or all(_version(part) == stored[part] for part in stored):
            continue
        if sorted(map(sha256, stored)) != about["sha256"]:
            raise _others(about["path"], role, run, about["path"])


def _version(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _others(source: str, role: str, run: Path, before: str) -> InputError:
    where = "" if source == before else f" ({before})"
    moved = f"{source} has other weights than the {role} that {run} began with{where}"
    return InputError(f"{moved}; give the same weights, or start a new run")


def train(
    s: Session, parts: Parts, *, first: int = 0, last: int | None = None, finish: Callable[[State], None] | None = None
) -> State:
    """Trains one phase: the steps after `first` up to `last` (None: all). finish(state): instead of `RUN/model`."""
    cfg, opened, spec, folder = s.cfg, s.opened, parts.model.spec, s.run.directory
    mesh, last = opened.mesh, cfg.steps if last is None else last
    optimizer, step = _step(cfg, parts, opened.teacher, s.frozen, mesh, last - first)
    if parts.look and s.run.checkpoints.latest() is None:
        first_look(s, parts.look)

    def new() -> State:
        resolution = parts.resolve(opened.donor) if opened.donor and parts.resolve and not parts.start else None
        if resolution:
            on_first(lambda: _note_inherited(folder, parts.donor, resolution))
        params = initial(cfg, parts, opened, shardings(spec, mesh), resolution)
        state = create_state(params, optimizer, spec, mesh, cfg.step.ema)
        return replace(state, step=jax.device_put(np.int32(first), state.step.sharding)) if first else state

    def write(state: State) -> None:
        sidecars = partial(parts.sidecars, opened)
        final = parts.final(best(state))
        save_params(s.run.model, parts.family.name, parts.student, final, sidecars, spec=spec, force=True)

    on_first(lambda: _note_student(folder, parts))
    state = s.run.restore_or(new, abstract_state(optimizer, spec, mesh, cfg.step.ema), after=first)
    agree({"step": int(state.step), "data": s.data.state(), "resumed": s.run.resumed.get("data")})
    evaluator = parts.evaluator(opened) if parts.evaluator else None
    with open_writers(cfg.writers, folder, s.run.config, int(state.step)) as writers:
        ended = s.run.fit(
            state,
            step,
            s.data,
            last,
            cadence=Cadence(cfg.log_every, cfg.save_every, cfg.eval_every, cfg.stuck_seconds, cfg.profile),
            examples_per_step=parts.examples,
            flops_per_example=parts.flops(opened.teacher),
            writers=writers,
            evaluate=(lambda state: evaluator(best(state), int(state.step), folder)) if evaluator else None,
            on_finish=finish or write,
        )
    share()  # the next phase or stage may read what this one wrote
    return ended


def _note_student(run: Path, parts: Parts) -> None:
    spec = functional(parts.family.module, parts.student).spec  # without what a phase adds for training, such as masks
    note_student(run, parts.family.name, parts.family.parameters(spec), parts.family.macs(parts.student, spec))


def _note_inherited(run: Path, donor: str, resolution: Resolution) -> None:
    """Writes `RUN/provenance.json`; `RUN/sources.json` has the donor's hashes."""
    with staged(run / "provenance.json", force=True) as part:
        write_json(part, {"source": donor} | provenance(resolution))


def _step(
    cfg: RunConfig, parts: Parts, teacher: Teacher | None, frozen: Any, mesh: Mesh, steps: int
) -> tuple[optax.GradientTransformation, Step]:
    spec = parts.model.spec
    optimizer = parts.optimizer(spec, steps) if parts.optimizer else make_optimizer(cfg.optim, spec, steps)
    options: dict[str, Any] = {"frozen": frozen, "project": parts.project, "scheduled": parts.scheduled}
    options |= dict(fixed=frozen_paths(cfg.optim, spec))
    return optimizer, make_step(parts.loss(teacher), optimizer, spec, mesh, cfg.step, **options)


def initial(
    cfg: RunConfig, parts: Parts, opened: Opened, place: Place | None, resolution: Resolution | None = None
) -> Params:
    """Returns the initial student, inherited or from scratch, in its shardings.

    resolution: of `parts.resolve`, if known.
    """
    if parts.start:
        return parts.start(opened, place)
    init = partial(parts.model.init, jax.random.key(cfg.seed))
    if opened.donor and parts.resolve:
        resolution = resolution or parts.resolve(opened.donor)
        return parts.prepare(graft(resolution, opened.donor.source, parts.model.spec, place, init))
    return parts.prepare(init(place=place))


def first_look(s: Session, look: Look) -> None:
    """Draws the first batch for the user to check, and resets the stream."""
    before, first = s.data.state(), jax.process_index() == 0
    picture = s.run.directory / "first_batch.png"
    line = look(s.opened, next(s.data), picture if first else None)
    if first:
        print(f"{line}; pictures: {picture}")
    s.data.restore(before)


def inherit(
    cfg: RunConfig, parts: Parts, destination: Path, *, donor: Donor | None = None, force: bool = False
) -> dict[str, Any]:
    """Writes a recipe's student, inherited from its donor, as a weights folder; returns its provenance.

    donor: one already open.
    """
    donor = donor or (parts.open(parts.donor) if parts.donor and parts.open else None)
    if donor is None or parts.resolve is None:
        raise InputError("this recipe trains from scratch: it has no donor to inherit from")
    check_outside(destination, donor.path)
    finite(donor, "donor")
    inputs = parts.inputs(donor, None) if parts.inputs else None
    # Any mesh serves: a student of a pod's recipe is cut on a laptop.
    opened = Opened(mesh=start(), donor=donor, teacher=None, inputs=inputs)
    resolution = parts.resolve(donor)
    source = {"source": parts.donor or origin(donor.path), "first_format": first_format(donor)}
    record = source | {"hashes": hashes(donor.file)} | provenance(resolution)

    def sidecars(folder: Path) -> None:
        write_json(folder / "provenance.json", record)
        (parts.inherited_sidecars or parts.sidecars)(opened, folder)

    params = initial(cfg, parts, opened, None, resolution)
    save_params(destination, parts.family.name, parts.student, params, sidecars, force=force)
    return record


def evaluate(cfg: RunConfig, parts: Parts) -> Scored:
    """Scores the initial student on the recipe's held-out data. Raises InputError where the recipe has none."""
    mesh = start(cfg.mesh)
    # A teacher only where its inputs are needed.
    opened = open_sources(replace(parts, teacher="") if parts.donor else parts, mesh)
    evaluator = parts.evaluator(opened) if parts.evaluator else None
    if evaluator is None or evaluator.score is None:
        how = "give --held-out.path" if isinstance(cfg, BaseConfig) else "train it, then heirloom eval RUN/model"
        raise InputError(f"this recipe has no data to evaluate on: {how}")
    return evaluator.score(initial(cfg, parts, opened, shardings(parts.model.spec, mesh)))


def outline(cfg: RunConfig, parts: Parts, mesh: Mesh) -> Abstract:
    """Builds the step of `train` from shapes. Raises InputError for a batch that the mesh does not divide."""
    cfg.check(mesh)
    teacher = parts.outline(parts.teacher) if parts.teacher and parts.outline else None
    if isinstance(teacher, Donor) and teacher.quantized:
        raise InputError(f"{teacher.path} is quantised: name the weights it was made from to compile with a teacher")
    frozen = abstract_params(teacher.model.spec, mesh) if teacher else None
    optimizer, step = _step(cfg, parts, teacher, frozen, mesh, cfg.steps)
    state = abstract_state(optimizer, parts.model.spec, mesh, cfg.step.ema)
    batch, flops = abstract_batch(mesh, parts.batch_shapes()), parts.examples * parts.flops(teacher)
    return Abstract(step=step, state=state, batch=batch, flops=flops)
