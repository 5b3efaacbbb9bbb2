"""A small diffusion transformer over weight tokens."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from heirloom.common.errors import InputError
from heirloom.common.nn.attention import Attention, softmax
from heirloom.common.nn.block import Block, each, modulate, scan, stack
from heirloom.common.nn.dense import Dense, normal, param, xavier_uniform, zeros
from heirloom.common.nn.norm import LayerNorm
from weightgen.generator.conditions import Condition
from weightgen.tokens import Order

FREQUENCIES = 128
EPS = 1e-6
XAVIER = xavier_uniform()


@dataclass(frozen=True)
class DenoiserConfig:
    """Width and depth of the transformer."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    hidden: int = 384

    @property
    def head_dim(self) -> int:
        if self.heads < 1 or self.width % self.heads:
            raise InputError(f"{self.heads} heads do not divide a width of {self.width}: change heads or width")
        return self.width // self.heads


class TokenDit(nnx.Module):
    """Predicts from noisy latents [batch, token, latent], times [batch] and a condition; returns the same shape.

    Tokens that are `exchangeable` (the rows of a head) get no position, and with a condition for each token the model is equivariant to
    their order; `ordered` ones (the neurons of a network, chunks) have a learned position each. adaLN-Zero as in DiT: 0 at first.
    """

    def __init__(self, cfg: DenoiserConfig, latent: int, tokens: int, order: Order, *, rngs: nnx.Rngs):
        sizes = dict(embed=cfg.width, head=cfg.heads, head_dim=cfg.head_dim, hidden=cfg.hidden, latent=latent, token=tokens)
        sizes |= dict(frequency=FREQUENCIES)
        attention: Any = partial(Attention, sizes, attend=softmax(), out=XAVIER)
        block: dict[str, Any] = dict(activation="gelu_tanh", eps=EPS, up=XAVIER, down=XAVIER, bias=zeros, affine=False)
        self.enter = Dense("latent -> embed", sizes, init=XAVIER, rngs=rngs)
        self.position = param("token -> embed", sizes, normal(0.02), rngs) if order == "ordered" else None
        # The condition of each token; weights folders store it under this name.
        self.told = Dense("embed -> embed", sizes, init=XAVIER, rngs=rngs)
        self.time_up = Dense("frequency -> embed", sizes, init=XAVIER, rngs=rngs)
        self.time_down = Dense("embed -> embed", sizes, init=XAVIER, rngs=rngs)
        self.blocks = stack(lambda rngs: Block(sizes, attention=attention, **block, rngs=rngs), cfg.layers, rngs)
        self.modulation = stack(lambda rngs: Dense("embed -> part embed", sizes | {"part": 6}, init=zeros, rngs=rngs), cfg.layers, rngs)
        self.final_modulation = Dense("embed -> part embed", sizes | {"part": 2}, init=zeros, rngs=rngs)
        self.final_norm = LayerNorm(sizes, eps=EPS, affine=False, rngs=rngs)
        self.final = Dense("embed -> latent", sizes, init=zeros, rngs=rngs)

    def __call__(self, x: jax.Array, t: jax.Array, condition: Condition) -> jax.Array:
        whole = jax.nn.silu(self.time_down(jax.nn.silu(self.time_up(time_features(t, FREQUENCIES)))) + condition.whole)
        h = self.enter(x)
        if self.position is not None:
            h = h + self.position[...]
        if condition.tokens is not None:
            h = h + self.told(condition.tokens)
        h = scan(self.blocks, h, jnp.moveaxis(each(self.modulation, whole), 2, 1))
        shift, scale = jnp.moveaxis(self.final_modulation(whole), 1, 0)[:, :, None]
        return self.final(modulate(self.final_norm(h), shift, scale))


def time_features(t: jax.Array, frequencies: int) -> jax.Array:
    """[batch] times to [batch, frequencies]: cosines, then sines, of geometrically spaced frequencies from 1 down to 1/10,000."""
    half = frequencies // 2
    angles = t[:, None].astype(jnp.float32) * jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / half)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)
