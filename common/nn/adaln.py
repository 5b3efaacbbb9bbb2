"""adaLN-Zero: transformer blocks that a condition modulates (DiT §3.2; Peebles & Xie 2023), and the features of a
diffusion time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from heirloom.common.nn.block import Block, Remat, each, modulate, scan, stack
from heirloom.common.nn.dense import Dense, Sizes, xavier_uniform, zeros
from heirloom.common.nn.norm import LayerNorm

EPS = 1e-6  # of every LayerNorm
XAVIER = xavier_uniform()


class Modulation(NamedTuple):
    """Everything the blocks know of the condition: [layer, 6, batch, embed] for the blocks and [2, batch, embed] for
    the final norm.
    """

    blocks: jax.Array
    final: jax.Array


class Modulated(nnx.Module):
    """A stack of modulated blocks, a modulated norm, and a linear map: `blocks`, `final_norm` and `final` of a
    model.
    """

    blocks: nnx.Module
    final_norm: LayerNorm
    final: Dense

    def transform(
        self, x: jax.Array, modulation: Modulation, *inputs: Any, remat: Remat = "none", **shared: Any
    ) -> jax.Array:
        """Tokens [batch, token, embed] to [batch, token, *written]. inputs, shared: further arguments of the blocks."""
        x = scan(self.blocks, x, modulation.blocks, *inputs, remat=remat, **shared)
        shift, scale = modulation.final[:, :, None].astype(x.dtype)
        return self.final(modulate(self.final_norm(x), shift, scale))


class AdalnTransformer(Modulated):
    """Blocks whose norms are shifted and scaled, and whose branches are gated, by a condition; then a modulated norm
    and a linear map.

    A model derives from it, so that the parameters are `blocks`, `modulation`, `final_modulation` and `final` of the
    model itself. Modulations and the last map start at zero: at first a block is the identity and the output is 0.

    sizes: of `embed`, `hidden` and the axes of `written`. attention: makes the module that mixes tokens, called with
    `rngs`. written: the axes of one token's output, such as "latent".
    """

    def __init__(
        self, sizes: Sizes, *, layers: int, attention: Callable[..., nnx.Module], written: str, rngs: nnx.Rngs
    ):
        def block(rngs: nnx.Rngs) -> Block:
            init = dict(up=XAVIER, down=XAVIER, bias=zeros)
            return Block(sizes, attention=attention, activation="gelu_tanh", eps=EPS, **init, affine=False, rngs=rngs)

        def parts(count: int, rngs: nnx.Rngs) -> Dense:
            return Dense("embed -> part embed", {**sizes, "part": count}, init=zeros, rngs=rngs)

        self.blocks = stack(block, layers, rngs)
        self.modulation = stack(lambda rngs: parts(6, rngs), layers, rngs)
        self.final_modulation = parts(2, rngs)
        self.final_norm = LayerNorm(sizes, eps=EPS, affine=False, rngs=rngs)
        self.final = Dense(f"embed -> {written}", sizes, init=zeros, rngs=rngs)

    def modulation_of(self, condition: jax.Array) -> Modulation:
        """The modulation of every layer by a condition [batch, embed], before its SiLU."""
        condition = jax.nn.silu(condition)
        return Modulation(
            jnp.moveaxis(each(self.modulation, condition), 2, 1), jnp.moveaxis(self.final_modulation(condition), 1, 0)
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
