"""How the stored blocks of a gene become the layers of its auxiliary net."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from heirloom.common.nn.block import rematerialised
from heirloom.common.nn.precision import lookup, widened
from heirloom.common.vit.stages import linear_coefficients, unrolled_map

if TYPE_CHECKING:
    from heirloom.common.vit.model import VitConfig


def unrolled(blocks: nnx.Module, cfg: "VitConfig") -> nnx.Module:
    """Compute the layers from the stored blocks: a gather along `layer` (SWS), or linear coefficients (TLEG)."""
    if cfg.gene == "none":
        return blocks
    graph, state = nnx.split(blocks)
    if cfg.gene == "sws":
        rows = np.asarray(unrolled_map(cfg.layout))
        return nnx.merge(graph, jax.tree.map(lambda x: lookup(x, rows), state))
    line = jnp.asarray(linear_coefficients(cfg.depth))
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.tensordot(line.astype(x.dtype), x, axes=1), state))


def loop(blocks: nnx.Module, cfg: "VitConfig", x: jax.Array, keep: tuple[jax.Array, ...]) -> jax.Array:
    """Apply SWS's auxiliary net without copies of its blocks: one scan per stage, over the block that it repeats."""
    graph, state = nnx.split(blocks)
    first = 0
    for stage, times in enumerate(cfg.layout):
        one = jax.tree.map(lambda leaf, stage=stage: leaf[stage], state)
        # A scan adds up the gradient of a shared array in the array's dtype: make it f32.
        wide = jax.tree.map(widened, one)

        def turn(x: jax.Array, keep: tuple[jax.Array, ...], one: Any = one, wide: Any = wide) -> tuple[jax.Array, None]:
            block = nnx.merge(graph, jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), wide, one))
            return block(x, *keep), None

        body = rematerialised(turn, cfg.remat)
        x = jax.lax.scan(body, x, tuple(part[first : first + times] for part in keep), length=times)[0]
        first += times
    return x
