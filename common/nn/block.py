"""The pre-norm transformer block, and stacks of it: one compiled body whatever the depth."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
from flax import nnx

from common.nn.attention import Attend, Attention
from common.nn.dense import Init, Sizes, uniform_fan_in, xavier_uniform
from common.nn.mlp import Mlp
from common.nn.norm import LayerNorm
from common.surgery.axes import Axes

Remat = Literal["none", "full", "dots"]
PACKED = xavier_uniform(packed=3)
_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


@dataclass(frozen=True)
class BlockInit:
    """Initialisers of a block's kernels; the defaults are torch's."""

    qkv: Init = PACKED
    out: Init = uniform_fan_in
    up: Init = uniform_fan_in
    down: Init = uniform_fan_in


class Block(nnx.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)). `x` is [batch, token, embed]."""

    def __init__(self, sizes: Sizes, *, attend: Attend, activation: str, eps: float, init: BlockInit, rngs: nnx.Rngs):
        self.attn_norm = LayerNorm(sizes, eps=eps, rngs=rngs)
        self.attn = Attention(sizes, attend=attend, qkv=init.qkv, out=init.out, rngs=rngs)
        self.mlp_norm = LayerNorm(sizes, eps=eps, rngs=rngs)
        self.mlp = Mlp(sizes, activation=activation, up=init.up, down=init.down, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


def stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`layers` modules as one, each parameter with the axis `layer` in front; call it through `scan`."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(params=0))))
    state = jax.vmap(lambda key: nnx.split(make(nnx.Rngs(params=key)))[1])(jax.random.split(rngs.params(), layers))
    for _, variable in nnx.to_flat_state(state):
        variable.set_metadata(axes=str(Axes.parse(variable.get_metadata()["axes"]).stacked("layer")))
    return nnx.merge(graph, state)


def scan(blocks: nnx.Module, x: jax.Array, *, remat: Remat = "none") -> jax.Array:
    """Run a stack over `x`. `remat`: recompute whole blocks in the backward pass ("full") or all but their matmuls ("dots")."""
    graph, state = nnx.split(blocks)

    def body(x: jax.Array, layer: nnx.State) -> tuple[jax.Array, None]:
        return nnx.merge(graph, layer)(x), None

    if remat != "none":
        body = jax.checkpoint(body, policy=_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, x, state)[0]
