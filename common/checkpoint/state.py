"""Training states on disk, and parameters in orbax's format. The only module that imports orbax.

Each step has a folder with the arrays (`state`), a JSON object (`data`: position in the data, open metrics window) and
the SHA-256 of all its files (`seal.py`). A folder gets its final name when it is complete, so an incomplete one is
never restored.
"""

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSeconds, EveryNSteps, LatestN

from heirloom.common.checkpoint import seal
from heirloom.common.errors import InputError, remark
from heirloom.common.files import remove
from heirloom.common.processes import from_first, on_first, whole_on_first

Tree = TypeVar("Tree")
REASON = 200  # characters of the storage library's message that an error quotes


@dataclass(frozen=True)
class Keep:
    """Which states stay: the `last` ones, those of each multiple of `every` steps, and one per `minutes` (0: none)."""

    last: int = 2
    every: int = 0
    minutes: int = 0

    def policy(self) -> AnyPreservationPolicy:
        """Returns the rule for orbax: a state stays if any part keeps it."""
        steps = [EveryNSteps(self.every)] if self.every else []
        times = [EveryNSeconds(60 * self.minutes)] if self.minutes else []
        return AnyPreservationPolicy([LatestN(self.last), *steps, *times])


KEEP = Keep()


@dataclass(frozen=True)
class Restored(Generic[Tree]):
    """The result of `Checkpoints.restore`."""

    state: Tree
    data: dict[str, Any]


class Checkpoints:
    """The states of a run in a folder. Every process of a job makes the same calls."""

    def __init__(self, directory: Path, keep: Keep = KEEP, *, apart: bool = False) -> None:
        """Opens or creates the folder; the first save removes incomplete states. Raises InputError if it cannot be
        created.

        apart: the processes see different folders, so process 0 writes and reads whole arrays for all; else each
        process its own part.
        """
        self.directory, self.keep, self.apart = Path(directory).absolute(), keep, apart and jax.process_count() > 1
        self._saving: int | None = None
        self._checked: dict[int, str] = {}
        _say_once()
        with _disk_errors(f"{self.directory}: cannot write checkpoints here"):
            self.directory.mkdir(parents=True, exist_ok=True)

    @cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Opened late: orbax reads the metadata of all states, so `latest` first renames damaged ones."""
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self.keep.policy(),
            create=False,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0} if self.apart else None),
        )
        with _disk_errors(f"{self.directory}: cannot write checkpoints here"):
            return ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: object, data: dict[str, Any]) -> None:
        """Copies `state` (a tree of arrays) to the host, then writes it in the background.

        data: any JSON object. The state may be donated once this returns. Raises InputError when this save or the one
        before it fails, and for a step that is not after all saved ones; earlier states stay.
        """
        if self.apart:
            state = whole_on_first(state)
            if jax.process_index() != 0:
                return
        with _disk_errors(f"{self.directory}: step {step} or the one before it could not be saved; {self._kept()}"):
            self._finish()
            self._saving = step
            self._checked.pop(step, None)
            # A copy: it is written in the background, while the caller goes on to count in its own.
            written = ocp.args.JsonSave(json.loads(json.dumps(data)))
            items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=written)
            if not self._manager.save(step, args=items, custom_metadata=seal.MARK):
                raise ValueError(f"the folder has step {self._manager.latest_step()} already")

    def _kept(self) -> str:
        last = max(self.steps(), default=0)
        return f"the last state there is {last}" if last else "no state is there"

    def _seal(self) -> None:
        """Hashes the files of the state that is being saved; orbax calls it before the folder gets its final name."""
        complete, written = (self.directory / f"{self._saving}{suffix}" for suffix in ("", ".orbax-checkpoint-tmp"))
        seal.seal(written if written.exists() else complete)

    def _finish(self) -> None:
        """Waits for the save in the background and completes its manifest."""
        try:
            self._manager.wait_until_finished()
        finally:
            step, self._saving = self._saving, None
        if step is not None and jax.process_index() == 0 and (self.directory / str(step)).exists():
            seal.complete(self.directory / str(step))

    def steps(self) -> list[int]:
        """Returns the steps of all complete states on disk in ascending order, damaged or not."""
        with _disk_errors(f"{self.directory}: cannot be read"):
            return steps_on_disk(self.directory)

    def latest(self) -> int | None:
        """Returns the last step on disk whose files are whole, or None where no state was saved.

        Damaged states are remarked and renamed to STEP.damaged. A state of an earlier version has no SHA-256, so a
        remark says that it is not checked. Raises InputError when there are states and none is whole.
        """
        step = on_first(self._whole)
        if "_manager" in self.__dict__:
            self._manager.reload()
        if step is not None:
            self._checked[step] = ""
        return step

    def _whole(self) -> int | None:
        """Returns the last whole step, after renaming damaged ones; None without states."""
        folders = {step: self.directory / str(step) for step in reversed(self.steps())}
        damaged: dict[int, str] = {}
        for step in folders:
            if not (problem := self._damage(step)):
                break
            damaged[step] = problem
        if folders and len(damaged) == len(folders):
            newest, *_ = folders
            found = f"no state is whole (of the last, {newest}, {damaged[newest]})"
            raise InputError(f"{self.directory}: {found}; copy one back from a backup, or start a new run")
        whole = next((step for step in folders if step not in damaged), None)
        older = {step: seal.unreadable(folder) for step, folder in folders.items() if step < (whole or 0)}
        with _disk_errors(f"{self.directory}: a damaged state cannot be renamed"):
            for step, problem in damaged.items() | {s: p for s, p in older.items() if p}.items():
                aside = folders[step].with_name(f"{step}.damaged")
                remove(aside)
                folders[step].rename(aside)
                used = f"the state of step {whole} is used; what is left of it is {aside}"
                remark(f"{folders[step]} is damaged: {problem}; {used}")
        if whole is not None and not seal.sealed(folders[whole]):
            remark(f"{folders[whole]}: an earlier version wrote it without SHA-256, so it cannot be checked")
        return whole

    def _damage(self, step: int) -> str:
        """Returns what is wrong with a state. Each is read once, and only by the process that looks for a whole one."""
        if step not in self._checked:
            self._checked[step] = seal.damage(self.directory / str(step))
        return self._checked[step]

    def restore(self, step: int, like: Tree) -> Restored[Tree]:
        """Reads a state in the shapes, dtypes and shardings of `like` (a tree of `jax.ShapeDtypeStruct`).

        The mesh may differ from the one that wrote it. Raises InputError if the step is missing, damaged or has other
        shapes.
        """
        if not self.apart:
            return self._read(step, like)

        arrays = jax.tree.map(lambda one: np.broadcast_to(np.zeros((), one.dtype), one.shape), like)
        found = list[Restored[Any]]()

        def read() -> dict[str, Any]:
            found.append(self._read(step, arrays))
            return found[0].data

        data = on_first(read)
        return Restored(from_first(found[0].state if found else None, like), data)

    def _read(self, step: int, like: Tree) -> Restored[Tree]:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
        problem = f"{self.directory / str(step)}: cannot be restored; remove it to continue from the state before it"
        if damaged := self._damage(step):
            raise InputError(f"{problem} ({damaged})")
        # The further errors are of states without SHA-256, with files that are missing or cut.
        with _disk_errors(problem, KeyError, TypeError, AttributeError, AssertionError):
            found = self._manager.restore(step, args=args)
            return Restored(found["state"], found["data"])

    def wait(self) -> None:
        """Waits until all saves are on disk. Raises InputError when one failed."""
        if "_manager" not in self.__dict__:
            return
        with _disk_errors(f"{self.directory}: the last state could not be written (is the disk full?); {self._kept()}"):
            self._finish()


def steps_on_disk(directory: Path) -> list[int]:
    """Returns the steps that have a folder with its final name, in ascending order."""
    names = (path.name for path in directory.glob("[0-9]*") if path.is_dir())
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def save_tree(folder: Path, tree: object) -> None:
    """Writes a tree of arrays as `orbax.checkpoint.StandardCheckpointer` does. Raises InputError for a full disk."""
    with _disk_errors(f"{folder}: could not be written"), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), tree)


def load_tree(folder: Path) -> dict[str, np.ndarray]:
    """Reads all arrays that `save_tree`, or an NNX user, wrote, into host memory, by path (`image/patch/...`).

    Raises InputError for a folder that is missing or damaged.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; copy it back, or convert the checkpoint again")
    problem = f"{folder}: not a readable checkpoint of orbax; copy it again"
    with _disk_errors(problem, KeyError, TypeError, AttributeError), ocp.PyTreeCheckpointer() as checkpointer:
        described = checkpointer.metadata(folder.absolute()).item_metadata.tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), described)
        found = checkpointer.restore(folder.absolute(), ocp.args.PyTreeRestore(restore_args=how))
    names = jax.tree_util.tree_flatten_with_path(found)[0]
    # A variable of NNX is its value, under that name.
    return {"/".join(str(key.key) for key in path).removesuffix("/value"): value for path, value in names}


