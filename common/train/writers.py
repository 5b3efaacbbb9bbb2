"""Where else the metrics of a run go, if asked: TensorBoard, Weights & Biases, trackio. Each has an extra."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

import jax

from heirloom.common.errors import InputError


class Writer(Protocol):
    """Where else the numbers of a line go."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...


WriterName = Literal["tensorboard", "wandb", "trackio"]


class TensorBoard:
    """Event files in `directory`, through tensorboardX. `start`: the step resumed from, later events are hidden."""

    def __init__(self, directory: Path, start: int = 0) -> None:
        self._writer = _optional("tensorboardX").SummaryWriter(str(directory), purge_step=start + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


class WeightsAndBiases:
    """A run at wandb.ai named after the run's folder, continued when the run is."""

    def __init__(self, directory: Path, config: Mapping[str, Any], project: str = "heirloom") -> None:
        name = Path(directory).name
        about = dict(dir=str(directory), config=dict(config), resume="allow")
        self._run = _optional("wandb").init(project=project, id=name, name=name, **about)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)


class Trackio:
    """A run of trackio's dashboard (`trackio show`), named after the run's folder, continued when the run is."""

    def __init__(self, directory: Path, config: Mapping[str, Any], project: str = "heirloom") -> None:
        about = dict(config=dict(config), resume="allow", embed=False)
        self._run = _optional("trackio").init(project=project, name=Path(directory).name, **about)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)


def open_writers(names: Sequence[WriterName], directory: Path, config: Mapping[str, Any], start: int) -> list[Writer]:
    """Opens the writers of a run's metrics. Raises InputError, saying what to install, where a package is missing."""
    makers: dict[WriterName, Callable[[], Writer]] = {
        "tensorboard": lambda: TensorBoard(directory / "tensorboard", start),
        "wandb": lambda: WeightsAndBiases(directory, config),
        "trackio": lambda: Trackio(directory, config),
    }
    return [makers[name]() for name in names] if jax.process_index() == 0 else []


def _optional(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = f"pip install 'heirloom-jax[{name.lower().removesuffix('x')}]'"
        raise InputError(f"{name} is not installed: {extra}, or leave it out of writers") from error
