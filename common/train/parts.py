"""`Parts`: what a method defines for one training. The runner (`recipe.py`) puts them together."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import optax
from jax.sharding import Mesh, Sharding

from heirloom.common.checkpoint.family import Donor, Family, Outline
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
    """What a run opens before it builds anything.

    inputs: the result of `Parts.inputs`. directory: the run folder, for a phase that needs a separate run.
    """

    mesh: Mesh
    donor: Donor | None
    teacher: Donor | None
    inputs: Any = None
    directory: Path = Path()


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluation during a run. score(params): scores on held-out data. draw(params, step, folder): draws samples."""

    score: Score | None = None
    draw: Callable[[Mapping[str, Any], int, Path], None] | None = None

    def __call__(self, params: Mapping[str, Any], step: int, folder: Path) -> dict[str, float]:
        if self.draw:
            self.draw(params, step, folder)
        return self.score(params).summary() if self.score else {}


Look = Callable[[Opened, Batch, Path | None], str]


def no_sidecars(opened: Opened, folder: Path) -> None:
    """Writes no sidecar files."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a method defines for one training. Nothing is opened or allocated until the runner calls a function."""

    family: Family
    student: Any
    """Config of `model`, saved with the weights."""
    model: Model
    loss: Callable[[Teacher | None], LossFn]
    """Makes the loss from the teacher, or None. Raises InputError where config, student and teacher contradict each
    other.
    """
    batch_shapes: Callable[[], Shapes]
    """Shapes of a batch, for the ahead-of-time compiler."""
    batches: Callable[[Opened], Data]
    examples: int
    """Number of examples in a batch; every view counts."""
    donor: str = ""
    teacher: str = ""
    """SOURCE of a teacher whose forward pass is in the step."""
    open: Callable[[str], Donor] | None = None
    """Opens donor and teacher by SOURCE."""
    outline: Callable[[str], Teacher] | None = None
    """Opens the teacher without its weights, where its shapes are known without them."""
    inputs: Callable[[Donor | None, Donor | None], Any] | None = None
    """Reads preprocessing and other inputs from donor and teacher, once."""
    resolve: Callable[[Donor], Resolution] | None = None
    """Resolves the plan against the donor. None: this training inherits nothing."""
    prepare: Callable[[Params], Params] = lambda params: params
    """Changes the parameters before the first step."""
    start: Callable[[Opened, Place | None], Params] | None = None
    """Makes the initial parameters, in place of donor, `resolve` and `prepare`: for a phase that follows another."""
    project: Callable[[Params], Params] | None = None
    """Changes the parameters after every step."""
    scheduled: Callable[[jax.Array], Any] | None = None
    """Computes values for the loss from the number of the step (`make_step`)."""
    optimizer: Callable[[Spec, int], optax.GradientTransformation] | None = None
    """Makes the optimizer from spec and number of steps, in place of the config's."""
    look: Look | None = None
    """Draws the first batch to a PNG (in the first process) and returns a line that describes it."""
    evaluator: Callable[[Opened], Evaluator | None] | None = None
    final: Callable[[Params], Params] = lambda params: params
    """Changes the trained parameters before they are saved."""
    sidecars: Callable[[Opened, Path], None] = no_sidecars
    """Writes the sidecar files of the trained weights: preprocessing, tokenizer."""
    inherited_sidecars: Callable[[Opened, Path], None] | None = None
    """Writes the sidecar files of weights that were inherited and not trained, where they differ."""

    def flops(self, teacher: Teacher | None) -> float:
        """Counts FLOPs of one example: two per multiply-accumulate forward, four backward; teachers forward only."""
        student = 6 * self.family.macs(self.student, self.model.spec)
        return student + (2 * teacher.family.macs(teacher.cfg, teacher.model.spec) if teacher else 0)
