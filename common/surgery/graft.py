"""Graft: applies a resolved plan; builds the student's parameters leaf by leaf in the sharding of each leaf."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from heirloom.common.surgery.axes import Spec
from heirloom.common.surgery.layout import View
from heirloom.common.surgery.plan import Line, Plan, Resolution, Source, build

Params = dict[str, jax.Array]
Place = Mapping[str, Sharding]
Init = Callable[..., Params]
"""`init(paths, place)` returns fresh values of the named parameters, like `partial(model.init, key)`."""


def graft(plan: Plan | Resolution, source: Source, spec: Spec, place: Place | None, init: Init) -> Params:
    """Builds the student's parameters: inherited where the plan says so, from `init` elsewhere.

    place: a sharding per path (None: the default device). Each process reads only the slices that its devices hold.
    Host memory beyond the result stays near the size of the largest leaf. Raises what `Plan.resolve` raises.
    """
    resolution = plan.resolve(source, spec) if isinstance(plan, Plan) else plan
    place = place or dict.fromkeys(spec, SingleDeviceSharding(jax.local_devices()[0]))
    needed = [line.path for line in resolution.lines if not line.complete]
    fresh = init(paths=needed, place=place) if needed else {}
    return {line.path: _leaf(line, place[line.path], fresh.get(line.path)) for line in resolution.lines}


def _leaf(line: Line, sharding: Sharding, fresh: jax.Array | None) -> jax.Array:
    if line.source is None:
        assert fresh is not None
        return fresh
    blocks: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def block(index: tuple[slice, ...] | None) -> np.ndarray:
        index = index or ()
        # JAX calls this once per device, not once per slice: replicas share a block.
        key = tuple(s.indices(n) for s, n in zip(index, line.target.shape, strict=True))
        if key not in blocks:
            # A CPU array would alias a memory map and change with the file, so copy, unless building did.
            copied = isinstance(line.source, View)
            blocks[key] = np.array(build(line, index), order="C", copy=None if copied else True)
        return blocks[key]

    inherited = jax.make_array_from_callback(line.target.shape, sharding, block)
    if isinstance(line.source, View):
        line.source.release()  # or host memory would hold the donor's pages next to the student
    if fresh is None:
        return inherited
    return jax.jit(partial(_merge, kept=_kept(line)), out_shardings=sharding)(inherited, fresh)


def _kept(line: Line) -> Sequence[np.ndarray]:
    """Returns for each run of axes the mask of rows that have a source, in a shape that broadcasts over the leaf."""
    masks, position, rank = [], 0, len(line.target.shape)
    for run in line.runs:
        rows = run.rows((slice(None),) * len(run.names))
        shape = [1] * rank
        shape[position : position + len(run.names)] = run.target
        masks.append((rows >= 0).reshape(shape))
        position += len(run.names)
    return masks


def _merge(inherited: jax.Array, fresh: jax.Array, kept: Sequence[Any]) -> jax.Array:
    return jnp.where(reduce(jnp.logical_and, kept), inherited, fresh)
