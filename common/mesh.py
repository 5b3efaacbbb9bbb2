"""The device mesh, and the shardings of parameters and batches on it."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from heirloom.common.errors import InputError
from heirloom.common.rollcall import Job, roll_call
from heirloom.common.surgery.axes import Leaf, Spec

ROWS = ("data", "fsdp")  # the mesh axes over which the rows of a batch are split
TENSOR_AXES = ("head", "hidden", "vocab")  # the axes tensor parallelism may split, by name
REPLICATE_BELOW = 64 * 1024  # elements: below this, gathering costs more than the memory it saves
BUSY = re.compile(r"in use|busy|ABORTED|UNAVAILABLE")  # in JAX's message, of a device that another process has


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh. One size may be -1: the rest of the devices."""

    data: int = -1
    """Copies of the model; each gets different rows of the batch."""
    fsdp: int = 1
    """Devices over which one copy of the model, its optimizer and its rows are split."""
    tensor: int = 1
    """Devices over which heads, hidden units and vocabulary are split."""


def start(cfg: MeshConfig = MeshConfig(), patience: float = 300.0) -> Mesh:
    """Joins the other processes, if the environment names any, and builds the mesh `(data, fsdp, tensor)`.

    Call it before anything else uses a device. Raises InputError when the sizes do not multiply to the number of
    devices, when there are none, and, naming them, when processes do not report within `patience` seconds.
    """
    _join(patience)
    shape = sizes(cfg, jax.device_count())
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def devices(*, wait: bool = False) -> list[jax.Device]:
    """Returns the devices. Raises InputError where those of JAX_PLATFORMS cannot be used.

    wait: leaves the error of a busy device as it is, since `heirloom supervise` tries again after it.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter for cuda, and without a word
        if wait and BUSY.search(str(error)):
            raise
        why = str(error) or f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS')}, and no such device is here"
        raise InputError(f"no device can be used ({why}); set JAX_PLATFORMS=cpu, or install cuda or tpu") from error


def sizes(cfg: MeshConfig, devices: int) -> dict[str, int]:
    """Returns the mesh's axes with sizes. Raises InputError unless these multiply to the number of devices."""
    shape = {f.name: getattr(cfg, f.name) for f in fields(cfg)}
    free = [name for name, size in shape.items() if size == -1]
    given = math.prod(size for size in shape.values() if size != -1)
    if len(free) == 1 and given > 0 and devices % given == 0:
        shape[free[0]] = devices // given
    if min(shape.values()) < 1 or math.prod(shape.values()) != devices:
        asked = " x ".join(f"{name} {size}" for name, size in shape.items())
        raise InputError(f"mesh {asked} does not make {devices} devices: change sizes, one may be -1 (the rest)")
    return shape


def shardings(spec: Spec, mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns the shardings of parameters: `tensor` by axis name, `fsdp` on the largest other axis that divides.

    Stacking axes are never split, since a scan would gather every layer; leaves under `REPLICATE_BELOW` are replicated.
    """
    return {path: NamedSharding(mesh, _partition(leaf, mesh)) for path, leaf in spec.items()}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows over `data` and `fsdp`, other dimensions not split."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def row_shards(mesh: Mesh) -> int:
    """Returns the number of parts into which a mesh splits the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def filled_rows(rows: int, mesh: Mesh) -> np.ndarray:
    """Returns the numbers of rows with the last one repeated until the mesh divides them, int [rows or more]."""
    return np.minimum(np.arange(rows + -rows % row_shards(mesh)), rows - 1)


def split_rows(array: np.ndarray, mesh: Mesh, fill: float = 0) -> jax.Array:
    """Splits the rows of an array that every process has whole over `data` and `fsdp`, as evaluation does.

    Rows of `fill` are added at the end until the mesh divides them; the caller masks them or cuts them off.
    """
    missing = -len(array) % row_shards(mesh)
    padded = np.concatenate([array, np.full((missing, *array.shape[1:]), fill, array.dtype)]) if missing else array
    return jax.make_array_from_callback(padded.shape, batch_sharding(mesh), lambda index: padded[index])


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding with a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _partition(leaf: Leaf, mesh: Mesh) -> PartitionSpec:
    placed: list[str | None] = [None] * len(leaf.shape)
    if math.prod(leaf.shape) < REPLICATE_BELOW:
        return PartitionSpec()

    def candidates(axis: str) -> list[int]:
        size = mesh.shape[axis]
        named = (i for i in leaf.axes.where("read", "write", "carry") if placed[i] is None)
        return [i for i in named if size > 1 and leaf.shape[i] % size == 0]

    for i in candidates("tensor"):
        if leaf.axes.names[i] in TENSOR_AXES:
            placed[i] = "tensor"
            break
    if left := candidates("fsdp"):
        placed[max(left, key=lambda i: leaf.shape[i])] = "fsdp"
    return PartitionSpec(*placed)


def _join(patience: float) -> None:
    """Calls `jax.distributed.initialize` when the environment says that this is one process of several."""
    if jax.distributed.is_initialized():
        return
    if job := _announced(os.environ):
        roll_call(job, patience)
        jax.distributed.initialize(job.address, job.processes, job.process)
    elif method := os.environ.get("HEIRLOOM_CLUSTER"):
        jax.distributed.initialize(cluster_detection_method=method)
    elif _launched_together(os.environ):
        jax.distributed.initialize()
    devices(wait=True)
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        known = "HEIRLOOM_CLUSTER=gcetpu (or gketpu, slurm, ompi, k8s)"
        raise InputError(f"{jax.process_count()} hosts and no coordinator: set {known}")


def _announced(env: Mapping[str, str]) -> Job | None:
    """Reads a job from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; None when not set."""
    if "JAX_COORDINATOR_ADDRESS" not in env:
        return None
    wanted = {"JAX_COORDINATOR_ADDRESS": r"[^:]+:\d+", "JAX_NUM_PROCESSES": r"\d+", "JAX_PROCESS_ID": r"\d+"}
    for name, form in wanted.items():
        if not re.fullmatch(form, env.get(name, "")):
            needed = f"{', '.join(wanted)} (host:port and two numbers)"
            raise InputError(f"{name} is {env.get(name)!r}: a job needs {needed}")
    processes, process = int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
    return Job(env["JAX_COORDINATOR_ADDRESS"], processes=processes, process=process)


def _launched_together(env: Mapping[str, str]) -> bool:
    """Returns whether SLURM, MPI, or a TPU pod that lists its hosts started several processes."""
    hosts = env.get("TPU_WORKER_HOSTNAMES", "") or env.get("TPU_PROCESS_ADDRESSES", "")
    slurm = int(env.get("SLURM_NTASKS", "1")) if "SLURM_STEP_NODELIST" in env else 1
    mpi = int(env.get("OMPI_COMM_WORLD_SIZE", "1"))
    return slurm > 1 or mpi > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in env or "," in hosts
