"""`heirloom compile`: compiles a recipe's train step for a TPU pod on any machine (extra `tpu`: the compiler).

Nothing runs. What the compiler says of memory is its own; FLOPs are our count from the axes, for it counts a scanned
layer once.
"""

import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from heirloom.common.chips import GIB, TARGETS, Chip
from heirloom.common.errors import InputError, nearest
from heirloom.common.hlo import collectives, summed


@dataclass(frozen=True)
class Topology:
    """A slice of a pod: the name of its chips, and how they are arranged."""

    name: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """`v5e:16x16`. Raises InputError for another form, and for chips that the compiler does not know."""
        name, _, arranged = text.partition(":")
        if not re.fullmatch(r"\d+(x\d+){1,2}", arranged):
            raise InputError(f"--topology {text}: write the chip and its arrangement, such as v5e:16x16 or v5p:4x4x4")
        if name not in TARGETS:
            known = ", ".join(TARGETS)
            raise InputError(f"--topology {text}: no chip {name!r}{nearest(name, TARGETS)} (there are {known})")
        return cls(name, tuple(map(int, arranged.split("x"))))

    @property
    def chip(self) -> Chip:
        return TARGETS[self.name]

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.shape))}"


def describe(topology: Topology) -> Any:
    """JAX's description of the slice. Raises InputError without libtpu, or for an arrangement that does not exist."""
    if find_spec("libtpu") is None:
        raise InputError("the compiler for TPUs is not installed: pip install 'heirloom-jax[tpu]'")
    # libtpu asks its surroundings which machine it is on; these are the answers of one that has no TPU.
    for name, value in _NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=str(topology))
    except Exception as error:  # the compiler raises its own kinds
        raise InputError(f"no slice {topology}: {' '.join(str(error).split())[:200]}") from error


_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def mesh_on(topology: Topology, cfg: Any) -> Any:
    """The mesh that a `MeshConfig` makes of a slice, as JAX would arrange it there."""
    import numpy as np
    from jax.experimental import mesh_utils
    from jax.sharding import AxisType, Mesh

    from heirloom.common.mesh import sizes

    devices = describe(topology).devices
    shape = sizes(cfg, len(devices))
    if topology.name == "v4":
        # JAX arranges a v4's chips as one device each, as where they run; the compiler lists both halves of each.
        placed = np.array(devices).reshape(tuple(shape.values()))
    else:
        placed = mesh_utils.create_device_mesh(tuple(shape.values()), devices=devices, allow_split_physical_axes=True)
    return Mesh(placed, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


# How the compiler says that a step does not fit; the second knows its temporaries alone.
REFUSALS = (r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", r"temporaries \(([\d.]+)([KMGT])\) exceeds available HBM")


def compile_for(cfg: Any, topology: Topology) -> dict[str, Any]:
    """Compile the train step of a recipe for a slice. Raises InputError when recipe and slice do not go together.

    Returns fits, devices, bytes_per_device and hbm (bytes), flops (of a step, all devices), collectives {kind: {count,
    bytes}} (a device's, in a step), summed {dtype: elements} (what devices add up, gradients above all), step_seconds
    (an estimate: the longest of its parts at the chip's limits), bound (which part), advice, seconds.
    """
    import jax

    mesh = mesh_on(topology, cfg.mesh)
    abstract = cfg.abstract(mesh)
    chip, started, devices = topology.chip, time.perf_counter(), mesh.size
    batch = next(iter(abstract.batch.values())).shape[0]
    result: dict[str, Any] = {"topology": str(topology), "devices": devices, "mesh": dict(mesh.shape), "batch": batch}
    result |= {"hbm": chip.hbm, "flops": abstract.flops}
    lowered = abstract.step.lower(abstract.state, abstract.batch)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = next((refused for form in REFUSALS if (refused := re.search(form, str(error)))), None)
        if used is None:
            raise
        unit = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
        result |= {"fits": False, "bytes_per_device": float(used[1]) * unit[used[2]]}
        result |= {"collectives": {}, "advice": advice(cfg)}
        return result | {"seconds": time.perf_counter() - started}

    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed = held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    text = compiled.as_text()
    found = collectives(text)
    parts = {
        "matmuls": abstract.flops / devices / chip.compiled_flops,
        # A rule of thumb: weights, gradients and moments pass through once; activations are written and read.
        "memory": (held + 2 * memory.temp_size_in_bytes) / chip.bandwidth,
        "links": sum(kind["bytes"] for kind in found.values()) / (chip.link / chip.cores),
    }
    bound = max(parts, key=lambda name: parts[name])
    result |= {"fits": True, "bytes_per_device": needed, "collectives": found, "summed": summed(text)}
    result |= {"parts": parts, "bound": bound, "advice": ""}
    return result | {"step_seconds": parts[bound], "seconds": time.perf_counter() - started}


def advice(cfg: Any) -> str:
    """What to change when a step does not fit, in the words of the recipe's flags."""
    remat = (name for name, value in _fields(asdict(cfg), "") if name.endswith("remat") and value in ("none", "dots"))
    found = [f"--{name} full" for name in remat]
    if cfg.mesh.fsdp == 1:
        found.append("--mesh.fsdp 8")
    if not found:
        found.append("a smaller --pipeline.batch, or --step.accumulate where the loss allows it")
    return " or ".join(found)


def _fields(value: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [field for key, inner in value.items() for field in _fields(inner, f"{name}.{key}".lstrip("."))]
    return [(name, value)]


def lines(name: str, result: Mapping[str, Any]) -> list[str]:
    """The result of `compile_for` for people."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1) or "one device"
    needed, hbm = result["bytes_per_device"] / GIB, result["hbm"] / GIB
    out = [f"{name} on {result['topology']}: {result['devices']} devices ({mesh}), batch {result['batch']:,}"]
    if not result["fits"]:
        return [*out, f"does not fit: {needed:.2f} GiB a device of {hbm:.2f}; try {result['advice']}"]
    out.append(f"fits: {needed:.2f} GiB a device of {hbm:.2f}")
    for kind, c in result["collectives"].items():
        out.append(f"  {kind}: {c['count']:,}, {c['bytes'] / 2**20:,.1f} MiB a device and step")
    if result["summed"]:
        sums = ", ".join(f"{n:,} numbers in {dtype}" for dtype, n in sorted(result["summed"].items()))
        out.append(f"  devices add up {sums}")
    parts = ", ".join(f"{part} {1e3 * seconds:.1f} ms" for part, seconds in result["parts"].items())
    out.append(f"{result['flops'] / 1e12:,.3g} TFLOP a step; at the chip's limits: {parts}")
    return [*out, f"so a step is estimated at {1e3 * result['step_seconds']:.1f} ms or more"]
