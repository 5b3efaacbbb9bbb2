"""LiGO (Wang et al., ICLR 2023): learn maps from a small ViT to a larger one in a hundred steps."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from heirloom.common.errors import InputError, remark
from heirloom.common.surgery.axes import Spec
from heirloom.common.surgery.maps import AxisMap, matrix, sided
from heirloom.common.surgery.plan import Maps, Plan, Source, apply
from heirloom.common.train.bad_samples import BadSamples, Feed
from heirloom.common.train.loop import Data
from heirloom.common.vit.model import VitConfig
from learngene.expand import grid_maps
from learngene.relatives import plain

STEPS, RATE = 100, 1e-3
NOISE = 0.03
GROUPS = ("attn_norm", "attn/query", "attn/key", "attn/value", "attn/out", "mlp_norm", "mlp/up", "mlp/down")
Matrices = Mapping[str, Any]
Loss = Callable[[Mapping[str, Any], Any, jax.Array], jax.Array]
"""`loss(params, batch, key)` of the larger model."""


def first_matrices(donor: VitConfig, student: VitConfig, seed: int) -> dict[str, np.ndarray]:
    """Initial matrices: noisy stacking of layers; larger widths repeat units, divided by the copies where read."""
    rng = np.random.default_rng(seed)
    stacked = np.eye(donor.layers)[np.arange(student.layers) % donor.layers]
    noisy = {group: stacked + rng.uniform(0, NOISE, stacked.shape) for group in GROUPS}
    out = {f"layer {group}": mix / mix.sum(1, keepdims=True) for group, mix in noisy.items()}
    for name, source, target in (("embed", donor.width, student.width), ("inner", donor.width, student.width)):
        out |= _repeated(name, source, target)
    out |= _repeated("hidden", donor.hidden, student.hidden)
    return {name: value.astype(np.float32) for name, value in out.items()}


def _repeated(name: str, source: int, target: int) -> dict[str, np.ndarray]:
    write = np.eye(source)[np.arange(target) % source]
    return {f"{name} write": write, f"{name} read": write / write.sum(0)}


def plan(donor: VitConfig, student: VitConfig, matrices: Matrices) -> Plan:
    """Plan of LiGO: a linear combination of layers for each kind of tensor, and a matrix for each side of each width.

    Raises InputError when classes, channels or patches differ, or the student is smaller.
    """
    for name in ("classes", "channels", "patch"):
        if getattr(donor, name) != getattr(student, name):
            sizes = f"{getattr(student, name)}, the donor's {getattr(donor, name)}"
            raise InputError(f"the student's {name} is {sizes}: LiGO needs the same {name}")
    plain(donor, student, "LiGO")
    if student.width < donor.width or student.hidden < donor.hidden or student.layers < donor.layers:
        needed = "LiGO needs at least the donor's layers, width and hidden"
        raise InputError(f"the student is smaller than its donor: {needed}")
    widths: dict[str, AxisMap] = {
        axis: sided(matrix(matrices[f"{name} write"]), read=matrix(matrices[f"{name} read"]))
        for axis, name in (("embed", "embed"), ("head head_dim", "inner"), ("hidden", "hidden"))
    }
    blocks = tuple(
        (f"blocks/{group}/*", {"layer": matrix(matrices[f"layer {group}"])} | _of(group, widths)) for group in GROUPS
    )
    embed: Maps = {"embed": widths["embed"]}
    return Plan((*blocks, ("position", {**embed, **grid_maps(donor, student)}), ("head/bias", {}), ("**", embed)))


def _of(group: str, widths: Mapping[str, AxisMap]) -> dict[str, AxisMap]:
    axes = {"attn": ("embed", "head head_dim"), "mlp": ("embed", "hidden")}.get(group.partition("/")[0], ("embed",))
    return {axis: widths[axis] for axis in axes}


def fit(
    donor: VitConfig,
    source: Source,
    student: VitConfig,
    spec: Spec,
    loss: Loss,
    batches: Data,
    seed: int,
    steps: int = STEPS,
) -> Plan:
    """Learn the matrices with Adam on the loss of the larger model; the donor's parameters are fixed."""
    matrices = first_matrices(donor, student, seed)
    plan(donor, student, matrices).resolve(source, spec)  # raises its errors before the first step
    frozen = {path: jnp.asarray(np.asarray(value)) for path, value in source.values.items()}
    optimizer = optax.adam(RATE)

    @jax.jit
    def step(matrices: Matrices, state: Any, frozen: Mapping[str, Any], batch: Any, key: jax.Array) -> tuple[Any, Any]:
        def grown(matrices: Matrices) -> jax.Array:
            return loss(apply(plan(donor, student, matrices), Source(source.spec, frozen), spec), batch, key)

        updates, state = optimizer.update(jax.grad(grown)(matrices), state)
        return optax.apply_updates(matrices, updates), state

    learned, state = {name: jnp.asarray(value) for name, value in matrices.items()}, optimizer.init(matrices)
    feed, bad = Feed(batches), BadSamples(None, getattr(batches, "bad_limit", 1.0), {})
    for n in range(steps):
        learned, state = step(learned, state, frozen, feed.take(), jax.random.fold_in(jax.random.key(seed), n))
        bad.add(feed.delivered)
    bad.collect()
    bad.judge()
    if count := bad.close_window():
        last = bad.state()["last"]
        remark(f"examples that replace bad records in the {steps:,} steps of LiGO: {count:,}; the last: {last}")
    return plan(donor, student, {name: np.asarray(value) for name, value in learned.items()})
