"""Training states on disk. The only module that imports orbax.

Each step has a folder with the arrays (`state`) and a JSON object (`data`: position in the data, open metrics window).
A folder gets its final name when it is complete, so an incomplete one is never restored.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import LatestN

from heirloom.common.errors import InputError

Tree = TypeVar("Tree")
REASON = 200  # characters of the storage library's message that an error quotes


@dataclass(frozen=True)
class Restored(Generic[Tree]):
    """The result of `Checkpoints.restore`."""

    state: Tree
    data: dict[str, Any]


class Checkpoints:
    """The last `keep` states of a run in a folder. Every process of a job makes the same calls."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        """Opens or creates the folder; the next save removes incomplete states. Raises InputError if it cannot be
        created.
        """
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(preservation_policy=LatestN(keep), cleanup_tmp_directories=True)
        with _disk_errors(f"{self.directory}: cannot write checkpoints here"):
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: object, data: dict[str, Any]) -> None:
        """Copies `state` (a tree of arrays) to the host, then writes it in the background.

        data: any JSON object. The state may be donated once this returns. Raises InputError when this save or the one
        before it fails; earlier states stay.
        """
        with _disk_errors(f"{self.directory}: step {step} or the one before it could not be saved"):
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
            )

    def latest(self) -> int | None:
        """Returns the last complete step on disk, or None."""
        with _disk_errors(f"{self.directory}: cannot be read"):
            self._manager.reload()
        return self._manager.latest_step()

    def restore(self, step: int, like: Tree) -> Restored[Tree]:
        """Reads a state in the shapes, dtypes and shardings of `like` (a tree of `jax.ShapeDtypeStruct`).

        The mesh may differ from the one that wrote it. Raises InputError if the step is missing, damaged or has other
        shapes.
        """
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
        with _disk_errors(
            f"{self.directory / str(step)}: cannot be restored; remove it to continue from the state before it"
        ):
            found = self._manager.restore(step, args=args)
        return Restored(found["state"], found["data"])

    def wait(self) -> None:
        """Waits until all saves are on disk. Raises InputError when one failed."""
        with _disk_errors(f"{self.directory}: the last state could not be written (is the disk full?)"):
            self._manager.wait_until_finished()


@contextmanager
def _disk_errors(problem: str) -> Iterator[None]:
    """Turns errors of the disk into InputError: tensorstore raises ValueError for a full or broken disk, the file
    system OSError.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        # tensorstore's messages have the cause last, then all settings in brackets
        cause = str(error).splitlines()[0].split(" [")[0]
        raise InputError(f"{problem} ({cause if len(cause) < REASON else '...' + cause[-REASON:]})") from error
