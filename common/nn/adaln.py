"""Transformer blocks that a condition modulates: adaLN-Zero (DiT §3.2; Peebles & Xie 2023) and adaLN-single
(PixArt-alpha §2.3; Chen et al. 2023); and the features of a diffusion time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from heirloom.common.nn.block import Block, CrossBlock, Remat, each, modulate, scan, stack
from heirloom.common.nn.dense import Dense, Sizes, normal, param, xavier_uniform, zeros
from heirloom.common.nn.norm import LayerNorm
from heirloom.common.nn.precision import add

EPS = 1e-6  # of every LayerNorm
XAVIER = xavier_uniform()


class Modulation(NamedTuple):
    """Everything the blocks know of the condition: [layer, 6, batch, embed] for the blocks and [2, batch, embed] for
    the final norm.
    """

    blocks: jax.Array
    final: jax.Array


class ModulatedTransformer(nnx.Module):
    """Blocks whose norms are shifted and scaled, and whose branches are gated; then a modulated norm and a linear map.

    A model derives from a subclass, so that the parameters are `blocks`, `modulation`, `final`, ... of the model
    itself. The last map starts at zero: at first the output is 0.

    sizes: of `embed`, `hidden` and the axes of `written`. attention: makes the module that mixes tokens, called with
    `rngs`. written: the axes of one token's output, such as "latent". cross: see `CrossBlock`.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        layers: int,
        attention: Callable[..., nnx.Module],
        written: str,
        cross: Callable[..., nnx.Module] | None = None,
        rngs: nnx.Rngs,
    ):
        def block(rngs: nnx.Rngs) -> Block:
            init: dict[str, Any] = dict(up=XAVIER, down=XAVIER, bias=zeros, activation="gelu_tanh", eps=EPS)
            make = Block if cross is None else partial(CrossBlock, cross=cross)
            return make(sizes, attention=attention, **init, affine=False, rngs=rngs)

        self.blocks = stack(block, layers, rngs)
        self.final_norm = LayerNorm(sizes, eps=EPS, affine=False, rngs=rngs)
        self.final = Dense(f"embed -> {written}", sizes, init=zeros, rngs=rngs)

    def transform(
        self, x: jax.Array, modulation: Modulation, *inputs: Any, remat: Remat = "none", **shared: Any
    ) -> jax.Array:
        """Tokens [batch, token, embed] to [batch, token, *written]. inputs, shared: further arguments of the blocks, as
        in `scan`.
        """
        x = scan(self.blocks, x, modulation.blocks, *inputs, remat=remat, **shared)
        shift, scale = modulation.final[:, :, None].astype(x.dtype)
        return self.final(modulate(self.final_norm(x), shift, scale))


class AdalnTransformer(ModulatedTransformer):
    """Each block has a linear map from the condition to its modulation (adaLN-Zero). The maps start at zero: at first a
    block is the identity.
    """

    def __init__(
        self, sizes: Sizes, *, layers: int, attention: Callable[..., nnx.Module], written: str, rngs: nnx.Rngs
    ):
        def parts(count: int, rngs: nnx.Rngs) -> Dense:
            return Dense("embed -> part embed", {**sizes, "part": count}, init=zeros, rngs=rngs)

        super().__init__(sizes, layers=layers, attention=attention, written=written, rngs=rngs)
        self.modulation = stack(lambda rngs: parts(6, rngs), layers, rngs)
        self.final_modulation = parts(2, rngs)

    def modulation_of(self, condition: jax.Array) -> Modulation:
        """The modulation of every layer by a condition [batch, embed], before its SiLU."""
        condition = jax.nn.silu(condition)
        return Modulation(
            jnp.moveaxis(each(self.modulation, condition), 2, 1), jnp.moveaxis(self.final_modulation(condition), 1, 0)
        )


class AdalnSingleTransformer(ModulatedTransformer):
    """One linear map from the condition serves all blocks; each block adds a table of its own (adaLN-single;
    PixArt-alpha §2.3).

    The final norm is modulated by the condition itself and a table, not by the linear map.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        layers: int,
        attention: Callable[..., nnx.Module],
        cross: Callable[..., nnx.Module],
        written: str,
        rngs: nnx.Rngs,
    ):
        super().__init__(sizes, layers=layers, attention=attention, cross=cross, written=written, rngs=rngs)
        tables = normal(sizes["embed"] ** -0.5)
        self.modulation = Dense("embed -> part embed", {**sizes, "part": 6}, init=normal(0.02), rngs=rngs)
        self.table = param("layer part embed", {**sizes, "layer": layers, "part": 6}, tables, rngs)
        self.final_table = param("part embed", {**sizes, "part": 2}, tables, rngs)

    def modulation_of(self, condition: jax.Array) -> Modulation:
        """The modulation of every layer by a condition [batch, embed], before its SiLU."""
        blocks = jnp.moveaxis(self.modulation(jax.nn.silu(condition)), 1, 0)
        return Modulation(
            add(blocks[None], self.table[...][:, :, None]), add(condition[None], self.final_table[...][:, None])
        )


def time_features(t: jax.Array, frequencies: int = 256, divisor: int | None = None) -> jax.Array:
    """[batch] -> [batch, frequencies] f32: cosines, then sines, at frequencies from 1 down to nearly 1/10000 (DiT, ADM;
    GLIDE's order).

    t: [batch], fractional allowed. frequencies: an even number, 256 in DiT. divisor: of the exponents, half the
    frequencies unless given.
    """
    half = frequencies // 2
    frequency = jnp.asarray(np.exp(-np.log(10000) * np.arange(half) / (divisor or half)), jnp.float32)
    angle = t.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)
