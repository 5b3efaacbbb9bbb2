"""Loads parameters from checkpoints to devices and saves them to weights folders."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.convert import COPY
from heirloom.common.checkpoint.family import Donor
from heirloom.common.checkpoint.quantized import QuantizedView
from heirloom.common.errors import InputError, remark
from heirloom.common.files import staged
from heirloom.common.mesh import shardings
from heirloom.common.nn.quantized import INT8, QArray, quantized
from heirloom.common.paths import AnyPath
from heirloom.common.processes import gathered, together
from heirloom.common.surgery.axes import Spec
from heirloom.common.surgery.graft import graft
from heirloom.common.surgery.layout import View
from heirloom.common.train.state import State
from heirloom.common.typed import Config


def load_params(donor: Donor, mesh: Mesh) -> dict[str, Any]:
    """Loads all parameters of a checkpoint, f32, in their shardings; quantised kernels stay int8 (`QArray`)."""

    def nothing(**_: Any) -> dict[str, jax.Array]:
        raise AssertionError("a copy leaves nothing fresh")

    spec, place = donor.model.spec, shardings(donor.model.spec, mesh)
    kernels = {path: view for path, view in donor.source.values.items() if isinstance(view, QuantizedView)}
    rest = {path: leaf for path, leaf in spec.items() if path not in kernels}
    loaded: dict[str, Any] = graft(COPY, donor.source, rest, place, nothing)
    loaded |= {path: _quantized(view, place[path]) for path, view in kernels.items()}
    return {path: loaded[path] for path in spec}


def _quantized(view: QuantizedView, sharding: NamedSharding) -> QArray:
    """Copies a quantised kernel to devices. Its scales are split as the output axes of the kernel are."""
    kernel, shape = view.stored(), view.stored().scale.shape
    split = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    scales = PartitionSpec(*(axis if size > 1 else None for axis, size in zip(split, shape, strict=True)))

    def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        # A copy: an array on a CPU would alias the memory map.
        return jax.make_array_from_callback(array.shape, sharding, lambda index: np.array(array[index]))

    array = QArray(put(kernel.qvalue, sharding), put(kernel.scale, NamedSharding(sharding.mesh, scales)))
    view.release()
    return array


def finite(donor: Donor, role: str) -> Donor:
    """Returns the donor after reading all of its values. role: "teacher" or "donor", for the message.

    Raises InputError naming the first leaf with NaN or infinity: a run from it, or with it as teacher, would skip every
    step, and a student that inherits from it would have them too. Remarks that a model is quantised.
    """
    if donor.quantized:
        use = "computes with its rounded kernels" if role == "teacher" else "gives its rounded kernels as float32"
        remark(f"{donor.path}: the {role} is quantised ({donor.quantized}), and {use}")
    for path, value in donor.source.values.items():
        for part in value.parts if isinstance(value, View) else (value,):
            if not np.isfinite(part).all():
                where = donor.source.origin.get(path)
                name = f"{path} ({where})" if where else path
                what = f"the {role}'s {name} holds NaN or infinity"
                raise InputError(f"{donor.path}: {what}; fetch or train it again, or take another")
    return donor


def save_params(
    path: AnyPath,
    method: str,
    cfg: Config,
    params: Mapping[str, Any],
    sidecars: Callable[[Path], None],
    *,
    spec: Spec | None = None,
    force: bool = False,
) -> None:
    """Writes a weights folder; every process gathers, the first one writes, and the others wait.

    sidecars(folder): writes further files. spec: needed where layers differ in size (`write_params`).
    """
    whole = {name: jax.tree.map(gathered, value) for name, value in params.items()}

    def write() -> None:
        if jax.process_index() != 0:
            return
        with staged(path, force=force) as folder:
            folder.mkdir()
            weights.write_params(folder, whole, spec=spec)
            weights.write_config(folder, method, cfg, INT8 if quantized(whole) else "")
            sidecars(folder)

    together(write)


def best(state: State) -> dict[str, jax.Array]:
    """Returns the averaged parameters, or the parameters of a run without average."""
    return state.params if state.ema is None else state.ema

