"""Trainings from Python: `train` runs a recipe by name and returns a `Trained` run with its metrics and its model."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

import numpy as np
from PIL import Image

from heirloom.common import config
from heirloom.common.errors import InputError, Stopped, nearest, remark
from heirloom.common.files import read_json
from heirloom.common.notebook.shown import Shown, figure_of, picture_of
from heirloom.common.paths import METRICS, all_local, stages_of
from heirloom.common.report.curves import numbers
from heirloom.common.train.metrics import MetricsFile, last_scores
from heirloom.common.typed import build

Model = TypeVar("Model")


@dataclass(frozen=True, repr=False)
class Trained(Shown, Generic[Model]):
    """A run: a folder with config, metrics, checkpoints and the trained weights. open: loads a weights folder."""

    folder: Path
    steps: int
    open: Callable[[str], Model]

    @property
    def _last(self) -> Path:
        """The folder of the run, or of its last stage."""
        return [self.folder, *stages_of(self.folder)][-1]

    @property
    def _steps(self) -> int:
        """The steps of the run, or of its last stage."""
        own = self._last / "config.json"
        return int(read_json(own)["steps"]) if self._last != self.folder and own.is_file() else self.steps

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: `step`, `loss`, further means, and `eval/NAME` where it was evaluated."""
        return MetricsFile(self._last / METRICS).lines()

    @property
    def scores(self) -> dict[str, float]:
        """The scores of the last evaluation, by name; shares, not percent."""
        return last_scores(self.metrics)[1]

    def curve(self, name: str = "loss") -> tuple[np.ndarray, np.ndarray]:
        """Returns steps [n] and values [n] of a metric (`loss`, `eval/r1`, `timing/mfu`), where the value is finite.

        Raises InputError for an unknown one.
        """
        found = numbers(self.metrics)
        if name not in found:
            raise InputError(f"no metric {name!r}{nearest(name, found)} (there are {', '.join(found)})")
        steps, values = np.array(found[name].steps), np.array(found[name].values)
        finite = ~np.isnan(values)
        return steps[finite], values[finite]

    def plot(self, *names: str) -> Image.Image:
        """Draws the curves of metrics, by default the loss and the scores; returns a PIL image."""
        shown = names or tuple(name for name in numbers(self.metrics) if name == "loss" or name.startswith("eval/"))
        return picture_of(figure_of({name: self.curve(name) for name in shown}))

    @cached_property
    def model(self) -> Model:
        """The trained model, loaded. Raises InputError for a run that is not finished, or that trains no model."""
        folder = self._last / "model"
        if not folder.is_dir():
            continues = f"it is not finished: train(..., run={str(self.folder)!r}) continues it"
            why = continues if self.unfinished else "its recipe trains none"
            raise InputError(f"{self.folder} has no model: {why}")
        return self.open(str(folder))

    @property
    def unfinished(self) -> bool:
        """Whether the run stopped before its last step."""
        return bool(self._steps) and (not self.metrics or self.metrics[-1]["step"] < self._steps)

    @property
    def first_batch(self) -> Image.Image:
        """The pictures of the first batch, as the model saw them. Raises InputError where the run has none."""
        file = self._last / "first_batch.png"
        if not file.is_file():
            raise InputError(f"{self.folder} has no first_batch.png: this training has no pictures, or has not begun")
        return Image.open(file)

    def summary(self) -> None:
        """Prints what the run has reached, and how to look at it."""
        print(self)
        print(f"  curves and pictures as one page: heirloom report {self.folder}")

    def _facts(self) -> tuple[str, dict[str, str]]:
        done = self.metrics[-1]["step"] if self.metrics else 0
        title = f"{self._last}: step {done:,}" + (f" of {self._steps:,}" if self._steps else "")
        losses = [line["loss"] for line in self.metrics if line["loss"] is not None]
        facts = {"loss": f"{losses[0]:.4g} at first, {losses[-1]:.4g} at last"} if losses else {}
        if self.scores:
            facts["held out"] = ", ".join(f"{name} {value:.4g}" for name, value in self.scores.items())
        return title, facts | ({"model": str(self._last / "model")} if (self._last / "model").is_dir() else {})


def train(
    recipe: Any,
    run: str | os.PathLike[str] | None,
    given: Mapping[str, Any],
    package: str,
    open: Callable[[str], Model],
) -> Trained[Model]:
    """Trains a recipe, or resumes it; the verb `train` of each package.

    recipe: its name, a file, or a config. run: the folder; the same folder again resumes. None: a new folder in `runs`.
    given: fields of the config, nested ones as dictionaries. package: whose recipes these are. Raises InputError for
    bad input. A run that is interrupted saves its state, says so, and is returned as it is.
    """
    cfg = configured(recipe, given, package)
    if not hasattr(cfg, "train"):
        raise InputError(f"{type(cfg).__name__} has no train: give the name of a recipe or its config")
    folder = Path(run) if run is not None else new_folder(recipe if isinstance(recipe, str) else package)
    trained = Trained(folder, getattr(cfg, "steps", 0), open)
    try:
        cfg.train(folder)
    except Stopped as stopped:
        remark(f"{str(stopped).partition(';')[0]}; run={str(folder)!r} continues it")
    return trained


def configured(recipe: Any, given: Mapping[str, Any], package: str) -> Any:
    """Returns the config of a recipe with fields replaced. Raises InputError for another package's recipe."""
    cfg = recipe
    if isinstance(recipe, str | Path):
        cfg = config.load(str(recipe))
        method = type(cfg).__module__.partition(".")[0]
        if recipe in config.recipes() and method != package:
            raise InputError(f"{recipe} is a recipe of {method}: call {method}.train({str(recipe)!r})")
    cfg = replaced(cfg, given)
    config.refuse_idle(cfg, {name: name for name in _paths(given)})
    all_local(cfg, f"{package}.train")
    return cfg


def replaced(cfg: Any, given: Mapping[str, Any], where: str = "") -> Any:
    """Returns a config with fields replaced, nested ones by dictionaries: `steps=50, optim={"lr": 3e-4}`.

    Raises InputError for an unknown field, and for a value that is not of its type.
    """
    if not is_dataclass(cfg) or isinstance(cfg, type):
        raise InputError(f"{type(cfg).__name__} is no config: give the name of a recipe or its config")
    known, hints = [field.name for field in fields(cfg)], get_type_hints(type(cfg))
    changed: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise InputError(f"no field {where}{name}{nearest(name, known)} (there are {', '.join(known)})")
        before = getattr(cfg, name)
        if isinstance(value, Mapping) and is_dataclass(before):
            changed[name] = replaced(before, value, f"{where}{name}.")
        elif is_dataclass(value) or (isinstance(value, tuple) and any(map(is_dataclass, value))):
            changed[name] = value
        else:
            plain = os.fspath(value) if isinstance(value, os.PathLike) else value
            changed[name] = build(hints[name], plain, f"{where}{name}")
    return replace(cfg, **changed)


def _paths(given: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Yields the given fields as a.b."""
    for name, value in given.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{where}{name}.")
        else:
            yield f"{where}{name}"


def new_folder(recipe: str) -> Path:
    """Returns a folder in `runs` that does not exist yet: runs/tinyclip-emoji, runs/tinyclip-emoji-2, ..."""
    stem = re.sub(r"[^\w.]+", "-", recipe.removesuffix(".py")).strip("-.")
    names = (f"{stem}-{n}" if n > 1 else stem for n in count(1))
    return next(folder for name in names if not (folder := Path("runs") / name).exists())
