"""The Vision Transformer of timm, DeiT and SWS, and the gene: a few stored blocks, applied repeatedly."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from heirloom.common.errors import InputError, nearest, positive
from heirloom.common.nn.attention import Attention, Kernel, softmax
from heirloom.common.nn.block import Block, Remat, rematerialised, scan, stack
from heirloom.common.nn.dense import Dense, Init, Sizes, normal, param, uniform_fan_in, zeros
from heirloom.common.nn.mlp import Activation, check_activation
from heirloom.common.nn.norm import LayerNorm
from heirloom.common.nn.patch import PatchEmbed
from heirloom.common.nn.precision import add, lookup, widened
from heirloom.common.surgery.axes import Spec
from heirloom.common.surgery.report import attention_macs, count, kernel_macs
from learngene.stages import linear_coefficients, unrolled_map

Tokens = Literal["none", "cls", "cls+dist"]
Pool = Literal["norm_mean", "mean_norm", "cls", "cls+dist"]
Gene = Literal["none", "sws", "tleg"]
SMALL: Init = normal(0.02)
Images = Float[Array | np.ndarray, "batch size size channels"]
LARGEST_SIDE = 2**14  # pixels; a larger size is a mistake, and resizing the positions for it would not finish


@dataclass(frozen=True)
class VitConfig:
    """A ViT, or a gene: `layers` blocks are stored, and `layout` is how the auxiliary net applies them."""

    size: int = 224
    """Side of the input, pixels."""
    channels: int = 3
    patch: int = 16
    """Side of a patch, pixels."""
    width: int = 384
    layers: int = 12
    """Number of stored blocks."""
    heads: int = 6
    hidden: int = 1536
    """Hidden units of the MLP."""
    classes: int = 1000
    tokens: Tokens = "none"
    """Learned tokens before the patches: none (SWS), the class token (ViT), or class and distillation token (DeiT)."""
    pool: Pool = "norm_mean"
    """Input of the head: the mean of the normalised patches (norm_mean; SWS's auxiliary net), the normalised mean
    (mean_norm; timm), the class token, or class and distillation token with one head each, whose logits are averaged
    (DeiT).
    """
    activation: Activation = "gelu"
    eps: float = 1e-6
    """Epsilon of every LayerNorm."""
    gene: Gene = "none"
    """How the layers follow from the stored blocks: one block each, a block repeated per stage (SWS), or linear in
    depth (TLEG).
    """
    layout: tuple[int, ...] = ()
    """For a gene: how often each stored block is applied (SWS), or the depth of the auxiliary net (TLEG: one number).
    """
    drop_path: float = 0.0
    """Rate of stochastic depth in the last layer during training; it rises linearly from 0 in the first."""
    tying: Literal["gather", "loop"] = "gather"
    """How SWS's auxiliary net repeats its blocks: "gather" copies them for one scan, "loop" scans each stage without
    copies.
    """
    remat: Remat = "none"
    """Recompute blocks in the backward pass: whole ("full"), or all but their matmuls ("dots")."""
    kernel: Kernel = "xla"
    """Attention: "cudnn" is the flash kernel of NVIDIA GPUs, for bfloat16."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", tuple(self.layout))
        positive(self, "size", "patch", most=LARGEST_SIDE)
        positive(self, "channels", "width", "layers", "hidden", "classes", most=2**20)
        if not 0 < self.eps < 1:  # refuses NaN too
            raise InputError(f"eps is {self.eps:g}: choose a number between 0 and 1, such as 1e-6")
        positive(self, "layout", most=1000)
        allowed = {"cls": ("cls", "cls+dist"), "cls+dist": ("cls+dist",)}.get(self.pool)
        if allowed and self.tokens not in allowed:
            needed = f"pool {self.pool!r} needs its token"
            raise InputError(f"tokens is {self.tokens!r}: {needed}, set tokens to {allowed[0]!r}")
        if self.gene == "none" and self.layout:
            needed = "set gene to 'sws' or 'tleg', or leave layout empty"
            raise InputError(f"layout is {self.layout}, and only a gene has one: {needed}")
        if self.gene == "sws" and (len(self.layout) != self.layers or min(self.layout, default=0) < 1):
            needed = f"a gene of {self.layers} blocks needs {self.layers} counts, each 1 or more"
            raise InputError(f"layout is {self.layout}: {needed}")
        if self.gene == "tleg" and (self.layers != 2 or len(self.layout) != 1):
            needed = "a TLEG gene needs layers 2 and a layout of one number, the depth"
            raise InputError(f"layers is {self.layers} and layout {self.layout}: {needed}")

    @property
    def depth(self) -> int:
        """Number of layers that are applied; for a gene, those of its auxiliary net."""
        return sum(self.layout) or self.layers

    @property
    def grid(self) -> int:
        """Number of patches along a side. Raises InputError when the patch size does not divide the image size."""
        if self.size < self.patch or self.size % self.patch:
            raise InputError(f"patches of {self.patch} px do not fill pictures of {self.size} px: change size or patch")
        return self.size // self.patch

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches."""
        return {"none": 0, "cls": 1, "cls+dist": 2}[self.tokens]

    @property
    def head_dim(self) -> int:
        """Channels of one head. Raises InputError when the heads do not divide the width."""
        if self.heads < 1 or self.width % self.heads:
            given = f"{self.heads} heads do not divide a width of {self.width}"
            raise InputError(f"{given}: set the number of heads (convert --set heads=N)")
        return self.width // self.heads

    def of_depth(self, depth: int) -> "VitConfig":
        """Config of the ordinary ViT of `depth` untied blocks that a gene, or another ViT of this shape, expands to."""
        return replace(self, layers=depth, gene="none", layout=())

    def override(
        self,
        heads: int | None = None,
        activation: Activation | None = None,
        eps: str | None = None,
        layout: str | None = None,
        pool: Pool | None = None,
        size: int | None = None,
    ) -> "VitConfig":
        """Set what the shapes of the weights do not determine. Raises InputError for an invalid value."""
        if activation:
            check_activation(activation)
        if pool and pool not in get_args(Pool):
            known = f"{nearest(pool, get_args(Pool))}: choose one of {', '.join(get_args(Pool))}"
            raise InputError(f"unknown pool {pool!r}{known}")
        for name, value in (("heads", heads), ("size", size)):
            if value is not None and not str(value).isdecimal():
                raise InputError(f"{name} is {value!r}: write a whole number of 1 or more")
        return replace(
            self,
            heads=self.heads if heads is None else int(heads),
            activation=activation or self.activation,
            eps=_number(eps) if eps is not None else self.eps,
            layout=counts(str(layout), "layout") if layout else self.layout,
            pool=pool or self.pool,
            size=self.size if size is None else int(size),
        )


def counts(text: str, name: str) -> tuple[int, ...]:
    """Parse comma-separated whole numbers, such as `3,3,4,3,3`. Raises InputError that names the option."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{name} is {text!r}: write whole numbers separated by commas, such as 3,3,4,3,3") from error


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise InputError(f"eps is {text!r}: write a number, such as 1e-6") from error
    if not 0 < value < 1:
        raise InputError(f"eps is {text}: write a number between 0 and 1, such as 1e-6")
    return value


