"""Parts of the Vision Transformer: learned tokens, positions, the block with its options, and pooling by attention."""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from heirloom.common.nn.attention import Attention, CrossAttention, Memory, softmax
from heirloom.common.nn.block import Block
from heirloom.common.nn.dense import Init, Sizes, constant, normal, param, zeros
from heirloom.common.nn.mlp import Mlp
from heirloom.common.nn.norm import LayerNorm
from heirloom.common.nn.precision import widened
from heirloom.common.surgery.maps import resize

if TYPE_CHECKING:
    from heirloom.common.vit.model import VitConfig

SMALL: Init = normal(0.02)
Resample = Literal["antialiased", "plain"]


def resampled(position: jax.Array, rows: int, columns: int, how: Resample) -> jax.Array:
    """Resample positions [row, column, embed] bicubically to another grid, f32; torch has these two ways."""
    old_rows, old_columns, width = position.shape
    if how == "antialiased":
        return jax.image.resize(widened(position), (rows, columns, width), "cubic")
    maps = jnp.asarray(resize(old_rows, rows).values), jnp.asarray(resize(old_columns, columns).values)
    return jnp.einsum("rs,ct,ste->rce", *maps, widened(position))


class Token(nnx.Module):
    """A learned token, plus its learned position if it has one: [1, embed]."""

    def __init__(self, sizes: Sizes, *, position: bool, rngs: nnx.Rngs):
        self.cls = param("-> embed", sizes, SMALL, rngs)
        self.cls_position = param("-> embed", sizes, SMALL, rngs) if position else None

    def __call__(self) -> jax.Array:
        token = self.cls[...] if self.cls_position is None else self.cls[...] + self.cls_position[...]
        return token[None]


class Registers(nnx.Module):
    """Learned tokens that no pooling reads (arXiv 2309.16588), plus their positions if they have some: [register,
    embed].
    """

    def __init__(self, sizes: Sizes, *, position: bool, rngs: nnx.Rngs):
        self.register = param("register -> embed", sizes, SMALL, rngs)
        self.position = param("register -> embed", sizes, SMALL, rngs) if position else None

    def __call__(self) -> jax.Array:
        return self.register[...] if self.position is None else self.register[...] + self.position[...]


class LayerScale(nnx.Module):
    """Multiplies channels by learned factors (arXiv 2103.17239)."""

    def __init__(self, sizes: Sizes, *, initial: float, rngs: nnx.Rngs):
        self.scale = param("embed", sizes, constant(initial), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return (x * widened(self.scale[...])).astype(x.dtype)


class VitBlock(Block):
    """A pre-norm block with LayerScale, norms inside, a gated MLP, as the config says, and stochastic depth.

    keep: [2, batch], 0 or 1 / (1 - rate): factors of attention and MLP branch.
    """

    def __init__(self, cfg: "VitConfig", sizes: Sizes, *, rngs: nnx.Rngs):
        inner = cfg.eps if cfg.inner_norms else None
        attention = partial(
            Attention,
            sizes,
            attend=softmax(kernel=cfg.kernel),
            qkv=SMALL,
            out=SMALL,
            qkv_bias=cfg.qkv_bias,
            qk_eps=cfg.eps if cfg.qk_norm else None,
            norm_eps=inner,
        )
        mlp = partial(Mlp, gated=cfg.gated, norm_eps=inner)
        init: dict[str, Any] = dict(up=SMALL, down=SMALL, bias=zeros)
        super().__init__(
            sizes, attention=attention, activation=cfg.activation, eps=cfg.eps, mlp=mlp, **init, rngs=rngs
        )
        scaled = cfg.layer_scale != 0
        self.attn_scale = LayerScale(sizes, initial=cfg.layer_scale, rngs=rngs) if scaled else None
        self.mlp_scale = LayerScale(sizes, initial=cfg.layer_scale, rngs=rngs) if scaled else None

    def __call__(self, x: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        attn, mlp = (None, None) if keep is None else keep[:, :, None, None].astype(x.dtype)
        x = x + _factored(self.attn(self.attn_norm(x)), self.attn_scale, attn)
        return x + _factored(self.mlp(self.mlp_norm(x)), self.mlp_scale, mlp)


def _factored(branch: jax.Array, scale: LayerScale | None, keep: jax.Array | None) -> jax.Array:
    branch = branch if scale is None else scale(branch)
    return branch if keep is None else keep * branch


class AttentionPool(nnx.Module):
    """Pools tokens [batch, token, embed] to [batch, embed]: one learned query attends to them, then an MLP with a
    residual (MAP head; arXiv 2106.04560 and SigLIP).
    """

    def __init__(self, cfg: "VitConfig", sizes: Sizes, *, rngs: nnx.Rngs):
        self.latent = param("-> embed", sizes, SMALL, rngs)
        self.memory = Memory(sizes, init=SMALL, rngs=rngs)
        self.attn = CrossAttention(sizes, attend=softmax(), query=SMALL, out=SMALL, rngs=rngs)
        self.norm = LayerNorm(sizes, eps=cfg.eps, rngs=rngs)
        self.mlp = Mlp(sizes, activation=cfg.activation, up=SMALL, down=SMALL, bias=zeros, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        query = jnp.broadcast_to(self.latent[...], (len(x), 1, x.shape[-1])).astype(x.dtype)
        y = self.attn(query, self.memory(x))
        return (y + self.mlp(self.norm(y)))[:, 0]
