"""What a method says of one training: the parts that the runner (`recipe.py`) puts together."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import optax
from jax.sharding import Mesh, Sharding

from heirloom.common.checkpoint.convert import Donor, Family, Outline
from heirloom.common.evaluate.scored import Score
from heirloom.common.surgery.axes import Spec
from heirloom.common.surgery.plan import Resolution
from heirloom.common.train.loop import Data
from heirloom.common.train.step import Batch, LossFn, Params

Teacher = Donor | Outline
Place = Mapping[str, Sharding]
Shapes = Mapping[str, tuple[tuple[int, ...], Any]]
"""{column: (shape of a batch, dtype)}."""


class Model(Protocol):
    """A model as functions of its parameters, such as `Functional`."""

    @property
    def spec(self) -> Spec: ...
    def init(self, key: jax.Array, paths: Iterable[str] | None = None, place: Place | None = None) -> Params: ...
    def apply(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any: ...
    def train(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, Params]: ...


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a run has open before it builds anything. inputs: what `Parts.inputs` made of donor and teacher."""

    mesh: Mesh
    donor: Donor | None
    teacher: Donor | None
    inputs: Any = None


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """What is looked at while a run goes on. score(params): on held-out data. draw(params, step, folder): pictures of progress."""

    score: Score | None = None
    draw: Callable[[Mapping[str, Any], int, Path], None] | None = None

    def __call__(self, params: Mapping[str, Any], step: int, folder: Path) -> dict[str, float]:
        if self.draw:
            self.draw(params, step, folder)
        return self.score(params).summary() if self.score else {}


Look = Callable[[Opened, Batch, Path | None], str]


def no_sidecars(opened: Opened, folder: Path) -> None:
    """Nothing is written next to the weights."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a method says of one training. Nothing is opened or allocated until the runner calls one of these functions."""

    family: Family
    student: Any
    """Config that is saved with the weights; `model` computes with it."""
    model: Model
    loss: Callable[[Teacher | None], LossFn]
    """Given the teacher, or None. Raises InputError where config, student and teacher contradict each other."""
    batch: Callable[[], Shapes]
    """Shapes of a batch, for the ahead-of-time compiler."""
    batches: Callable[[Opened], Data]
    examples: int
    """In a batch, every view counted."""
    check: Callable[[str], None] = lambda platform: None
    """Raises InputError where the config contradicts itself, or asks for what the platform (cpu, gpu, tpu) does not have."""
    donor: str = ""
    teacher: str = ""
    """SOURCE of a teacher whose forward pass is part of the step."""
    open: Callable[[str], Donor] | None = None
    """Opens donor and teacher by SOURCE."""
    outline: Callable[[str], Teacher] | None = None
    """The teacher without its weights, where they need not be fetched for its shapes."""
    inputs: Callable[[Donor | None, Donor | None], Any] | None = None
    """Preprocessing and whatever else is read from donor and teacher, once."""
    resolve: Callable[[Donor], Resolution] | None = None
    """Which tensor of the student comes from which of the donor. None: this training inherits nothing."""
    prepare: Callable[[Params], Params] = lambda params: params
    """Changes the parameters before the first step."""
    start: Callable[[Opened, Place | None], Params] | None = None
    """The parameters before the first step, in place of what donor, `resolve` and `prepare` give: for a phase after another."""
    project: Callable[[Params], Params] | None = None
    """Changes the parameters after every step."""
    scheduled: Callable[[jax.Array], Any] | None = None
    """Values of the step's number that the loss wants (`make_step`)."""
    optimizer: Callable[[Spec, int], optax.GradientTransformation] | None = None
    """Given spec and number of steps, in place of the config's own."""
    look: Look | None = None
    """Draws the first batch into a PNG (in the first process) and returns a line that says what it is."""
    evaluator: Callable[[Opened], Evaluator | None] | None = None
    sidecars: Callable[[Opened, Path], None] = no_sidecars
    """Writes what travels with the trained weights: preprocessing, tokenizer."""
    inherited_sidecars: Callable[[Opened, Path], None] | None = None
    """The same for weights that were inherited and not trained, where it differs."""

    def flops(self, teacher: Teacher | None) -> float:
        """Of one example: two operations per multiply-accumulate forward, twice that backward; the teacher goes forward only."""
        student = 6 * self.family.macs(self.student, self.model.spec)
        return student + (2 * teacher.family.macs(teacher.cfg, teacher.model.spec) if teacher else 0)
