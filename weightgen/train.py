"""The loop that codec, encoder and generator share, and batches of zoos."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import optax
from jax.sharding import Mesh

from heirloom.common.data.batches import Batches
from heirloom.common.errors import InputError, positive
from heirloom.common.mesh import row_shards, split_rows
from heirloom.common.notebook.modules import make_callable
from heirloom.common.surgery.axes import Spec
from heirloom.common.train.optim import OptimConfig, make_optimizer
from heirloom.common.train.parts import Parts, Shapes
from heirloom.common.train.recipe import RunConfig
from heirloom.common.train.step import LossFn, StepConfig
from weightgen.zoo.data import Bank
from weightgen.zoo.zoo import Zoo

OPTIMIZER = OptimConfig(lr=1e-3, warmup=100, b2=0.99, eps=1e-8, weight_decay=0.01, clip=1.0)


@dataclass(frozen=True, kw_only=True)
class LoopConfig(RunConfig):
    """What the trainings of this package share."""

    batch: int = 256
    optim: OptimConfig = OPTIMIZER
    step: StepConfig = field(default_factory=lambda: StepConfig(ema=0.995))
    steps: int = 2000
    """Optimizer steps of the whole run."""
    seed: int = 0
    """Of fresh parameters, and of the order and the conditions drawn."""
    log_every: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "batch")

    def check(self, mesh: Mesh) -> None:
        check_batch(self.batch, self.step, mesh)

    def idle(self) -> dict[str, str]:
        """Fields that do nothing here, and why."""
        why = "nothing is evaluated while it trains: run heirloom eval RUN/model --data DIR after it"
        return {"eval_every": why}

    def former(self) -> dict[str, str]:
        """Former prefixes of flags, and the present ones."""
        return {"loop.": ""}


def check_batch(batch: int, step: StepConfig, mesh: Mesh, name: str = "batch") -> None:
    """Raises InputError unless devices divide a batch, and its micro-batches, into equal rows."""
    devices = row_shards(mesh)
    if batch % (parts := devices * step.accumulate):
        micro = f" x {step.accumulate} micro-batches" if step.accumulate > 1 else ""
        of = f"{devices} devices (mesh data x fsdp){micro}"
        nearby = max(batch // parts, 1) * parts
        multiple = f"a multiple of {parts}, such as {nearby}"
        raise InputError(f"a batch of {batch} cannot be divided among {of}: set {name} to {multiple}")


def optimizer(
    cfg: LoopConfig, spec: Spec, steps: int, frozen: tuple[str, ...] = (), no_decay: tuple[str, ...] = ()
) -> optax.GradientTransformation:
    """The config's optimizer. frozen: path patterns that are not updated. no_decay: patterns without weight decay."""
    optim = replace(cfg.optim, frozen=(*cfg.optim.frozen, *frozen), no_decay=(*cfg.optim.no_decay, *frozen, *no_decay))
    return make_optimizer(optim, spec, steps)


Make = Callable[[np.random.Generator], dict[str, np.ndarray]]
"""Draws the rows of one batch."""


def shapes(make: Make) -> Shapes:
    """The shapes of the batches that `make` draws."""
    return {name: (x.shape, x.dtype) for name, x in make(np.random.default_rng(0)).items()}


def placed(make: Make, mesh: Mesh, seed: int, zoo: Zoo) -> Batches:
    """An endless, resumable stream: batch n is `make(rng)` with a generator of (seed, n), placed on the mesh.

    A run goes on with the networks that it began with alone: a zoo may be made again under the same path.
    """

    def start(first: int) -> Iterator[dict[str, Any]]:
        n = first
        while True:
            rows = make(np.random.default_rng([seed, n]))
            yield {name: split_rows(x, mesh) for name, x in rows.items()}
            n += 1

    return Batches(start, {"seed": seed, "networks": len(zoo), "zoo": zoo.digest()})


def rows_parts(cfg: LoopConfig, make: Make, loss: LossFn, zoo: Zoo, **fields: Any) -> Parts:
    """The parts of a training on rows of a zoo that `make` draws, without a teacher.

    fields: the other fields of `Parts`.
    """
    return Parts(
        loss=lambda teacher: loss,
        batch_shapes=lambda: shapes(make),
        batches=lambda opened: placed(make, opened.mesh, cfg.seed, zoo),
        examples=cfg.batch,
        **fields,
    )


def generator_rows(zoo: Zoo, bank: Bank, shots: int, batch: int) -> Make:
    """Zoo networks with fresh pictures of their classes, 1 to `shots` of each, drawn anew at every step."""

    def make(rng: np.random.Generator) -> dict[str, np.ndarray]:
        rows = np.sort(rng.integers(len(zoo), size=batch))
        support = bank.draw(np.asarray(zoo.classes[rows]), shots, rng)
        numbers = rng.integers(1, shots + 1, size=batch).astype(np.int32)
        return {"tokens": zoo.tokens(rows), "support": support, "shots": numbers}

    return make


make_callable(__name__, "weightgen.pretrained:train")
