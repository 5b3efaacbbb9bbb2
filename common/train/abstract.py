"""A train step with shapes in place of arrays, for the ahead-of-time compiler."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from heirloom.common.errors import InputError
from heirloom.common.mesh import batch_sharding, row_shards, shardings
from heirloom.common.surgery.axes import Spec
from heirloom.common.train.parts import Shapes
from heirloom.common.train.state import State
from heirloom.common.train.step import Params, Step


@dataclass(frozen=True)
class Abstract:
    """A train step and its arguments as `jax.ShapeDtypeStruct`s with shardings. flops: of one step, all devices."""

    step: Step
    state: State
    batch: Mapping[str, Any]
    flops: float


def abstract_params(spec: Spec, mesh: Mesh) -> Params:
    """Returns the parameters of a model as shapes with shardings."""
    layout = shardings(spec, mesh)
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout[path]) for path, leaf in spec.items()}


def abstract_batch(mesh: Mesh, shapes: Shapes) -> dict[str, Any]:
    """Returns a batch's columns as shapes with split rows. Raises InputError where the mesh does not divide them."""
    shards = row_shards(mesh)
    if uneven := next((shape[0] for shape, _ in shapes.values() if shape[0] % shards), None):
        parts = f"{shards} parts (mesh data x fsdp)"
        raise InputError(f"a batch of {uneven} cannot be divided into {parts}: change --pipeline.batch")
    rows = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, (shape, dtype) in shapes.items()}
