"""Losses of TinyCLIP (§3; clip_soft_loss.py). Features are unit norm and f32; the batch is the global one.

Both losses are the cross-entropy of one matrix of similarities, by rows and by columns, under a matrix of targets.
Neither matrix is ever whole in memory: a device computes its own rows, `CHUNK` at a time, against the gathered columns.
The backward pass computes them again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from heirloom.common.mesh import ROWS

CHUNK = 1024  # rows of similarities in memory at a time
NO_TARGET = -1e30  # the logit of a pair with target 0; finite, so that the difference of two such logits is finite
TargetLogits = Callable[[Any, Any], jax.Array]
"""`(rows, columns) -> [rows, columns]`: logits of the targets, from the data of the rows and of the columns."""


def affinity_mimicking(
    image: Float[Array | np.ndarray, "batch joint"],
    text: Float[Array | np.ndarray, "batch joint"],
    teacher_image: Float[Array | np.ndarray, "batch teacher_joint"],
    teacher_text: Float[Array | np.ndarray, "batch teacher_joint"],
    scale: Float[Array, ""] | float,
    teacher_scale: Float[Array, ""] | float,
) -> Float[Array, ""]:
    """Cross-entropy between teacher's and student's image-text affinities (TinyCLIP eq. 2-4).

    image, text: [batch, joint] student features, unit norm, f32. teacher_*: same, any joint width, no gradient.
    scale, teacher_scale: inverse temperatures (1/0.02 in the released recipes). The bias of a sigmoid loss (SigLIP) is
    the same for all pairs, so that the affinities of a model with it are those without it.
    Returns the mean over the global batch of both directions, halved each (nats).
    """
    rows, columns = jax.lax.stop_gradient((teacher_scale * teacher_image, teacher_text))
    return _cross_entropy(similarity, image, text, jnp.asarray(scale, jnp.float32), rows, columns)


def contrastive(
    image: Float[Array | np.ndarray, "batch joint"],
    text: Float[Array | np.ndarray, "batch joint"],
    scale: Float[Array, ""] | float,
    group: Int[Array | np.ndarray, " batch"] | None = None,
) -> Float[Array, ""]:
    """CLIP's InfoNCE, both directions, halved each (nats).

    image, text: [batch, joint] unit norm, f32. group: [batch] int; pairs of one group are positives of one another, and
    share the target evenly (None: every pair is its own group).
    """
    if group is None:
        group = jnp.arange(len(image))
    return _cross_entropy(_same_group, image, text, jnp.asarray(scale, jnp.float32), group, group)


def similarity(
    image: Float[Array | np.ndarray, "images joint"], text: Float[Array | np.ndarray, "captions joint"]
) -> Float[Array, "images captions"]:
    """Cosine of every image with every caption, for unit-norm features.

    In full precision: a TPU's bf16 passes would change logits by a tenth at a scale of 50.
    """
    return jnp.matmul(image, text.T, precision=jax.lax.Precision.HIGHEST)


def _same_group(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Logits whose softmax is even over the members of a group."""
    return jnp.where(rows[:, None] == columns[None], 0.0, NO_TARGET)


class _Sums(NamedTuple):
    """Running sums of a softmax cross-entropy, [n] each, for rows or for columns.

    largest, total: largest logit, and the sum of exponentials relative to it. target_*: the same of the targets. cross:
    the student's logits summed with the targets' weights.
    """

    largest: jax.Array
    total: jax.Array
    target_largest: jax.Array
    target_total: jax.Array
    cross: jax.Array

    @classmethod
    def of(cls, logits: jax.Array, target: jax.Array, axis: int) -> "_Sums":
        largest, target_largest = logits.max(axis), target.max(axis)
        weight = jnp.exp(target - jnp.expand_dims(target_largest, axis))
        total = jnp.exp(logits - jnp.expand_dims(largest, axis)).sum(axis)
        return cls(largest, total, target_largest, weight.sum(axis), (weight * logits).sum(axis))

    def rescaled(self, largest: jax.Array, target_largest: jax.Array) -> "_Sums":
        shift, target_shift = jnp.exp(self.largest - largest), jnp.exp(self.target_largest - target_largest)
        total, cross = self.target_total * target_shift, self.cross * target_shift
        return _Sums(largest, self.total * shift, target_largest, total, cross)

    def merged(self, more: "_Sums") -> "_Sums":
        """The sums over two parts of an axis."""
        tops = jnp.maximum(self.largest, more.largest), jnp.maximum(self.target_largest, more.target_largest)
        a, b = self.rescaled(*tops), more.rescaled(*tops)
        return _Sums(*tops[:1], a.total + b.total, tops[1], a.target_total + b.target_total, a.cross + b.cross)

    def all_reduced(self, axes: tuple[str, ...]) -> "_Sums":
        """The sums over the parts on all devices along mesh axes."""
        if not axes:
            return self
        part = self.rescaled(jax.lax.pmax(self.largest, axes), jax.lax.pmax(self.target_largest, axes))
        sums = {name: jax.lax.psum(getattr(part, name), axes) for name in ("total", "target_total", "cross")}
        return part._replace(**sums)

    @property
    def normaliser(self) -> jax.Array:
        return self.largest + jnp.log(self.total)

    @property
    def target_normaliser(self) -> jax.Array:
        return self.target_largest + jnp.log(self.target_total)

    @property
    def cross_entropy(self) -> jax.Array:
        return self.normaliser - self.cross / self.target_total


