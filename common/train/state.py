"""The training state: one tree of arrays."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import DictKey

from heirloom.common.mesh import replicated, shardings
from heirloom.common.surgery.axes import Spec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """The state of a run between two steps, except the position in the data."""

    step: Any
    """int32 scalar: number of steps done, including skipped ones."""
    params: dict[str, Any]
    opt: optax.OptState
    ema: dict[str, Any] | None
    """Exponential moving average of `params`, in f32; None when the run keeps none."""
    skipped: Any
    """int32 scalar: number of last steps in a row that were skipped because loss or gradient were not finite."""


def abstract_state(optimizer: optax.GradientTransformation, spec: Spec, mesh: Mesh, ema: float | None = None) -> State:
    """Returns the state as `jax.ShapeDtypeStruct`s with shardings, to restore into or to compile for.

    Moments and averages are sharded like their parameter, which is the last dictionary key of their path; everything
    else is replicated.
    """
    params = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in spec.items()}
    state = jax.eval_shape(lambda p: _fresh(p, optimizer, ema), params)
    layout, whole = shardings(spec, mesh), replicated(mesh)

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = next((key.key for key in reversed(path) if isinstance(key, DictKey)), None)
        # A factored moment has another shape than its parameter.
        alike = name in spec and spec[name].shape == leaf.shape
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout[str(name)] if alike else whole)

    return jax.tree_util.tree_map_with_path(place, state)


def state_shardings(optimizer: optax.GradientTransformation, spec: Spec, mesh: Mesh, ema: float | None = None) -> State:
    """Returns the `NamedSharding` of every leaf of the state."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract_state(optimizer, spec, mesh, ema))


def create_state(
    params: dict[str, Any], optimizer: optax.GradientTransformation, spec: Spec, mesh: Mesh, ema: float | None = None
) -> State:
    """Makes the state before the first step, in its shardings. params: {path: array}, on the host or on devices.

    The state has copies of `params`, because steps donate it. ema: decay of the average, or None for no average; the
    average starts as a copy. Raises ValueError when paths or shapes differ from `spec`.
    """
    found, wanted = {p: tuple(a.shape) for p, a in params.items()}, {p: leaf.shape for p, leaf in spec.items()}
    if found != wanted:
        wrong, *more = sorted(p for p in found.keys() | wanted.keys() if found.get(p) != wanted.get(p))
        there = f"the parameters have {found.get(wrong)}, the spec {wanted.get(wrong)}"
        raise ValueError(f"{wrong}: {there} (and {len(more)} more)")
    layout = shardings(spec, mesh)
    placed = {path: _place(params[path], layout[path]) for path in spec}
    fresh = jax.jit(_fresh, static_argnums=(1, 2), out_shardings=state_shardings(optimizer, spec, mesh, ema))
    return fresh(placed, optimizer, ema)


def _fresh(params: dict[str, jax.Array], optimizer: optax.GradientTransformation, ema: float | None) -> State:
    params = jax.tree.map(jnp.copy, params)
    average = None if ema is None else {path: jnp.array(x, jnp.float32, copy=True) for path, x in params.items()}
    return State(step=jnp.int32(0), params=params, opt=optimizer.init(params), ema=average, skipped=jnp.int32(0))


def _place(array: Any, sharding: NamedSharding) -> jax.Array:
    """Places an array in its sharding; of an array on the host each process copies the slices that its devices need."""
    if isinstance(array, jax.Array):
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
