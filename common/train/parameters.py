"""Loads parameters from checkpoints to devices and saves them to weights folders."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.convert import COPY, Donor
from heirloom.common.checkpoint.staging import staged
from heirloom.common.errors import InputError
from heirloom.common.surgery.axes import Spec
from heirloom.common.surgery.graft import graft
from heirloom.common.surgery.layout import View
from heirloom.common.train.mesh import shardings
from heirloom.common.train.state import State
from heirloom.common.typed import Config


def load_params(donor: Donor, mesh: Mesh) -> dict[str, jax.Array]:
    """Loads all parameters of a checkpoint, f32, in their shardings."""

    def nothing(**_: Any) -> dict[str, jax.Array]:
        raise AssertionError("a copy leaves nothing fresh")

    return graft(COPY, donor.source, donor.model.spec, shardings(donor.model.spec, mesh), nothing)


def finite(donor: Donor, role: str) -> Donor:
    """Returns the donor after reading all of its values. role: "teacher" or "donor", for the message.

    Raises InputError naming the first leaf with NaN or infinity: a run from it, or with it as teacher, would skip every
    step, and a student that inherits from it would have them too.
    """
    for path, value in donor.source.values.items():
        for part in value.parts if isinstance(value, View) else (value,):
            if not np.isfinite(part).all():
                where = donor.source.origin.get(path)
                name = f"{path} ({where})" if where else path
                what = f"the {role}'s {name} holds NaN or infinity"
                raise InputError(f"{donor.path}: {what}; fetch or train it again, or take another")
    return donor


def save_params(
    path: Path,
    method: str,
    cfg: Config,
    params: Mapping[str, Any],
    sidecars: Callable[[Path], None],
    *,
    spec: Spec | None = None,
    force: bool = False,
) -> None:
    """Writes a weights folder; every process gathers, the first one writes.

    sidecars(folder): writes further files. spec: needed where layers differ in size (`write_params`).
    """
    whole = {name: gathered(value) for name, value in params.items()}
    if jax.process_index() != 0:
        return
    with staged(path, force=force) as folder:
        folder.mkdir()
        weights.write_params(folder, whole, spec=spec)
        weights.write_config(folder, method, cfg)
        sidecars(folder)


def best(state: State) -> dict[str, jax.Array]:
    """Returns the averaged parameters, or the parameters of a run without average."""
    return state.params if state.ema is None else state.ema


def gathered(value: jax.Array | np.ndarray) -> np.ndarray:
    """Returns the whole array on every process."""
    if not isinstance(value, jax.Array) or value.is_fully_addressable:
        return np.asarray(value)
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))
