"""A small diffusion transformer over weight tokens."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from flax import nnx

from heirloom.common.errors import InputError, positive
from heirloom.common.nn.adaln import XAVIER, AdalnTransformer, time_features
from heirloom.common.nn.attention import Attention, softmax
from heirloom.common.nn.dense import Dense, normal, param
from weightgen.generator.conditions import Condition
from weightgen.tokens import Order

FREQUENCIES = 128


@dataclass(frozen=True)
class DenoiserConfig:
    """Width and depth of the transformer."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    hidden: int = 384

    def __post_init__(self) -> None:
        positive(self, "width", "layers", "hidden")

    @property
    def head_dim(self) -> int:
        if self.heads < 1 or self.width % self.heads:
            raise InputError(f"{self.heads} heads do not divide a width of {self.width}: change heads or width")
        return self.width // self.heads


class TokenDit(AdalnTransformer):
    """Predicts from noisy latents [batch, token, latent], times [batch] and a condition; returns the same shape.

    Tokens that are `exchangeable` (the rows of a head) get no position, and with a condition for each token the model
    is equivariant to their order; `ordered` ones (the neurons of a network, chunks) have a learned position each.
    adaLN-Zero as in DiT: 0 at first.
    """

    def __init__(self, cfg: DenoiserConfig, latent: int, tokens: int, order: Order, *, rngs: nnx.Rngs):
        sizes = dict(embed=cfg.width, head=cfg.heads, head_dim=cfg.head_dim, hidden=cfg.hidden)
        sizes |= dict(latent=latent, token=tokens)
        sizes |= dict(frequency=FREQUENCIES)
        attention: Any = partial(Attention, sizes, attend=softmax(), out=XAVIER)
        self.enter = Dense("latent -> embed", sizes, init=XAVIER, rngs=rngs)
        self.position = param("token -> embed", sizes, normal(0.02), rngs) if order == "ordered" else None
        # The condition of each token; weights folders store it under this name.
        self.told = Dense("embed -> embed", sizes, init=XAVIER, rngs=rngs)
        self.time_up = Dense("frequency -> embed", sizes, init=XAVIER, rngs=rngs)
        self.time_down = Dense("embed -> embed", sizes, init=XAVIER, rngs=rngs)
        super().__init__(sizes, layers=cfg.layers, attention=attention, written="latent", rngs=rngs)

    def __call__(self, x: jax.Array, t: jax.Array, condition: Condition) -> jax.Array:
        time = self.time_down(jax.nn.silu(self.time_up(time_features(t, FREQUENCIES))))
        h = self.enter(x)
        if self.position is not None:
            h = h + self.position[...]
        if condition.tokens is not None:
            h = h + self.told(condition.tokens)
        return self.transform(h, self.modulation_of(time + condition.whole))
