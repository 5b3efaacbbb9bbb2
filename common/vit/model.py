"""The Vision Transformer of timm, DeiT and SWS, and the gene: a few stored blocks, applied repeatedly."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from heirloom.common.errors import InputError, between, nearest, positive
from heirloom.common.nn.attention import Kernel
from heirloom.common.nn.block import Remat, scan, stack
from heirloom.common.nn.dense import Dense, param, uniform_fan_in
from heirloom.common.nn.mlp import Activation, check_activation
from heirloom.common.nn.norm import LayerNorm
from heirloom.common.nn.patch import PatchEmbed
from heirloom.common.nn.precision import add
from heirloom.common.surgery.axes import Spec, matches
from heirloom.common.surgery.report import attention_macs, count, kernel_macs
from heirloom.common.vit.parts import SMALL, AttentionPool, Registers, Resample, Token, VitBlock, resampled
from heirloom.common.vit.tying import loop, unrolled

Tokens = Literal["none", "cls", "cls+dist"]
Pool = Literal["norm_mean", "mean_norm", "cls", "cls+dist", "cls+mean", "map"]
Positions = Literal["all", "cls", "patches"]
Gene = Literal["none", "sws", "tleg"]
Images = Float[Array | np.ndarray, "batch height width channels"]
LARGEST_SIDE = 2**14  # pixels; a larger size is a mistake, and resizing the positions for it would not finish
# Fields for parts that DeiT's ViT does not have, whose defaults are that ViT.
OPTIONS = (
    "registers", "positions", "pre_norm", "final_norm", "qkv_bias", "qk_norm", "inner_norms", "layer_scale", "gated",
    "pooler", "joint",
)  # fmt: skip


@dataclass(frozen=True)
class VitConfig:
    """A ViT, or a gene: `layers` blocks are stored, and `layout` is how the auxiliary net applies them."""

    size: int = 224
    """Side of the input, pixels; of a rectangle, its height."""
    size_width: int | None = None
    """Width of the input, pixels; none: the input is square."""
    any_size: bool = False
    """Also read pictures of other sizes: the positions are resampled to their patches (timm's dynamic_img_size)."""
    resample: Resample = "antialiased"
    """How they are resampled, bicubically: with antialiasing (timm), or without it (DINOv2 in transformers)."""
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
    """Number of logits; 0: no head, the result is the pooled features."""
    tokens: Tokens = "none"
    """Learned tokens before the patches: none (SWS), the class token (ViT), or class and distillation token (DeiT)."""
    pool: Pool = "norm_mean"
    """Input of the head: the mean of the normalised patches (norm_mean; SWS's auxiliary net), the normalised mean
    (mean_norm; timm), the class token, class and distillation token with one head each, whose logits are averaged
    (DeiT), the class token next to the mean of the normalised patches (cls+mean; DINOv2), or the result of a learned
    query's attention to the patches (map; SigLIP).
    """
    pooler: bool = False
    """A linear layer and tanh after the pooling (transformers' ViTModel)."""
    joint: int = 0
    """Size of a joint embedding of pictures and texts, to which the pooled features are projected (CLIP); 0: none."""
    registers: int = 0
    """Learned tokens between the class token and the patches that are not pooled (DINOv2)."""
    positions: Positions = "all"
    """Tokens that have learned positions: all, patches and class token, or patches alone (timm's no_embed_class)."""
    pre_norm: bool = False
    """A LayerNorm before the blocks, and patches without a bias (CLIP)."""
    final_norm: bool = True
    """A LayerNorm after the blocks."""
    qkv_bias: bool = True
    """Biases of queries, keys and values."""
    qk_norm: bool = False
    """LayerNorms of each head's queries and keys."""
    inner_norms: bool = False
    """LayerNorms before the last projection of attention and MLP (BEiT-3)."""
    layer_scale: float = 0.0
    """Initial value of LayerScale, learned factors of the channels of each branch (DeiT III, DINOv2); 0: none."""
    gated: bool = False
    """The MLP multiplies the activated units with as many linear ones: with activation silu, SwiGLU (DINOv2)."""
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
        between(self, "drop_path", below=1.0)
        positive(self, "size", "patch", most=LARGEST_SIDE)
        positive(self, "channels", "width", "hidden", most=2**20)
        positive(self, "layers", "layout", most=1000)
        for name in ("classes", "registers", "joint"):
            if not 0 <= getattr(self, name) <= 2**20:
                raise InputError(f"{name} is {getattr(self, name)}: choose a number from 0 to {2**20}")
        if self.size_width is not None:
            positive(self, "size_width", most=LARGEST_SIDE)
        if not 0 <= self.layer_scale < 1e6:
            raise InputError(f"layer_scale is {self.layer_scale:g}: choose 0 for none, or a value such as 1e-5")
        if self.pool == "cls+dist" and not self.classes:
            raise InputError("classes is 0, and pool 'cls+dist' averages the logits of two heads: set pool to 'cls'")
        if self.pool == "map" and self.gated:
            raise InputError("pool 'map' has a plain MLP, and gated is set: choose another pool, or set gated to False")
        if self.classes and self.joint:
            given = f"classes is {self.classes} and joint {self.joint}"
            raise InputError(f"{given}: set joint to 0 for a classifier, or classes for features")
        if self.pool == "cls+mean" and (self.pooler or self.joint):
            needed = "a pooler or projection takes one: set pool to 'cls'"
            raise InputError(f"pool 'cls+mean' gives two vectors, and {needed}")
        if not 0 < self.eps < 1:  # refuses NaN too
            raise InputError(f"eps is {self.eps:g}: choose a number between 0 and 1, such as 1e-6")
        front = ("cls", "cls+dist")
        allowed = {"cls": front, "cls+mean": front, "cls+dist": front[1:]}.get(self.pool)
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
    def picture(self) -> tuple[int, int]:
        """Height and width of the input, pixels."""
        return self.size, self.size_width or self.size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; pixels that do not fill one are not read. Raises InputError for none."""
        height, width = self.picture
        if min(height, width) < self.patch:
            size = f"{height} x {width} px" if self.size_width else f"{height} px"
            raise InputError(f"patches of {self.patch} px do not fit pictures of {size}: change size or patch")
        return height // self.patch, width // self.patch

    def filled(self) -> None:
        """Raises InputError when whole patches do not fill the input."""
        for side in self.picture:
            if side % self.patch:
                fill = f"patches of {self.patch} px do not fill pictures of {side} px"
                raise InputError(f"{fill}: change size or patch")

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches."""
        return len(self.learned) + self.registers

    @property
    def learned(self) -> tuple[str, ...]:
        """Modules of the class token and the distillation token."""
        count = {"none": 0, "cls": 1, "cls+dist": 2}[self.tokens]
        return ("class_token", "distillation_token")[:count]

    @property
    def placed(self) -> int:
        """Number of tokens before the patches that have positions."""
        return {"all": self.prefix, "cls": len(self.learned), "patches": 0}[self.positions]

    @property
    def count(self) -> int:
        """Number of learned positions."""
        rows, columns = self.grid
        return rows * columns + self.placed

    @property
    def options(self) -> dict[str, Any]:
        """The fields of OPTIONS that are not at their defaults."""
        usual = {field.name: field.default for field in fields(self)}
        return {name: getattr(self, name) for name in OPTIONS if getattr(self, name) != usual[name]}

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
        changed = replace(
            self,
            heads=self.heads if heads is None else int(heads),
            activation=activation or self.activation,
            eps=_number(eps) if eps is not None else self.eps,
            layout=counts(str(layout), "layout") if layout else self.layout,
            pool=pool or self.pool,
            size=self.size if size is None else int(size),
            size_width=self.size_width if size is None else None,
        )
        if size is not None:
            changed.filled()
        return changed


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


class Vit(nnx.Module):
    """ViT classifier: normalised images, f32, to class logits, f32.

    For a gene this is its auxiliary net: the stored blocks are unrolled inside the forward pass, so their gradients add
    up. Initial values are SWS's: N(0, 0.02^2), zero biases, and torch's default for the patch embedding.
    """

    def __init__(self, cfg: VitConfig, *, rngs: nnx.Rngs):
        rows, columns = cfg.grid
        sizes = dict(embed=cfg.width, head=cfg.heads, head_dim=cfg.head_dim, hidden=cfg.hidden)
        sizes |= dict(grid_row=rows, grid_col=columns, register=cfg.registers)
        sizes |= dict(patch_row=cfg.patch, patch_col=cfg.patch, channel=cfg.channels)
        sizes |= {"class": cfg.classes, "joint": cfg.joint, "pooled": 2}
        bias = None if cfg.pre_norm else uniform_fan_in
        self.patch = PatchEmbed(sizes, init=uniform_fan_in, bias=bias, rngs=rngs)
        placed, all_placed = cfg.positions != "patches", cfg.positions == "all"
        self.class_token = Token(sizes, position=placed, rngs=rngs) if cfg.learned else None
        self.distillation_token = Token(sizes, position=placed, rngs=rngs) if len(cfg.learned) > 1 else None
        self.registers = Registers(sizes, position=all_placed, rngs=rngs) if cfg.registers else None
        self.position = param("grid_row grid_col -> embed", sizes, SMALL, rngs)
        self.pre_norm = LayerNorm(sizes, eps=cfg.eps, rngs=rngs) if cfg.pre_norm else None
        blocks: Any = stack(lambda rngs: VitBlock(cfg, sizes, rngs=rngs), cfg.layers, rngs)
        if cfg.gene == "tleg":  # the slope of a norm starts at 0, so that every layer's scale is 1
            for path, scale in nnx.to_flat_state(nnx.state(blocks)):
                if path[-1] == "scale":
                    scale[...] = scale[...].at[1].set(0)
        self.blocks = blocks
        self.norm = LayerNorm(sizes, eps=cfg.eps, rngs=rngs) if cfg.final_norm else None
        self.pool = AttentionPool(cfg, sizes, rngs=rngs) if cfg.pool == "map" else None
        self.pooler = Dense("embed -> embed", sizes, init=SMALL, rngs=rngs) if cfg.pooler else None
        joint: Any = dict(init=SMALL, bias=None, rngs=rngs)
        self.projection = Dense("embed -> joint", sizes, **joint) if cfg.joint else None
        reads = "pooled embed" if cfg.pool == "cls+mean" else "embed"
        self.head = Dense(f"{reads} -> class", sizes, init=SMALL, rngs=rngs) if cfg.classes else None
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
        """Embed the patches, with the learned tokens before them.

        Raises InputError for pictures of another size or with another number of channels.
        """
        cfg, given = self.cfg, tuple(images.shape[1:3])
        if images.shape[-1] != cfg.channels:  # one channel would be broadcast: red, green and blue added up
            counts = f"{images.shape[-1]} channels, and the model reads {cfg.channels}"
            raise InputError(f"pictures have {counts}: take a model that was trained on as many")
        if given != cfg.picture and not cfg.any_size:
            sizes = "{} x {} px, and the model reads {} x {} px".format(*given, *cfg.picture)
            square = cfg.picture[0] == cfg.picture[1]
            needed = "resize them, or set any_size" if square else "only square models are evaluated and trained"
            raise InputError(f"pictures have {sizes}: {needed}")
        rows, columns = (side // cfg.patch for side in given)
        x = self.patch(jnp.asarray(images)[:, : rows * cfg.patch, : columns * cfg.patch])
        position = self.position[...]
        if (rows, columns) != cfg.grid:
            position = resampled(position, rows, columns, cfg.resample)
        x = add(x, position.reshape(-1, x.shape[-1]))
        front = [token() for token in (self.class_token, self.distillation_token, self.registers) if token is not None]
        tokens = [jnp.broadcast_to(token, (len(x), *token.shape)).astype(x.dtype) for token in front]
        x = jnp.concatenate([*tokens, x], axis=1) if tokens else x
        return x if self.pre_norm is None else self.pre_norm(x)

    def classify(self, x: Float[Array, "batch tokens embed"]) -> Float[Array, "batch classes"]:
        """Pool, normalise and apply the head, or the mean of both heads, f32; without a head, the pooled features."""
        y = self.pooled(x)
        y = y if self.pooler is None else jnp.tanh(self.pooler(y))
        y = y if self.projection is None else self.projection(y)
        if self.head is None:
            return y.reshape(len(y), -1).astype(jnp.float32)
        logits = self.head(y)
        if self.distillation_head is not None:
            logits = (logits + self.distillation_head(self.normed(x[:, 1]))) / 2
        return logits.astype(jnp.float32)

    def pooled(self, x: Float[Array, "batch tokens embed"]) -> Float[Array, "batch *pooled embed"]:
        """Pool and normalise, in the order of the config's pool; `cls+mean` gives two vectors."""
        pool, patches = self.cfg.pool, x[:, self.cfg.prefix :]
        if pool == "norm_mean":
            return self.normed(patches).mean(1)
        if pool == "mean_norm":
            return self.normed(patches.mean(1))
        if pool == "cls+mean":
            return jnp.stack([self.normed(x[:, 0]), self.normed(patches).mean(1)], axis=1)
        return self.normed(x[:, 0]) if self.pool is None else self.pool(self.normed(patches))

    def normed(self, x: jax.Array) -> jax.Array:
        """Apply the final norm, if there is one."""
        return x if self.norm is None else self.norm(x)


def stochastic_depth(cfg: VitConfig, key: Array | None, batch: int) -> tuple[Float[Array, "layers 2 batch"], ...]:
    """Draw the factor of each branch and sample, 0 or 1 / (1 - rate); an empty tuple when no branch is dropped."""
    if key is None or cfg.drop_path == 0:
        return ()
    share = 1 - jnp.linspace(0, cfg.drop_path, cfg.depth)[:, None, None]
    return (jax.random.bernoulli(key, jnp.broadcast_to(share, (cfg.depth, 2, batch))) / share,)


def parameters(spec: Spec) -> dict[str, int]:
    """Count the stored parameters: of the blocks, and the total."""
    return {"blocks": count(spec, "blocks/**"), "total": count(spec, "**")}


def macs(cfg: VitConfig, spec: Spec) -> int:
    """Multiply-accumulates of one image; for a gene, of its auxiliary net."""
    rows, columns = cfg.grid
    patches = rows * columns
    tokens = patches + cfg.prefix
    uses = [("head/**", 1), ("distillation_head/**", 1), ("patch/**", patches), ("blocks/**", tokens)]
    uses += [("pool/memory/**", patches), ("pool/**", 1), ("pooler/**", 1), ("projection/**", 1)]
    here = [(pattern, count) for pattern, count in uses if any(matches(pattern, path) for path in spec)]
    counted = kernel_macs(spec, here)
    attention = attention_macs(spec["blocks/attn/query/kernel"], tokens)
    inside = attention + sum(n for path, n in counted.items() if path.startswith("blocks/"))
    outside = sum(n for path, n in counted.items() if not path.startswith("blocks/"))
    outside += 2 * patches * cfg.width if cfg.pool == "map" else 0  # scores and values of the learned query
    return outside + inside * cfg.depth // cfg.layers
