"""The loop that codec, encoder and generator share, and batches of zoos."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from heirloom.common.data.pipeline import Batches
from heirloom.common.errors import InputError, positive
from heirloom.common.surgery.axes import Spec
from heirloom.common.train.loop import Cadence, Run
from heirloom.common.train.mesh import MeshConfig, batch_sharding, start
from heirloom.common.train.optim import OptimConfig, make_optimizer
from heirloom.common.train.parameters import best
from heirloom.common.train.state import abstract_state, create_state
from heirloom.common.train.step import LossFn, StepConfig, make_step
from weightgen.zoo.data import Bank
from weightgen.zoo.zoo import Zoo

OPTIMIZER = OptimConfig(lr=1e-3, warmup=100, b2=0.99, eps=1e-8, weight_decay=0.01, clip=1.0)


@dataclass(frozen=True)
class LoopConfig:
    """What the trainings of this package share."""

    steps: int = 2000
    batch: int = 256
    optim: OptimConfig = OPTIMIZER
    step: StepConfig = field(default_factory=lambda: StepConfig(ema=0.995))
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0
    """Of fresh parameters, and of the order and the conditions drawn."""
    log_every: int = 100
    save_every: int = 1000

    def __post_init__(self) -> None:
        positive(self, "steps", "batch", "log_every", "save_every")


def begin(cfg: LoopConfig) -> Mesh:
    """Join the job and build the mesh, before anything else touches a device.

    Raises InputError when the mesh does not fit the devices, or the batch cannot be divided among them.
    """
    mesh = start(cfg.mesh)
    check_batch(cfg, mesh)
    return mesh


def check_batch(cfg: LoopConfig, mesh: Mesh) -> None:
    """Raises InputError when a batch, or a micro-batch of it, cannot be divided among the devices that hold its rows."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if cfg.batch % (parts := devices * cfg.step.accumulate):
        of = f"{devices} devices (mesh data x fsdp)" + (f" x {cfg.step.accumulate} micro-batches" if cfg.step.accumulate > 1 else "")
        nearby = max(cfg.batch // parts, 1) * parts
        raise InputError(f"a batch of {cfg.batch} cannot be divided among {of}: set batch to a multiple of {parts}, such as {nearby}")


def on_first(work: Callable[[], None]) -> None:
    """Run `work` in the first process of a job, for what is written once. The others wait, and fail where it fails.

    Call it in every process, after `start`. Raises the InputError of `work`, in the other processes one that points there.
    """
    if jax.process_count() == 1:
        work()
        return
    failure: InputError | None = None
    if jax.process_index() == 0:
        try:
            work()
        except InputError as error:
            failure = error
    failed = bool(multihost_utils.broadcast_one_to_all(np.int32(failure is not None)))
    if failure:
        raise failure
    if failed:
        raise InputError("process 0 could not write what the others wait for; its own message says why")


def fit(
    run: Run,
    cfg: LoopConfig,
    mesh: Mesh,
    spec: Spec,
    init: Callable[[], dict[str, jax.Array]],
    loss: LossFn,
    data: Batches,
    *,
    frozen: tuple[str, ...] = (),
    no_decay: tuple[str, ...] = (),
    save: Callable[[dict[str, jax.Array]], None] | None = None,
) -> dict[str, jax.Array]:
    """Train in a run folder, or go on there; returns the averaged parameters. `frozen`: path patterns that are not updated.

    Raises InputError when the batch cannot be divided among the devices of the mesh.
    """
    check_batch(cfg, mesh)
    optim = replace(cfg.optim, frozen=(*cfg.optim.frozen, *frozen), no_decay=(*cfg.optim.no_decay, *frozen, *no_decay))
    optimizer = make_optimizer(optim, spec, cfg.steps)
    step = make_step(loss, optimizer, spec, mesh, cfg.step)
    state = run.restore_or(
        lambda: create_state(init(), optimizer, spec, mesh, cfg.step.ema), like=abstract_state(optimizer, spec, mesh, cfg.step.ema)
    )
    state = run.fit(
        state,
        step,
        data,
        cfg.steps,
        examples_per_step=cfg.batch,
        cadence=Cadence(log=cfg.log_every, save=cfg.save_every),
        on_finish=(lambda state: save(best(state))) if save else None,
    )
    return best(state)


def placed(make: Callable[[np.random.Generator], dict[str, np.ndarray]], mesh: Mesh, seed: int) -> Batches:
    """An endless, resumable stream: batch n is `make(rng)` with a generator of (seed, n), placed on the mesh."""

    def start(first: int) -> Iterator[dict[str, Any]]:
        n = first
        while True:
            rows = make(np.random.default_rng([seed, n]))
            yield {name: _place(x, mesh) for name, x in rows.items()}
            n += 1

    return Batches(start, {"seed": seed})


def _place(x: np.ndarray, mesh: Mesh) -> jax.Array:
    return jax.make_array_from_callback(x.shape, batch_sharding(mesh), lambda index: x[index])


def generator_batches(zoo: Zoo, bank: Bank, shots: int, cfg: LoopConfig, mesh: Mesh) -> Batches:
    """Zoo networks with fresh pictures of their classes, 1 to `shots` of each, drawn anew at every step."""

    def make(rng: np.random.Generator) -> dict[str, np.ndarray]:
        rows = np.sort(rng.integers(len(zoo), size=cfg.batch))
        return {
            "tokens": zoo.tokens(rows),
            "support": bank.draw(np.asarray(zoo.classes[rows]), shots, rng),
            "shots": rng.integers(1, shots + 1, size=cfg.batch).astype(np.int32),
        }

    return placed(make, mesh, cfg.seed)


class BaseRecipe:
    """Refuses the verbs that the recipes of this package do not have."""

    def inherit(self, destination: Path, *, force: bool = False) -> Mapping[str, Any]:
        raise InputError("this recipe inherits from no donor: heirloom train runs it")

    def evaluate(self) -> list[dict[str, Any]]:
        raise InputError("this recipe has nothing to score before it is trained: heirloom train, then heirloom eval RUN/model --data DIR")
