"""Training a DiT or LiT: the recipe's config, its loss, and one linear trainer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from heirloom.common.checkpoint.convert import Donor, Family, hashes
from heirloom.common.checkpoint.weights import write_json
from heirloom.common.compile import Abstract, Outline, abstract_batch, abstract_params
from heirloom.common.config import to_json
from heirloom.common.data.labelled import open_labelled
from heirloom.common.data.pipeline import PipelineConfig, training_batches
from heirloom.common.data.sources import SourceConfig
from heirloom.common.diffusion import add_noise, linear_schedule
from heirloom.common.errors import InputError, positive, remark
from heirloom.common.nn.functional import Functional, functional
from heirloom.common.surgery.graft import graft
from heirloom.common.surgery.plan import Resolution
from heirloom.common.surgery.report import provenance
from heirloom.common.train.loop import Run
from heirloom.common.train.mesh import MeshConfig, replicated, shardings, split_rows, start
from heirloom.common.train.metrics import WriterName, open_writers
from heirloom.common.train.optim import OptimConfig, make_optimizer
from heirloom.common.train.parameters import best, finite, load_params, save_params
from heirloom.common.train.state import State, abstract_state, create_state
from heirloom.common.train.step import LossFn, StepConfig, cast, make_step
from lit_jax.autoencoder import AutoencoderConfig
from lit_jax.data import Pixels, is_latent, latents
from lit_jax.decode import Pictures, open_pictures, to_uint8
from lit_jax.dit import Dit, DitConfig, macs
from lit_jax.inherit import Keep, graft_attention
from lit_jax.kernels import PLATFORMS
from lit_jax.latents import cached_origin, sample_cached
from lit_jax.losses import DistillConfig, diffusion, distillation, split
from lit_jax.origin import Origin, copy_origin, read_origin, same_latents, write_origin
from lit_jax.sample import Draw, SampleConfig, drawer, save_grid
from lit_jax.zoo import FAMILY, open_dit, outline

DIT_OPTIMIZER = OptimConfig(lr=1e-4, warmup=0, schedule="constant", b2=0.999, eps=1e-8, weight_decay=0.0, clip=None)


@dataclass(frozen=True)
class Config:
    """One run of DiT or LiT."""

    student: DitConfig = field(default_factory=DitConfig)
    donor: str = ""
    """SOURCE of the DiT to inherit from; empty: from scratch."""
    keep: Keep = "none"
    """Projections of self-attention that are inherited as well: none, as in the paper; o, v, ...; all, from a donor of the same kind."""
    teacher: str = ""
    """SOURCE of the model to distil from; empty: none."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    label_drop: float = 0.1
    """Share of the examples whose label is hidden, for classifier-free guidance."""
    data: SourceConfig = field(default_factory=SourceConfig)
    """Labelled pictures, cropped to student.size pixels; or a latent cache."""
    label: str = "label"
    """Column of the class: numbers from 0, or names, which are numbered in alphabetical order."""
    flips: float = 0.5
    """Share of the pictures that are mirrored. A latent cache holds both and takes either half of the time."""
    pipeline: PipelineConfig = field(default_factory=lambda: PipelineConfig(batch=256))
    held_out: SourceConfig = field(default_factory=SourceConfig)
    """Data of the same kind for the loss on noise it was not trained on; an empty path: none."""
    autoencoder: str = ""
    """SOURCE of the decoder that turns sampled latents into pictures; not needed to train on a cache."""
    sample: SampleConfig = field(default_factory=lambda: SampleConfig(steps=50, guidance=4.0))
    """How the grid is drawn that shows progress; its scores are not the paper's."""
    samples: int = 16
    """Pictures in the grid, classes in turn; 0: none."""
    optim: OptimConfig = DIT_OPTIMIZER
    step: StepConfig = field(default_factory=lambda: StepConfig(ema=0.9999))
    mesh: MeshConfig = field(default_factory=MeshConfig)
    steps: int = 400_000
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Seed of freshly initialised parameters."""
    writers: tuple[WriterName, ...] = ()
    """Where metrics go beside metrics.jsonl: tensorboard (needs tensorboardX), wandb."""
    log_every: int = 100
    eval_every: int = 10_000
    """Steps between two sample grids, RUN/samples/STEP.png, and scores on held-out data."""
    save_every: int = 10_000

    def __post_init__(self) -> None:
        positive(self, "steps", "log_every", "eval_every", "save_every")
        positive(self.pipeline, "batch")

    def train(self, directory: Path) -> None:
        train(self, directory)

    def inherit(self, destination: Path, *, force: bool = False) -> dict[str, Any]:
        return inherit(self, destination, force=force)

    def evaluate(self) -> list[dict[str, Any]]:
        raise InputError("a recipe of lit is scored by its trained weights: heirloom eval RUN --features ... --data ...")

    def abstract(self, mesh: Mesh) -> Abstract:
        return abstract(self, mesh)

    def describe(self) -> tuple[Family, DitConfig]:
        return FAMILY, self.student


def train(cfg: Config, directory: Path) -> None:
    """Run a recipe in its folder, or go on where it stopped. Raises InputError for anything the user can mend."""
    run = Run.open(directory, to_json(cfg))
    mesh = start(cfg.mesh)
    check_device(cfg.student, jax.default_backend())
    if run.finished(cfg.steps):
        print(f"{directory} is finished: {cfg.steps:,} steps, weights in {run.model}")
        return

    donor, teacher = opened(cfg.donor), opened(cfg.teacher if cfg.distill.active else "", "teacher")
    source = open_labelled(cfg.data, cfg.label, cfg.student.classes)
    origin = latents_of(cfg, donor, teacher)
    cached = origin.cfg if origin else None
    example = latents if cached else Pixels(cfg.student.size, cfg.flips)
    check_shapes(cfg, example(source[0], np.random.default_rng(0)), teacher)
    data = training_batches(source, cfg.pipeline, example, mesh=mesh)
    pictures = open_pictures(cfg.student, cfg.autoencoder, mesh, origin)

    student = functional(Dit, cfg.student)
    optimizer = make_optimizer(cfg.optim, student.spec, cfg.steps)
    step = make_step(
        loss_fn(cfg, student, teacher, cached),
        optimizer,
        student.spec,
        mesh,
        cfg.step,
        frozen=load_params(teacher, mesh) if teacher else None,
    )
    state = run.restore_or(
        lambda: create_state(initial(cfg, student, donor, shardings(student.spec, mesh)), optimizer, student.spec, mesh, cfg.step.ema),
        like=abstract_state(optimizer, student.spec, mesh, cfg.step.ema),
    )
    if int(state.step) == 0 and not cached:
        first_look(run, data)
    # A kernel that is named for the steps does not take the f32 weights that are scored and drawn from.
    trained = functional(Dit, cfg.student.kept)
    score = held_out_loss(cfg, trained, mesh) if cfg.held_out.path else None
    draw = drawer(trained, cfg.student, cfg.sample, mesh) if cfg.samples and pictures else None

    def evaluate(state: State) -> dict[str, float]:
        if draw and pictures:
            show(cfg, run, draw, pictures, int(state.step), best(state))
        return score(best(state)) if score else {}

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
        evaluate=evaluate if draw or score else None,
        on_finish=lambda state: save_params(
            run.model, FAMILY.name, cfg.student.kept, best(state), lambda folder: write_origin(folder, origin), force=True
        ),
        flops_per_example=flops(cfg, student, teacher),
    )


def flops(cfg: Config, student: Functional, teacher: Donor | Outline | None) -> float:
    """Of one example: two operations per multiply-accumulate forward, twice that backward; the teacher goes forward only."""
    return 6 * macs(cfg.student, student.spec) + (2 * macs(teacher.cfg, teacher.model.spec) if teacher else 0)


def abstract(cfg: Config, mesh: Mesh) -> Abstract:
    """The step of `train` with shapes for arrays: latents as `cache_latents` keeps them where there is an autoencoder, else pixels."""
    check_device(cfg.student, mesh.devices.flat[0].platform)
    student = functional(Dit, cfg.student)
    teacher = outline(cfg.teacher) if cfg.teacher and cfg.distill.active else None
    cached = AutoencoderConfig() if cfg.autoencoder else None
    optimizer = make_optimizer(cfg.optim, student.spec, cfg.steps)
    frozen = abstract_params(teacher.model.spec, mesh) if teacher else None
    step = make_step(loss_fn(cfg, student, teacher, cached), optimizer, student.spec, mesh, cfg.step, frozen=frozen)
    n, size, channels = cfg.pipeline.batch, cfg.student.size, cfg.student.channels
    inputs: Any = {"moments": ((n, 2, size, size, 2 * channels), jnp.float16)}
    if not cached:
        inputs = {"image": ((n, size, size, channels), jnp.float32)}
    batch = abstract_batch(mesh, label=((n,), jnp.int32), **inputs)
    return Abstract(step, abstract_state(optimizer, student.spec, mesh, cfg.step.ema), batch, n * flops(cfg, student, teacher))


def opened(source: str, role: str = "donor") -> Donor | None:
    """The checkpoint a config names, if it names one."""
    return finite(open_dit(source), role) if source else None


def latents_of(cfg: Config, *models: Donor | None) -> Origin | None:
    """The autoencoder whose latents `cfg.data` are; None for pictures. Raises InputError where held-out data or a model has others."""
    origin = cached_origin(Path(cfg.data.path)) if is_latent(cfg.data) else None
    if origin is None:
        return None
    if not origin.encoder:
        remark(f"{cfg.data.path}: a cache of an earlier version, which does not say which autoencoder made it; {origin} is assumed to fit")
    others = {cfg.held_out.path: Path(cfg.held_out.path)} if is_latent(cfg.held_out) else {}
    others |= {str(model.path): model.folder for model in models if model}
    for name, folder in others.items():
        if other := read_origin(folder):
            remark(same_latents(origin, other, cfg.data.path, name))
    return origin


def check_device(cfg: DitConfig, platform: str) -> None:
    """Raises InputError where a kernel is asked for that is another platform's."""
    if (wanted := PLATFORMS.get(cfg.implementation or "", platform)) != platform:
        raise InputError(f"student.implementation {cfg.implementation} is for {wanted}, this is {platform}: set it to xla")


