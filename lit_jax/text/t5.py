"""The encoder of T5 v1.1 (Raffel et al. 2020; Shazeer 2020): the text encoder of PixArt-Sigma and its students."""

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from heirloom.common.errors import InputError, between, positive
from heirloom.common.nn.block import scan, stack
from heirloom.common.nn.dense import Init, Sizes, normal, param
from heirloom.common.nn.mlp import ACTIVATIONS
from heirloom.common.nn.norm import RmsNorm
from heirloom.common.nn.precision import lookup, wide_matmul
from heirloom.common.surgery.axes import Axes, Spec
from heirloom.common.surgery.report import attention_macs, count, kernel_macs

MASKED = -1e9  # added to the attention to padding, which is 0 after the softmax


@dataclass(frozen=True)
class T5Config:
    """The encoder of a T5 v1.1, mT5 or ByT5. The defaults are T5-v1.1-XXL's."""

    vocabulary: int = 32128
    """Rows of the table of tokens. T5 pads it: its tokenizer has 32,100 entries."""
    width: int = 4096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    """Channels of a head; heads x head_dim need not be the width."""
    hidden: int = 10240
    """Units of the gated MLP."""
    buckets: int = 32
    """Rows of the table of relative positions: half for each direction."""
    max_distance: int = 128
    """Distances from here on share the last bucket of their direction."""
    eps: float = 1e-6

    def __post_init__(self) -> None:
        positive(self, "vocabulary", "width", "layers", "heads", "head_dim", "hidden", most=2**24)
        positive(self, "max_distance", most=2**24)
        between(self, "eps", below=1.0)
        if self.buckets < 4 or self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise InputError(
                f"{self.buckets} buckets up to a distance of {self.max_distance}: choose a multiple of 4, and a"
                " distance above a quarter of it"
            )

    def override(self, max_distance: int | None = None, eps: float | None = None) -> "T5Config":
        """Returns the encoder with settings that its weights do not contain. Raises InputError."""
        return replace(
            self,
            max_distance=self.max_distance if max_distance is None else max_distance,
            eps=self.eps if eps is None else eps,
        )


class Projection(nnx.Module):
    """A linear map without a bias, [..., *inputs] -> [..., *outputs] f32, for a kernel of any dtype (`wide_matmul`).

    axes: "inputs -> outputs".
    """

    def __init__(self, axes: str, sizes: Sizes, *, init: Init, rngs: nnx.Rngs):
        self.inputs = len(Axes.parse(axes).where("read"))
        self.kernel = param(axes, sizes, init, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, lead = self.kernel[...], x.shape[: x.ndim - self.inputs]
        flat = kernel.reshape(prod(kernel.shape[: self.inputs]), prod(kernel.shape[self.inputs :]))
        return wide_matmul(x.reshape(*lead, -1), flat).reshape(*lead, *kernel.shape[self.inputs :])


class T5Attention(nnx.Module):
    """Self-attention without biases and without the division by sqrt(head_dim); softmax in f32.

    x: [batch, token, embed]. bias: [batch or 1, head, query, key] f32, added to the products of queries and keys: their
    relative positions and the mask.
    """

    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        width, inner = sizes["embed"], sizes["head"] * sizes["head_dim"]
        query = normal((width * sizes["head_dim"]) ** -0.5)  # instead of dividing by sqrt(head_dim)
        self.query = Projection("embed -> head head_dim", sizes, init=query, rngs=rngs)
        self.key = Projection("embed -> head head_dim", sizes, init=normal(width**-0.5), rngs=rngs)
        self.value = Projection("embed -> head head_dim", sizes, init=normal(width**-0.5), rngs=rngs)
        self.out = Projection("head head_dim -> embed", sizes, init=normal(inner**-0.5), rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        logits = jnp.einsum("bqhd,bkhd->bhqk", self.query(x), self.key(x)) + bias
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1), self.value(x)))


class GatedMlp(nnx.Module):
    """embed -> hidden -> embed with a gate: down(gelu(gate(x)) * up(x)), GELU by its tanh approximation (GEGLU)."""

    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        up, down = normal(sizes["embed"] ** -0.5), normal(sizes["hidden"] ** -0.5)
        self.gate = Projection("embed -> hidden", sizes, init=up, rngs=rngs)
        self.up = Projection("embed -> hidden", sizes, init=up, rngs=rngs)
        self.down = Projection("hidden -> embed", sizes, init=down, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS["gelu_tanh"](self.gate(x)) * self.up(x))