class _Normalisers(NamedTuple):
    """Logarithms of the softmax's denominators, [n] each, of the rows of this device and of all columns."""

    row: Any
    target_row: Any
    column: Any
    target_column: Any


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
    target: TargetLogits, image: Any, text: Any, scale: Any, target_rows: Any, target_columns: Any
) -> jax.Array:
    return _forward(target, image, text, scale, target_rows, target_columns)[0]


def _forward(target: TargetLogits, *inputs: Any) -> tuple[jax.Array, Any]:
    axes = _row_axes()
    rows, one = PartitionSpec(axes), PartitionSpec()
    in_specs = (rows, rows, one, rows, rows)
    out_specs = (one, _Normalisers(rows, rows, one, one))
    loss, normalisers = _sharded(partial(_forward_local, target, axes), axes, in_specs, out_specs)(*inputs)
    return loss, (inputs, normalisers)


def _backward(target: TargetLogits, saved: Any, gradient: jax.Array) -> tuple[Any, ...]:
    inputs, normalisers = saved
    axes = _row_axes()
    rows, one = PartitionSpec(axes), PartitionSpec()
    in_specs = (rows, rows, one, rows, rows, _Normalisers(rows, rows, one, one))
    gradients = _sharded(partial(_backward_local, target, axes), axes, in_specs, (rows, rows, one))
    return *(gradient * x for x in gradients(*inputs, normalisers)), None, None


_cross_entropy.defvjp(_forward, _backward)


def _forward_local(
    target: TargetLogits, axes: tuple[str, ...], image: Any, text: Any, scale: Any, rows: Any, columns: Any
) -> Any:
    """Loss and normalisers from the rows of this device and the columns of all devices."""
    text, columns = _gathered(text, axes), _gathered(columns, axes)
    empty = jnp.full(len(text), NO_TARGET), jnp.zeros(len(text))
    start = _Sums(*empty, *empty, jnp.zeros(len(text)))

    def chunk(sums: _Sums, part: Any) -> tuple[_Sums, _Sums]:
        (image, rows), real = part
        both = (scale * similarity(image, text), target(rows, columns))
        logits, targets = (jnp.where(real, x, NO_TARGET) for x in both)
        return sums.merged(_Sums.of(logits, targets, 0)), _Sums.of(logits, targets, 1)

    by_column, by_row = jax.lax.scan(chunk, start, _chunked((image, rows)))
    by_row = jax.tree.map(lambda x: x.reshape(-1)[: len(image)], by_row)
    by_column = by_column.all_reduced(axes)
    loss = (_sum(by_row.cross_entropy.sum(), axes) + by_column.cross_entropy.sum()) / (2 * len(text))
    rows, columns = (by_row.normaliser, by_row.target_normaliser), (by_column.normaliser, by_column.target_normaliser)
    return loss, _Normalisers(*rows, *columns)


def _backward_local(
    target: TargetLogits,
    axes: tuple[str, ...],
    image: Any,
    text: Any,
    scale: Any,
    rows: Any,
    columns: Any,
    n: _Normalisers,
) -> Any:
    """Gradients of image, text and scale: similarities are recomputed; a logit's is softmax minus target."""
    all_text, columns = _gathered(text, axes), _gathered(columns, axes)
    highest = jax.lax.Precision.HIGHEST

    def chunk(sums: Any, part: Any) -> tuple[Any, jax.Array]:
        (image, rows, row, target_row), real = part
        cosines, targets = similarity(image, all_text), target(rows, columns)
        logits = scale * cosines
        excess = jnp.exp(logits - row[:, None]) - jnp.exp(targets - target_row[:, None])
        excess += jnp.exp(logits - n.column) - jnp.exp(targets - n.target_column)
        excess = jnp.where(real, excess, 0) / (2 * len(all_text))
        by_text, by_scale = sums
        by_text += scale * jnp.matmul(excess.T, image, precision=highest)
        return (by_text, by_scale + (excess * cosines).sum()), scale * jnp.matmul(excess, all_text, precision=highest)

    start = jnp.zeros_like(all_text), jnp.zeros(())
    (by_text, by_scale), by_image = jax.lax.scan(chunk, start, _chunked((image, rows, n.row, n.target_row)))
    if axes:
        by_text = jax.lax.psum_scatter(by_text, axes, tiled=True)
    return by_image.reshape(-1, image.shape[1])[: len(image)], by_text, _sum(by_scale, axes)


def _chunked(rows: Any) -> tuple[Any, jax.Array]:
    """Split [n, ...] into [chunks, c, ...], the fewest chunks of up to CHUNK rows, the last padded with zeros.

    Also returns a mask of the rows that are not padding: [chunks, c, 1] bool.
    """
    n = len(jax.tree.leaves(rows)[0])
    chunks = -(-n // CHUNK)
    size = -(-n // chunks)
    padding = chunks * size - n

    def split(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, padding), *[(0, 0)] * (x.ndim - 1)]).reshape(chunks, size, *x.shape[1:])

    return jax.tree.map(split, rows), split(jnp.ones((n, 1), bool))


def _row_axes() -> tuple[str, ...]:
    """The axes of the current mesh that split rows; none outside of a training step."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in ROWS if axis in mesh.axis_names and mesh.shape[axis] > 1)


def _sharded(function: Callable[..., Any], axes: tuple[str, ...], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False) if axes else function


def _gathered(x: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.all_gather(x, axes, tiled=True) if axes else x


def _sum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(x, axes) if axes else x