def check_shapes(cfg: Config, example: Mapping[str, np.ndarray], teacher: Donor | None) -> None:
    """Raises InputError where data, student and teacher do not see the same thing."""
    c = cfg.student
    given = example["image"].shape if "image" in example else (*example["moments"].shape[1:3], example["moments"].shape[3] // 2)
    if given != (c.size, c.size, c.channels):
        takes = f"the student takes {[c.size, c.size, c.channels]}"
        raise InputError(f"the data is {list(given)}, {takes}: set student.size and student.channels")
    if cfg.label_drop and not c.null_class:
        raise InputError(f"label_drop is {cfg.label_drop:g}, and the student has no class for none: set label_drop 0")
    if teacher and cfg.label_drop and cfg.distill.dropped == "shared" and not teacher.cfg.null_class:
        raise InputError("the teacher has no class for none: set distill.dropped student, so that it sees every label, or label_drop 0")
    if teacher and (t := teacher.cfg) and (t.size, t.channels, t.classes) != (c.size, c.channels, c.classes):
        theirs = f"{t.size} x {t.size} x {t.channels} of {t.classes} classes"
        raise InputError(f"the teacher sees {theirs}, the student {c.size} x {c.size} x {c.channels} of {c.classes}")


def loss_fn(cfg: Config, student: Functional, teacher: Donor | Outline | None, cached: AutoencoderConfig | None) -> LossFn:
    """DiT's loss on pixels or on latents drawn from their moments, and the teacher's two terms; one forward pass each."""
    schedule = linear_schedule()

    def loss(params: dict[str, Any], batch: dict[str, Any], key: jax.Array, frozen: Any) -> tuple[jax.Array, dict[str, Any]]:
        time_key, noise_key, drop_key, latent_key = jax.random.split(key, 4)
        clean = sample_cached(cached, batch["moments"], latent_key) if cached else batch["image"]
        n = len(clean)
        step = jax.random.randint(time_key, (n,), 0, len(schedule))
        noise = jax.random.normal(noise_key, clean.shape)
        noisy = add_noise(schedule, clean, step, noise)
        dropped = jnp.where(jax.random.uniform(drop_key, (n,)) < cfg.label_drop, cfg.student.classes, batch["label"])

        predicted = split(student.apply(params, noisy, step, dropped))
        parts = diffusion(schedule, predicted, clean, noisy, step, noise)._asdict()
        total = parts["mse"] + parts["bound"]
        if teacher:
            labels = dropped if cfg.distill.dropped == "shared" else batch["label"]
            theirs = split(teacher.model.apply(cast(frozen, cfg.step.compute), noisy, step, labels))
            apart = distillation(schedule, predicted, theirs, step, cfg.distill.target)
            total = total + cfg.distill.noise * apart.noise + cfg.distill.variance * apart.variance
            parts |= {"kd_noise": apart.noise, "kd_variance": apart.variance}
        return total.mean(), {name: (value.sum(), float(n)) for name, value in parts.items()}

    return loss


HELD_OUT, ROWS = 512, 128  # pictures that the held-out loss looks at, and how many at a time


def held_out_loss(cfg: Config, student: Functional, mesh: Mesh) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    """`params -> {"mse": ...}`: squared error of the noise, averaged over evenly spread times; noise and times are always the same."""
    source, schedule = open_labelled(cfg.held_out, cfg.label, cfg.student.classes), linear_schedule()
    cached = cached_origin(Path(cfg.held_out.path)).cfg if is_latent(cfg.held_out) else None
    example, rng = latents if cached else Pixels(cfg.student.size, flips=0.0), np.random.default_rng(0)
    examples = [example(source[int(i)], rng) for i in rng.permutation(len(source))[:HELD_OUT]]
    batch = {name: np.stack([x[name] for x in examples]) for name in examples[0]}
    n = len(examples)
    clean = sample_cached(cached, jnp.asarray(batch["moments"]), jax.random.key(0)) if cached else jnp.asarray(batch["image"])
    step = jnp.asarray(rng.permutation(n) * len(schedule) // n, jnp.int32)
    noise = jax.random.normal(jax.random.key(1), clean.shape)
    noisy = add_noise(schedule, clean, step, noise)

    errors, columns = noise_errors(student, mesh), [np.asarray(x) for x in (noisy, step, batch["label"], noise)]

    def score(params: Mapping[str, Any]) -> dict[str, float]:
        with jax.set_mesh(mesh):
            parts = [[x[i : i + ROWS] for x in columns] for i in range(0, n, ROWS)]
            rows = [np.asarray(errors(params, *(split_rows(x, mesh) for x in part)))[: len(part[0])] for part in parts]
        return {"mse": float(np.concatenate(rows).mean())}

    return score


def noise_errors(student: Functional, mesh: Mesh) -> Callable[..., jax.Array]:
    """`(params, noisy, step, labels, noise) -> [row]`: the mean squared error of each row's predicted noise."""

    @partial(jax.jit, out_shardings=replicated(mesh))
    def errors(params: Mapping[str, Any], noisy: jax.Array, step: jax.Array, labels: jax.Array, noise: jax.Array) -> jax.Array:
        return jnp.square(split(student.apply(params, noisy, step, labels)).noise - noise).mean((1, 2, 3))

    return errors


def initial(cfg: Config, student: Functional, donor: Donor | None, place: Mapping[str, Any] | None) -> dict[str, jax.Array]:
    """The student before the first step: inherited or from scratch, in its shardings."""
    init = partial(student.init, jax.random.key(cfg.seed))
    return graft(resolve(cfg, student, donor), donor.source, student.spec, place, init) if donor else init(place=place)


def resolve(cfg: Config, student: Functional, donor: Donor) -> Resolution:
    return graft_attention(donor.cfg, cfg.student, cfg.keep).resolve(donor.source, student.spec)


def inherit(cfg: Config, destination: Path, *, force: bool = False) -> dict[str, Any]:
    """Cut the student of a recipe from its donor and write it as a weights folder; returns its provenance."""
    if not cfg.donor:
        raise InputError("this recipe trains from scratch: it names no donor to inherit from")
    donor, student = finite(open_dit(cfg.donor), "donor"), functional(Dit, cfg.student)
    record = {"source": cfg.donor, "hashes": hashes(donor.file)} | provenance(resolve(cfg, student, donor))
    params, kept = initial(cfg, student, donor, None), cfg.student.kept

    def sidecars(folder: Path) -> None:
        write_json(folder / "provenance.json", record)
        copy_origin(donor.folder, folder)

    save_params(destination, FAMILY.name, kept, params, sidecars, force=force)
    return record


def first_look(run: Run, data: Any) -> None:
    """Draw the first batch: what is fed is what is meant. The stream is put back to its start."""
    before = data.state()
    batch = next(data)
    if jax.process_index() == 0:
        pixels, labels = (np.asarray(batch[name].addressable_data(0))[:64] for name in ("image", "label"))
        save_grid(to_uint8(pixels), run.directory / "first_batch.png")
        print(f"first labels: {', '.join(map(str, labels[:8]))}; pictures: {run.directory / 'first_batch.png'}")
    data.restore(before)


def show(cfg: Config, run: Run, draw: Draw, pictures: Pictures, step: int, params: Mapping[str, Any]) -> None:
    """Write a grid of samples, from the same noise every time."""
    labels = np.arange(cfg.samples) % cfg.student.classes
    drawn = pictures(draw(params, labels, jax.random.key(cfg.seed)), where=f"samples at step {step}: ")
    if jax.process_index() == 0:
        folder = run.directory / "samples"
        folder.mkdir(exist_ok=True)
        save_grid(drawn, folder / f"{step:07d}.png")