class T5Block(nnx.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)), in f32. x: [batch, token, embed]; bias: see `T5Attention`."""

    def __init__(self, cfg: T5Config, *, rngs: nnx.Rngs):
        sizes = _sizes(cfg)
        self.attn_norm = RmsNorm(sizes, eps=cfg.eps, rngs=rngs)
        self.attn = T5Attention(sizes, rngs=rngs)
        self.mlp_norm = RmsNorm(sizes, eps=cfg.eps, rngs=rngs)
        self.mlp = GatedMlp(sizes, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        x = x + self.attn(self.attn_norm(x), bias)
        return x + self.mlp(self.mlp_norm(x))


class TokenTable(nnx.Module):
    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        self.table = param("vocab -> embed", sizes, normal(1.0), rngs)


class PositionTable(nnx.Module):
    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        self.table = param("bucket -> head", sizes, normal(sizes["embed"] ** -0.5), rngs)


class T5Encoder(nnx.Module):
    """Features of tokens. tokens: [batch, token] int32; mask: [batch, token] bool, false for padding.

    Returns [batch, token, width] f32. Features of padding are computed too and mean nothing.
    """

    def __init__(self, cfg: T5Config, *, rngs: nnx.Rngs):
        sizes = _sizes(cfg)
        self.embed = TokenTable(sizes, rngs=rngs)
        self.position = PositionTable(sizes, rngs=rngs)
        self.blocks: Any = stack(lambda rngs: T5Block(cfg, rngs=rngs), cfg.layers, rngs)
        self.norm = RmsNorm(sizes, eps=cfg.eps, rngs=rngs)
        self.cfg = cfg

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        x = lookup(self.embed.table[...], tokens).astype(jnp.float32)
        bias = attention_bias(self.cfg, self.position.table[...], mask)
        return self.norm(scan(self.blocks, x, bias=bias))


def _sizes(cfg: T5Config) -> dict[str, int]:
    sizes = dict(embed=cfg.width, head=cfg.heads, head_dim=cfg.head_dim, hidden=cfg.hidden)
    return sizes | dict(vocab=cfg.vocabulary, bucket=cfg.buckets)


def attention_bias(cfg: T5Config, table: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns what is added to the attention logits of every layer: [batch, head, query, key] f32.

    table: [bucket, head], learned, by the distance from query to key. mask: [batch, token] bool, false for padding.
    """
    positions = np.arange(mask.shape[1])
    buckets = position_bucket(positions[None] - positions[:, None], cfg.buckets, cfg.max_distance)
    by_position = jnp.moveaxis(table.astype(jnp.float32)[buckets], -1, 0)
    return by_position[None] + jnp.where(mask, 0.0, MASKED)[:, None, None, :]


def position_bucket(distance: np.ndarray, buckets: int, max_distance: int) -> np.ndarray:
    """Returns the bucket of each distance (key minus query): exact up to a quarter of the buckets, then logarithmic.

    The upper half of the buckets is for keys after the query. Computed in f32, as the mesh-tensorflow code of T5 does.
    """
    half, exact = buckets // 2, buckets // 4
    apart = np.abs(distance)
    growth = np.log(np.maximum(apart, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        np.log(max_distance / exact)
    )
    far = exact + (growth * np.float32(half - exact)).astype(np.int32)
    return half * (distance > 0) + np.where(apart < exact, apart, np.minimum(far, half - 1))


def parameters(spec: Spec) -> dict[str, int]:
    """Counts parameters: of the table of tokens, and in total."""
    return {"embed": count(spec, "embed/**"), "total": count(spec, "**")}


def macs(cfg: T5Config, spec: Spec, tokens: int = 300) -> int:
    """Counts the multiply-accumulates of one prompt of `tokens` tokens (PixArt-Sigma's 300)."""
    total = sum(kernel_macs(spec, (("**", tokens),)).values())
    return total + attention_macs(spec["blocks/attn/query/kernel"], tokens)


def t5(size: str) -> T5Config:
    """Returns the config of a published T5 v1.1: `size` is small, base, large, xl or xxl."""
    width, layers, heads, hidden = _PUBLISHED[size]
    return T5Config(width=width, layers=layers, heads=heads, hidden=hidden)


_PUBLISHED = {
    "small": (512, 8, 6, 1024),
    "base": (768, 12, 12, 2048),
    "large": (1024, 24, 16, 2816),
    "xl": (2048, 24, 32, 5120),
    "xxl": (4096, 24, 64, 10240),
}