# Modules of orbax that log an error with its traceback and then raise it. Others only log, so they are heard.
RAISED = ("metadata/checkpoint.py", "futures/future.py", "checkpointers/async_checkpointer.py", "checkpoint_manager.py")


@cache
def _say_once() -> None:
    """Keeps orbax from printing the errors of a failed save with their tracebacks: it raises them, too.

    orbax logs them, asyncio those of its tasks that nobody waits for; and callbacks of tensorstore, in threads of its
    own, find the event loop of the failed write closed, which Python prints through its hook.
    """

    def printed(record: logging.LogRecord) -> bool:
        raised = "orbax" in record.pathname and record.pathname.endswith(RAISED) and bool(record.exc_info)
        text = record.getMessage()
        return not raised and not ("exception was never retrieved" in text and "orbax" in text)

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(printed)
    before = sys.unraisablehook

    def hook(found: "sys.UnraisableHookArgs") -> None:
        if not (found.exc_type is RuntimeError and str(found.exc_value) == "Event loop is closed"):
            before(found)

    sys.unraisablehook = hook


@contextmanager
def _disk_errors(problem: str, *more: type[Exception]) -> Iterator[None]:
    """Turns errors of the disk into InputError: tensorstore raises ValueError for a full or broken disk, the file
    system OSError. more: further types.
    """
    kinds: tuple[type[Exception], ...] = (OSError, ValueError, *more)
    try:
        yield
    except kinds as error:
        # tensorstore's messages have the cause last, then all settings in brackets
        cause = (str(error).splitlines() or [type(error).__name__])[0].split(" [")[0]
        raise InputError(f"{problem} ({cause if len(cause) < REASON else '...' + cause[-REASON:]})") from error