class DroppedBlock(Block):
    """A block with stochastic depth. keep: [2, batch], 0 or 1 / (1 - rate): factors of attention and MLP branch."""

    def __call__(self, x: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        if keep is None:
            return super().__call__(x)
        attn, mlp = keep[:, :, None, None].astype(x.dtype)
        x = x + attn * self.attn(self.attn_norm(x))
        return x + mlp * self.mlp(self.mlp_norm(x))


class Token(nnx.Module):
    """A learned token plus its learned position: [embed]."""

    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        self.cls = param("-> embed", sizes, SMALL, rngs)
        self.cls_position = param("-> embed", sizes, SMALL, rngs)

    def __call__(self) -> jax.Array:
        return self.cls[...] + self.cls_position[...]


class Vit(nnx.Module):
    """ViT classifier: normalised images, f32, to class logits, f32.

    For a gene this is its auxiliary net: the stored blocks are unrolled inside the forward pass, so their gradients add
    up. Initial values are SWS's: N(0, 0.02^2), zero biases, and torch's default for the patch embedding.
    """

    def __init__(self, cfg: VitConfig, *, rngs: nnx.Rngs):
        sizes = dict(embed=cfg.width, head=cfg.heads, head_dim=cfg.head_dim, hidden=cfg.hidden)
        sizes |= dict(grid_row=cfg.grid, grid_col=cfg.grid)
        sizes |= dict(patch_row=cfg.patch, patch_col=cfg.patch, channel=cfg.channels)
        sizes["class"] = cfg.classes
        attention = partial(Attention, sizes, attend=softmax(kernel=cfg.kernel), qkv=SMALL, out=SMALL)
        block: dict[str, Any] = dict(attention=attention, activation=cfg.activation, eps=cfg.eps)
        block |= dict(up=SMALL, down=SMALL, bias=zeros)
        self.patch = PatchEmbed(sizes, init=uniform_fan_in, bias=uniform_fan_in, rngs=rngs)
        self.class_token = Token(sizes, rngs=rngs) if cfg.prefix > 0 else None
        self.distillation_token = Token(sizes, rngs=rngs) if cfg.prefix > 1 else None
        self.position = param("grid_row grid_col -> embed", sizes, SMALL, rngs)
        blocks: Any = stack(lambda rngs: DroppedBlock(sizes, **block, rngs=rngs), cfg.layers, rngs)
        if cfg.gene == "tleg":  # the slope of a norm starts at 0, so that every layer's scale is 1
            for norm in (blocks.attn_norm, blocks.mlp_norm):
                norm.scale[...] = norm.scale[...].at[1].set(0)
        self.blocks = blocks
        self.norm = LayerNorm(sizes, eps=cfg.eps, rngs=rngs)
        self.head = Dense("embed -> class", sizes, init=SMALL, rngs=rngs)
        two = cfg.pool == "cls+dist"
        self.distillation_head = Dense("embed -> class", sizes, init=SMALL, rngs=rngs) if two else None
        self.cfg = cfg

    def __call__(self, images: Images, key: Array | None = None) -> Float[Array, "batch classes"]:
        """Class logits. key: for stochastic depth; None: every block is applied, as in evaluation."""
        x = self.embed(images)
        keep = stochastic_depth(self.cfg, key, len(x))
        if self.cfg.gene == "sws" and self.cfg.tying == "loop":
            return self.classify(loop(self.blocks, self.cfg, x, keep))
        return self.classify(scan(unrolled(self.blocks, self.cfg), x, *keep, remat=self.cfg.remat))

    def embed(self, images: Images) -> Float[Array, "batch tokens embed"]:
        """Embed the patches, with the learned tokens before them."""
        x = self.patch(jnp.asarray(images))
        x = add(x, self.position[...].reshape(-1, x.shape[-1]))
        front = [token() for token in (self.class_token, self.distillation_token) if token is not None]
        tokens = [jnp.broadcast_to(token, (len(x), 1, x.shape[-1])).astype(x.dtype) for token in front]
        return jnp.concatenate([*tokens, x], axis=1) if tokens else x

    def classify(self, x: Float[Array, "batch tokens embed"]) -> Float[Array, "batch classes"]:
        """Pool, normalise and apply the head, or the mean of both heads, f32."""
        pool, patches = self.cfg.pool, x[:, self.cfg.prefix :]
        if pool == "norm_mean":
            return self.head(self.norm(patches).mean(1)).astype(jnp.float32)
        if pool == "mean_norm":
            return self.head(self.norm(patches.mean(1))).astype(jnp.float32)
        logits = self.head(self.norm(x[:, 0]))
        if self.distillation_head is not None:
            logits = (logits + self.distillation_head(self.norm(x[:, 1]))) / 2
        return logits.astype(jnp.float32)


def stochastic_depth(cfg: VitConfig, key: Array | None, batch: int) -> tuple[Float[Array, "layers 2 batch"], ...]:
    """Draw the factor of each branch and sample, 0 or 1 / (1 - rate); an empty tuple when no branch is dropped."""
    if key is None or cfg.drop_path == 0:
        return ()
    share = 1 - jnp.linspace(0, cfg.drop_path, cfg.depth)[:, None, None]
    return (jax.random.bernoulli(key, jnp.broadcast_to(share, (cfg.depth, 2, batch))) / share,)


def unrolled(blocks: nnx.Module, cfg: VitConfig) -> nnx.Module:
    """Compute the layers from the stored blocks: a gather along `layer` (SWS), or linear coefficients (TLEG)."""
    if cfg.gene == "none":
        return blocks
    graph, state = nnx.split(blocks)
    if cfg.gene == "sws":
        rows = np.asarray(unrolled_map(cfg.layout))
        return nnx.merge(graph, jax.tree.map(lambda x: lookup(x, rows), state))
    line = jnp.asarray(linear_coefficients(cfg.depth))
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.tensordot(line.astype(x.dtype), x, axes=1), state))


def loop(blocks: nnx.Module, cfg: VitConfig, x: jax.Array, keep: tuple[jax.Array, ...]) -> jax.Array:
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


def parameters(spec: Spec) -> dict[str, int]:
    """Count the stored parameters: of the blocks, and the total."""
    return {"blocks": count(spec, "blocks/**"), "total": count(spec, "**")}


def macs(cfg: VitConfig, spec: Spec) -> int:
    """Multiply-accumulates of one image; for a gene, of its auxiliary net."""
    tokens = cfg.grid**2 + cfg.prefix
    heads = (("head/**", 1), ("distillation_head/**", 1)) if cfg.pool == "cls+dist" else (("head/**", 1),)
    counted = kernel_macs(spec, (*heads, ("patch/**", cfg.grid**2), ("blocks/**", tokens)))
    attention = attention_macs(spec["blocks/attn/query/kernel"], tokens)
    inside = attention + sum(n for path, n in counted.items() if path.startswith("blocks/"))
    outside = sum(n for path, n in counted.items() if not path.startswith("blocks/"))
    return outside + inside * cfg.depth // cfg.layers
