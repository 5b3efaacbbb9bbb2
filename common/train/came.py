"""CAME (Luo et al. 2023, arXiv 2307.02047): Adafactor's factored second moment, and a confidence in each update."""

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from heirloom.common.surgery.axes import Leaf, Spec

EPS = (1e-30, 1e-16)  # added to the squared gradient, and to the squared deviation of an update from its average
CLIP = 1.0  # greatest root mean square of an update


class Factored(NamedTuple):
    """Moving averages of the rows and of the columns of squared matrices."""

    row: jax.Array
    col: jax.Array


class CameState(NamedTuple):
    """average: of the updates. second: of the squared gradients, `Factored` or whole. deviation: `Factored`, or None
    where the second moment is whole.
    """

    average: Mapping[str, jax.Array]
    second: Mapping[str, Any]
    deviation: Mapping[str, Any]


def scale_by_came(spec: Spec, b1: float, b2: float, b3: float) -> optax.GradientTransformation:
    """Scale gradients as CAME does: kernels are the matrices from what they read to what they write, layer by layer.

    b1, b2, b3: decay of the averages of the updates, of the squared gradients, and of the squared deviations. There is
    no correction of the first steps' bias, as in the authors' code. Deviation: queries, keys and values are a matrix
    each, where the authors' models pack them in one.
    """

    def init(params: Mapping[str, jax.Array]) -> CameState:
        params = _trained(params)
        second = {path: _zeros(spec[path], path, x) for path, x in params.items()}
        deviation = {path: value if isinstance(value, Factored) else None for path, value in second.items()}
        return CameState({path: jnp.zeros(x.shape, jnp.float32) for path, x in params.items()}, second, deviation)

    def update(grads: Mapping[str, jax.Array], state: CameState, params: Any = None) -> tuple[Any, CameState]:
        found = {path: one(path, grad, state) for path, grad in _trained(grads).items()}
        parts = [{path: values[i] for path, values in found.items()} for i in range(4)]
        return dict(grads) | parts[0], CameState(parts[1], parts[2], parts[3])

    def one(path: str, grad: jax.Array, state: CameState) -> tuple[jax.Array, jax.Array, Any, Any]:
        leaf, shape, matrix = spec[path], grad.shape, _matrix(spec[path], path)
        flat, average = (_flat(x, leaf, matrix) for x in (grad.astype(jnp.float32), state.average[path]))
        squared = jnp.square(flat) + EPS[0]
        second = _follow(state.second[path], squared, b2)
        step = flat * _rsqrt(second)
        layers = tuple(range(1, step.ndim))
        size = jnp.sqrt(jnp.square(step).mean(layers, keepdims=True))
        step = step / jnp.maximum(1, size / CLIP)
        average = b1 * average + (1 - b1) * step
        deviation, scaled = state.deviation[path], average
        if isinstance(second, Factored):
            deviation = _follow(deviation, jnp.square(step - average) + EPS[1], b3)
            scaled = average * _rsqrt(deviation)
        return _whole(scaled, shape, matrix), _whole(average, shape, matrix), second, deviation

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _trained(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out what `optax.partition` masks, the parameters of other groups."""
    return {path: x for path, x in tree.items() if not isinstance(x, optax.MaskedNode)}


class _Matrix(NamedTuple):
    """Axes of a kernel: of the layers, of what it reads, and of what it writes."""

    layer: tuple[int, ...]
    read: tuple[int, ...]
    write: tuple[int, ...]


def _matrix(leaf: Leaf, path: str) -> _Matrix | None:
    read, write = leaf.axes.where("read"), leaf.axes.where("write")
    if not (path.endswith("kernel") and read and write):
        return None
    return _Matrix(tuple(i for i in range(len(leaf.shape)) if i not in (*read, *write)), read, write)


def _flat(x: jax.Array, leaf: Leaf, matrix: _Matrix | None) -> jax.Array:
    """Returns [layers, rows, columns] of a kernel, [layers, numbers] of anything else."""
    if matrix is None:
        return x.reshape(len(x) if leaf.layered else 1, -1)
    ordered = x.transpose(*matrix.layer, *matrix.read, *matrix.write)
    rows, cols = (prod(x.shape[i] for i in axes) for axes in (matrix.read, matrix.write))
    return ordered.reshape(-1, rows, cols)


def _whole(flat: jax.Array, shape: tuple[int, ...], matrix: _Matrix | None) -> jax.Array:
    if matrix is None:
        return flat.reshape(shape)
    order = (*matrix.layer, *matrix.read, *matrix.write)
    back = tuple(order.index(i) for i in range(len(order)))
    return flat.reshape([shape[i] for i in order]).transpose(back)


def _zeros(leaf: Leaf, path: str, x: jax.Array) -> Any:
    flat = _flat(jnp.zeros(x.shape, jnp.float32), leaf, matrix := _matrix(leaf, path))
    return flat if matrix is None else Factored(flat.mean(2), flat.mean(1))


def _follow(average: Any, value: jax.Array, decay: float) -> Any:
    if not isinstance(average, Factored):
        return decay * average + (1 - decay) * value
    row, col = value.mean(2), value.mean(1)
    return Factored(decay * average.row + (1 - decay) * row, decay * average.col + (1 - decay) * col)


def _rsqrt(second: Any) -> jax.Array:
    """Returns 1 / sqrt of a second moment; of a factored one by its best approximation of rank one."""
    if not isinstance(second, Factored):
        return jax.lax.rsqrt(second)
    row = second.row / second.row.mean(1, keepdims=True)
    return jax.lax.rsqrt(row)[:, :, None] * jax.lax.rsqrt(second.col)[:, None, :]
