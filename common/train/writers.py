"""Where else the metrics of a run go, if asked: TensorBoard, Weights & Biases, trackio. Each has an extra."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

from heirloom.common.errors import InputError, Stopped, remark
from heirloom.common.processes import on_first
from heirloom.common.train.about import identity


class Writer(Protocol):
    """Where else the numbers of a line go."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


WriterName = Literal["tensorboard", "wandb", "trackio"]


class TensorBoard:
    """Event files in `directory`, through tensorboardX. `start`: the step resumed from, later events are hidden."""

    def __init__(self, directory: Path, start: int = 0) -> None:
        self._writer = _optional("tensorboardX").SummaryWriter(str(directory), purge_step=start + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at wandb.ai named after the run's folder and the one around it, continued when the run is."""

    def __init__(self, directory: Path, config: Mapping[str, Any], project: str = "heirloom") -> None:
        about = dict(dir=str(directory), config=dict(config), resume="allow")
        self._run = _optional("wandb").init(project=project, id=identity(directory), name=_name(directory), **about)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of trackio's dashboard (`trackio show`), continued when the run is. Its name, which has the run's id, is
    what trackio knows it by.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any], project: str = "heirloom") -> None:
        about = dict(config=dict(config), resume="allow", embed=False)
        name = f"{_name(directory)}-{identity(directory)}"
        self._run = _optional("trackio").init(project=project, name=name, **about)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()


@contextmanager
def open_writers(
    names: Sequence[WriterName], directory: Path, config: Mapping[str, Any], start: int
) -> Iterator[list[Writer]]:
    """Opens the writers of a run's metrics in the first process of a job, and closes them however the block ends.

    Raises InputError in every process where a package is missing or a writer does not start.
    """
    makers: dict[WriterName, Callable[[], Writer]] = {
        "tensorboard": lambda: TensorBoard(directory / "tensorboard", start),
        "wandb": lambda: WeightsAndBiases(directory, config),
        "trackio": lambda: Trackio(directory, config),
    }
    opened: dict[WriterName, Writer] = {}

    def open_all() -> None:
        for name in names:
            try:
                opened[name] = makers[name]()
            except InputError:
                raise
            except Exception as error:  # each package has errors of its own
                how = "log in or go offline as its manual says, or leave it out of writers"
                raise InputError(f"writer {name} does not start ({_line(error)}): {how}") from error

    failed = True
    try:
        if names:
            on_first(open_all)
        yield list(opened.values())
        failed = False
    except Stopped:
        failed = False
        raise
    finally:
        for name, writer in opened.items():
            try:
                writer.close(failed)
            except Exception as error:  # the run's own result counts
                remark(f"writer {name} was not closed ({_line(error)}): its last lines may be missing there")


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _name(directory: Path) -> str:
    """Names a run by its folder and the one around it: stages have the same names in every run."""
    return "-".join(directory.absolute().parts[-2:]).lstrip("/-")


def _optional(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = f"pip install 'heirloom-jax[{name.lower().removesuffix('x')}]'"
        raise InputError(f"{name} is not installed: {extra}, or leave it out of writers") from error
