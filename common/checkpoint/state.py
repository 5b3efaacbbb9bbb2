"""Training states on disk. The only importer of orbax.

One folder per step holds the arrays (`state`) and a JSON object (`data`: where the data stand, the open metrics window).
A folder gets its final name when everything in it is written, so a half-written one is never picked.
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
REASON = 200  # characters of the storage library's own message that an error repeats


@dataclass(frozen=True)
class Restored(Generic[Tree]):
    """What `Checkpoints.restore` read."""

    state: Tree
    data: dict[str, Any]


class Checkpoints:
    """The last `keep` states of a run, in a folder; every process of a job makes the same calls."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        """Open or create the folder; half-written states are cleared away by the next save. Raises InputError if it cannot be made."""
        self.directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(preservation_policy=LatestN(keep), cleanup_tmp_directories=True)
        with _mendable(f"{self.directory}: cannot keep checkpoints here"):
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: object, data: dict[str, Any]) -> None:
        """Copy `state` (a tree of arrays) off the devices, then write it while training goes on.

        data: any JSON object. The state may be donated as soon as this returns.
        Raises InputError when this or the save before it fails; states written earlier stay.
        """
        with _mendable(f"{self.directory}: step {step} or the one before it could not be saved"):
            self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)))

    def latest(self) -> int | None:
        """The last complete step on disk, or None."""
        with _mendable(f"{self.directory}: cannot be read"):
            self._manager.reload()
        return self._manager.latest_step()

    def restore(self, step: int, like: Tree) -> Restored[Tree]:
        """Read a state straight into the shapes, dtypes and shardings of `like` (a tree of `jax.ShapeDtypeStruct`).

        The mesh may be another than the one that wrote it. Raises InputError if the step is absent, damaged or of other shapes.
        """
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
        with _mendable(f"{self.directory / str(step)}: cannot be restored; remove it to continue from the state before it"):
            found = self._manager.restore(step, args=args)
        return Restored(found["state"], found["data"])

    def wait(self) -> None:
        """Return when everything saved is on disk. Raises InputError when that failed."""
        with _mendable(f"{self.directory}: the last state could not be written (is the disk full?)"):
            self._manager.wait_until_finished()


@contextmanager
def _mendable(problem: str) -> Iterator[None]:
    """tensorstore reports a full or broken disk as ValueError, the file system as OSError: both are the user's to mend."""
    try:
        yield
    except (OSError, ValueError) as error:
        # tensorstore's messages go from the general to the cause, then list every setting in brackets
        cause = str(error).splitlines()[0].split(" [")[0]
        raise InputError(f"{problem} ({cause if len(cause) < REASON else '...' + cause[-REASON:]})") from error
