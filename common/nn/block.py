"""The pre-norm transformer block, and stacks of blocks: the block is compiled once for any depth."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
from flax import nnx

from heirloom.common.nn.attention import KeyValue
from heirloom.common.nn.dense import Init, Sizes, uniform_fan_in
from heirloom.common.nn.mlp import Activation, Mlp
from heirloom.common.nn.norm import LayerNorm
from heirloom.common.nn.quantized import quantized
from heirloom.common.surgery.axes import Axes

Grid = tuple[int, int]
"""Rows and columns of tokens in raster order."""
Remat = Literal["none", "full", "dots"]
_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Block(nnx.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)). `x` is [batch, token, embed].

    attention: called with `rngs`, makes the module that mixes tokens. mlp: makes the MLP, for other options than the
    plain one's. affine=False: norms without parameters, for calls with a modulation [part, batch, embed]: shift, scale
    and gate of the attention, then of the MLP (adaLN-Zero; DiT §3.2).
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
        mlp: Callable[..., nnx.Module] = Mlp,
        rngs: nnx.Rngs,
    ):
        self.attn_norm = LayerNorm(sizes, eps=eps, affine=affine, rngs=rngs)
        self.attn: Any = attention(rngs=rngs)
        self.mlp_norm = LayerNorm(sizes, eps=eps, affine=affine, rngs=rngs)
        self.mlp: Any = mlp(sizes, activation=activation, up=up, down=down, bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array, modulation: jax.Array | None = None) -> jax.Array:
        if modulation is None:
            x = x + self.attn(self.attn_norm(x))
            return x + self.mlp(self.mlp_norm(x))
        parts = modulation[:, :, None].astype(x.dtype)
        x = gated(self.attn, self.attn_norm, x, parts[:3])
        return gated(self.mlp, self.mlp_norm, x, parts[3:])


class CrossBlock(Block):
    """A modulated block that reads another sequence between its two steps: x + cross(x), without a norm and without a
    gate (PixArt-alpha §2.3).

    cross: called with `rngs`, makes the `CrossAttention`; it gets the memory and the mask of a call. grid: goes to the
    attention, if given.
    """

    def __init__(self, sizes: Sizes, *, cross: Callable[..., nnx.Module], rngs: nnx.Rngs, **options: Any):
        super().__init__(sizes, rngs=rngs, **options)
        self.cross: Any = cross(rngs=rngs)

    def __call__(  # type: ignore[override]  # without a modulation and a memory there is nothing to compute
        self,
        x: jax.Array,
        modulation: jax.Array,
        memory: KeyValue,
        *,
        mask: jax.Array | None = None,
        grid: Grid | None = None,
    ) -> jax.Array:
        parts = modulation[:, :, None].astype(x.dtype)
        attn = self.attn if grid is None else partial(self.attn, grid=grid)
        x = gated(attn, self.attn_norm, x, parts[:3])
        x = x + self.cross(x, memory, mask)
        return gated(self.mlp, self.mlp_norm, x, parts[3:])


def gated(
    branch: Callable[[jax.Array], jax.Array], norm: Callable[[jax.Array], jax.Array], x: jax.Array, parts: jax.Array
) -> jax.Array:
    """Returns x + gate * branch(modulated norm of x). parts: shift, scale and gate, each broadcast against `x`."""
    return x + parts[2] * branch(modulate(norm(x), parts[0], parts[1]))


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns x * (1 + scale) + shift (adaLN; DiT §3.2)."""
    return x * (1 + scale) + shift


def stack(make: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """Makes `layers` modules as one whose parameters have a first axis `layer`; call it through `scan`."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(params=0))))
    state = jax.vmap(lambda key: nnx.split(make(nnx.Rngs(params=key)))[1])(jax.random.split(rngs.params(), layers))
    for _, variable in nnx.to_flat_state(state):
        variable.set_metadata(axes=str(Axes.parse(variable.get_metadata()["axes"]).stacked()))
    return nnx.merge(graph, state)


def scan(blocks: nnx.Module, x: jax.Array, *inputs: Any, remat: Remat = "none", **shared: Any) -> jax.Array:
    """Runs a stack over `x`. inputs: further arguments of each block, stacked along layer. shared: further keyword
    arguments, the same for every block.

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


def each(blocks: nnx.Module, x: jax.Array) -> Any:
    """Returns the outputs of all modules of a stack for the same `x`: [layer, ...] each.

    Quantised kernels are widened one layer at a time.
    """
    graph, state = nnx.split(blocks)

    def one(layer: nnx.State) -> Any:
        return nnx.merge(graph, layer)(x)

    return jax.lax.map(one, state) if quantized(state) else jax.vmap(one)(state)
