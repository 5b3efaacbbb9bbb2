"""The pre-norm transformer block, and stacks of blocks: the block is compiled once for any depth."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import nnx

from heirloom.common.nn.dense import Init, Sizes, uniform_fan_in
from heirloom.common.nn.mlp import Activation, Mlp
from heirloom.common.nn.norm import LayerNorm
from heirloom.common.nn.quantized import quantized
from heirloom.common.surgery.axes import Axes

Remat = Literal["none", "full", "dots"]
_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Block(nnx.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)). `x` is [batch, token, embed].

    attention: called with `rngs`, makes the module that mixes tokens. affine=False: norms without parameters, for calls
    with a modulation [part, batch, embed]: shift, scale and gate of the attention, then of the MLP (adaLN-Zero; DiT
    §3.2).
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        attention: Callable[..., nnx.Module],
        activation: Activation,
        eps: float,
        up: Init = uniform_fan_in,
        down: Init = uniform_fan_in,
        bias: Init = uniform_fan_in,
        affine: bool = True,
        rngs: nnx.Rngs,
    ):
        self.attn_norm = LayerNorm(sizes, eps=eps, affine=affine, rngs=rngs)
        self.attn: Any = attention(rngs=rngs)
        self.mlp_norm = LayerNorm(sizes, eps=eps, affine=affine, rngs=rngs)
        self.mlp = Mlp(sizes, activation=activation, up=up, down=down, bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array, modulation: jax.Array | None = None) -> jax.Array:
        return self.feed(self.mix(x, modulation), modulation)

    def mix(self, x: jax.Array, modulation: jax.Array | None = None, **options: Any) -> jax.Array:
        """Returns x plus its attention. options: of the attention module."""
        if modulation is None:
            return x + self.attn(self.attn_norm(x), **options)
        shift, scale, gate = modulation[:3, :, None].astype(x.dtype)
        return x + gate * self.attn(modulate(self.attn_norm(x), shift, scale), **options)

    def feed(self, x: jax.Array, modulation: jax.Array | None = None) -> jax.Array:
        """Returns x plus its MLP."""
        if modulation is None:
            return x + self.mlp(self.mlp_norm(x))
        shift, scale, gate = modulation[3:, :, None].astype(x.dtype)
        return x + gate * self.mlp(modulate(self.mlp_norm(x), shift, scale))


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns x * (1 + scale) + shift (adaLN; DiT §3.2)."""
    return x * (1 + scale) + shift


def stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """Makes `layers` modules as one whose parameters have a first axis `layer`; call it through `scan`."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(params=0))))
    state = jax.vmap(lambda key: nnx.split(make(nnx.Rngs(params=key)))[1])(jax.random.split(rngs.params(), layers))
    for _, variable in nnx.to_flat_state(state):
        variable.set_metadata(axes=str(Axes.parse(variable.get_metadata()["axes"]).stacked("layer")))
    return nnx.merge(graph, state)


def scan(blocks: nnx.Module, x: jax.Array, *inputs: Any, remat: Remat = "none", **shared: Any) -> jax.Array:
    """Runs a stack over `x`. inputs: further arguments of each block, stacked along layer. shared: the same for all.

    remat: recompute whole blocks in the backward pass ("full"), or all but their matmuls ("dots").
    """
    graph, state = nnx.split(blocks)

    def body(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        state, *inputs = layer
        block = nnx.merge(graph, state)
        return block(x, *inputs, **shared), nnx.state(block, nnx.BatchStat)

    x, statistics = jax.lax.scan(rematerialised(body, remat), x, (state, *inputs))
    nnx.update(blocks, statistics)
    return x


def rematerialised(body: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """Returns the body of a scan, recomputed in the backward pass as `remat` says."""
    return body if remat == "none" else jax.checkpoint(body, policy=_POLICIES[remat], prevent_cse=False)


def run(block: nnx.Module, x: jax.Array, *inputs: Any, remat: Remat = "none") -> jax.Array:
    """Runs a single block that is not part of a stack. inputs, remat: as in `scan`."""
    if remat == "none":
        return block(x, *inputs)
    graph, state = nnx.split(block)

    def body(state: nnx.State, x: jax.Array) -> tuple[jax.Array, nnx.State]:
        block = nnx.merge(graph, state)
        return block(x, *inputs), nnx.state(block, nnx.BatchStat)

    x, statistics = jax.checkpoint(body, policy=_POLICIES[remat])(state, x)
    nnx.update(block, statistics)
    return x


def each(blocks: nnx.Module, x: jax.Array, method: str = "__call__") -> Any:
    """Returns the outputs of all modules of a stack for the same `x`: [layer, ...].

    Quantised kernels are widened one layer at a time.
    """
    graph, state = nnx.split(blocks)

    def one(layer: nnx.State) -> Any:
        return getattr(nnx.merge(graph, layer), method)(x)

    return jax.lax.map(one, state) if quantized(state) else jax.vmap(one)(state)
