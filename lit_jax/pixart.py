"""PixArt-Σ (arXiv 2403.04692) and the text-to-image LiT: a transformer over patches that a text and a time condition.

It is DiT's but for two things. One modulation serves all layers, which add a table of their own (adaLN-single), and
cross-attention to the text follows self-attention, with neither norm nor gate.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from heirloom.common.errors import InputError, positive
from heirloom.common.nn.adaln import EPS, XAVIER, Modulated, Modulation
from heirloom.common.nn.attention import Attention, CrossAttention, Kernel, softmax
from heirloom.common.nn.block import Block, Remat, each, stack
from heirloom.common.nn.dense import Dense, Sizes, normal, param, zeros
from heirloom.common.nn.norm import LayerNorm
from heirloom.common.nn.patch import PatchEmbed, unpatch
from heirloom.common.nn.position import sincos
from heirloom.common.surgery.axes import Spec
from heirloom.common.surgery.report import attention_macs, count, kernel_macs
from lit_jax.attention import Features, Filters, LinearAttention
from lit_jax.dit import FREQUENCIES, TimeEmbed
from lit_jax.linear_attention import Implementation

INTERPOLATION = {32: 0.5, 64: 1.0, 128: 2.0, 256: 4.0}  # by the side of the latents
UNTRAINED = "null_text"  # a leaf that is saved with some checkpoints and counts as no parameter


@dataclass(frozen=True)
class PixArtConfig:
    """A text-to-image transformer over latents; the defaults are PixArt-Σ's at 512 pixels."""

    size: int = 64
    """Side of the square latents that it was trained on; it takes any height and width."""
    channels: int = 4
    patch: int = 2
    width: int = 1152
    layers: int = 28
    heads: int = 16
    """Of self-attention."""
    cross_heads: int = 16
    """Of cross-attention, which is softmax always."""
    hidden: int = 4608
    """Units between the two layers of the MLP."""
    text_width: int = 4096
    """Channels of the text encoder's features."""
    text_tokens: int = 300
    """Tokens that a prompt is padded or cut to."""
    interpolation: float = 1.0
    """What positions are divided by: 0.5, 1, 2, 4 for pictures of 256, 512, 1024, 2048 pixels."""
    attention: Literal["softmax", "linear"] = "softmax"
    """PixArt-Σ's, or LiT's linear attention with a depthwise branch on the values."""
    features: Features = "relu"
    """Kernel of linear attention: relu (LiT), gelu, focused (FLatten), focused_gelu."""
    filters: Filters = "shared"
    """Depthwise filters of linear attention: one bank for all heads (LiT), a filter per channel, or none."""
    window: int = 5
    """Side of the depthwise filters."""
    null_text: bool = False
    """Whether the features of the empty text are saved with the weights, as PixArt's own files do."""
    implementation: Implementation | None = None
    """What computes linear attention, as in `DitConfig`."""
    remat: Remat = "none"
    """Recompute blocks in the backward pass: whole ("full"), or all but their matmuls ("dots")."""
    kernel: Kernel = "xla"
    """Softmax attention: "cudnn" is the flash kernel of NVIDIA GPUs, for bfloat16."""

    def __post_init__(self) -> None:
        positive(self, "size", "channels", "patch", "width", "layers", "heads", "cross_heads", "hidden")
        positive(self, "text_width", "text_tokens", "window")
        if not 0 < self.interpolation < 1000:  # false for NaN
            raise InputError(f"interpolation is {self.interpolation}: it is 0.5, 1, 2 or 4 in PixArt-Σ")
        if self.size % self.patch:
            raise InputError(f"patches of {self.patch} do not fill latents of {self.size}: change size or patch")
        for name in ("heads", "cross_heads"):
            if self.width % getattr(self, name):
                raise InputError(f"{getattr(self, name)} {name} do not divide a width of {self.width}")

    @property
    def grid(self) -> int:
        """Patches along a side of the square latents of training."""
        return self.size // self.patch

    @property
    def tokens(self) -> int:
        """Patches of the square latents of training."""
        return self.grid**2

    @property
    def head_dim(self) -> int:
        """Channels of one head of self-attention."""
        return self.width // self.heads

    @property
    def kept(self) -> "PixArtConfig":
        """The config that is saved with the weights: the implementation of attention is a setting of a run."""
        return replace(self, implementation=None)

    def override(
        self,
        size: int | None = None,
        interpolation: float | None = None,
        heads: int | None = None,
        cross_heads: int | None = None,
        features: Features | None = None,
    ) -> "PixArtConfig":
        """The same model with what its weights cannot tell. Raises InputError for a value that cannot be."""
        if size is not None and interpolation is None:
            interpolation = INTERPOLATION.get(size)
        given = dict(size=size, interpolation=interpolation, heads=heads, cross_heads=cross_heads, features=features)
        return replace(self, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


class Text(NamedTuple):
    """A text as the blocks read it. keys, values: [layer, batch, token, head, head_dim]; mask: [batch, token] bool."""

    keys: jax.Array
    values: jax.Array
    mask: jax.Array


class PixArtBlock(Block):
    """x + gate attn(norm(x)), then x + cross(x, text), then x + gate mlp(norm(x)); modulated by the sum with a
    table.
    """

    def __init__(self, sizes: Sizes, *, attention: Any, cross: Any, rngs: nnx.Rngs):
        init = dict(up=XAVIER, down=XAVIER, bias=zeros)
        super().__init__(sizes, attention=attention, activation="gelu_tanh", eps=EPS, **init, affine=False, rngs=rngs)
        self.cross: CrossAttention = cross(rngs=rngs)
        self.table = param("part embed", {**sizes, "part": 6}, normal(sizes["embed"] ** -0.5), rngs)

    def __call__(  # type: ignore[override]
        self, x: jax.Array, modulation: jax.Array, key: jax.Array, value: jax.Array, *, mask: jax.Array, **options: Any
    ) -> jax.Array:
        x = self.mix(x, modulation, **options)
        return self.feed(x + self.cross(x, key, value, mask), modulation)


class PixArt(Modulated):
    """Noise and variance of noisy latents.

    x: [batch, row, col, channels] f32, rows and columns multiples of `patch`; t: [batch], fractional allowed;
    text: [batch, token, text_width]; mask: [batch, token] bool, True for the tokens that count. Each text needs one:
    a row without any reads all tokens alike. Returns [batch, row, col, 2 channels] f32, as `Dit` does.
    """

    def __init__(self, cfg: PixArtConfig, *, rngs: nnx.Rngs):
        sizes = dict(embed=cfg.width, head=cfg.heads, head_dim=cfg.head_dim, hidden=cfg.hidden, text=cfg.text_width)
        sizes |= dict(patch_row=cfg.patch, patch_col=cfg.patch, channel=cfg.channels, out_channel=2 * cfg.channels)
        sizes |= dict(frequency=FREQUENCIES, text_token=cfg.text_tokens)
        attention: Any = partial(Attention, sizes, attend=softmax(kernel=cfg.kernel), out=XAVIER)
        if cfg.attention == "linear":
            sizes |= dict(filter_row=cfg.window, filter_col=cfg.window)
            options: Any = dict(features=cfg.features, filters=cfg.filters, implementation=cfg.implementation)
            attention = partial(LinearAttention, sizes, **options)
        of_text = {**sizes, "head": cfg.cross_heads, "head_dim": cfg.width // cfg.cross_heads}
        # The output of cross-attention starts at zero, as in PixArt's training (the block is then a DiT's).
        cross = partial(CrossAttention, of_text, attend=softmax(), init=XAVIER, out=zeros)
        self.patch = PatchEmbed(sizes, init=XAVIER, bias=zeros, rngs=rngs)
        self.time = TimeEmbed(sizes, rngs=rngs)
        self.modulation = Dense("embed -> part embed", {**sizes, "part": 6}, init=normal(0.02), rngs=rngs)
        self.caption_up = Dense("text -> embed", sizes, init=normal(0.02), rngs=rngs)
        self.caption_down = Dense("embed -> embed", sizes, init=normal(0.02), rngs=rngs)
        self.null_text = param("text_token text", sizes, zeros, rngs) if cfg.null_text else None
        self.blocks = stack(partial(_block, sizes, attention, cross), cfg.layers, rngs)
        self.final_table = param("part embed", {**sizes, "part": 2}, normal(cfg.width**-0.5), rngs)
        self.final_norm = LayerNorm(sizes, eps=EPS, affine=False, rngs=rngs)
        self.final = Dense("embed -> patch_row patch_col out_channel", sizes, init=zeros, rngs=rngs)
        self.cfg = cfg

    def __call__(self, x: jax.Array, t: jax.Array, text: jax.Array, mask: jax.Array) -> jax.Array:
        return self.denoise(x, self.modulations(t), self.condition(text, mask))

    def modulations(self, t: jax.Array) -> Modulation:
        """What the time says to every layer: a sampler computes it once for all its steps."""
        embedded = self.time(t)
        shared = jnp.moveaxis(self.modulation(jax.nn.silu(embedded)), 1, 0)
        tables = self.blocks.table[...]  # type: ignore[attr-defined]
        # The final norm adds the embedding of the time itself, not what the blocks share.
        return Modulation(tables[:, :, None] + shared, self.final_table[...][:, None] + embedded)

    def condition(self, text: jax.Array, mask: jax.Array) -> Text:
        """What a text says to every layer: keys and values depend on it alone, so a sampler computes them once."""
        read = self.caption_down(jax.nn.gelu(self.caption_up(text), approximate=True))
        keys, values = each(self.blocks.cross, read, method="read")  # type: ignore[attr-defined]
        return Text(keys, values, mask)

    def denoise(self, x: jax.Array, modulation: Modulation, text: Text) -> jax.Array:
        """The output for latents [batch, row, col, channels] of any size."""
        cfg = self.cfg
        rows, cols = x.shape[1] // cfg.patch, x.shape[2] // cfg.patch
        if (rows * cfg.patch, cols * cfg.patch) != x.shape[1:3]:
            raise InputError(f"latents of {x.shape[1]} x {x.shape[2]} are no multiple of patches of {cfg.patch}")
        x = self.patch(x)
        # Positions span the same range whatever the size: they are those of the grid of 512 pixels, stretched.
        scale = rows / cfg.grid * cfg.interpolation, cols / cfg.grid * cfg.interpolation
        x = x + sincos(rows, cols, cfg.width, scale).reshape(rows * cols, cfg.width).astype(x.dtype)
        shared: dict[str, Any] = dict(mask=text.mask) | (dict(grid=(rows, cols)) if cfg.attention == "linear" else {})
        patches = self.transform(x, modulation, text.keys, text.values, remat=cfg.remat, **shared)
        return unpatch(patches.astype(jnp.float32), rows, cols)


def _block(sizes: Sizes, attention: Any, cross: Any, rngs: nnx.Rngs) -> PixArtBlock:
    return PixArtBlock(sizes, attention=attention, cross=cross, rngs=rngs)


def parameters(spec: Spec) -> dict[str, int]:
    """Trained parameters: 610,856,096 of PixArt-Σ. The features of the empty text are none."""
    return {"total": count({path: leaf for path, leaf in spec.items() if path != UNTRAINED}, "**")}


def macs(cfg: PixArtConfig, spec: Spec) -> int:
    """Multiply-accumulates of one picture of the size of training, with a text of full length."""
    once = [(pattern, 1) for pattern in ("time/**", "modulation/**")]
    of_text = [(p, cfg.text_tokens) for p in ("caption_*/**", "blocks/cross/key/**", "blocks/cross/value/**")]
    depthwise = cfg.tokens * (cfg.heads if cfg.filters == "shared" else 1)
    conv = [("blocks/attn/depthwise/kernel", depthwise)] if "blocks/attn/depthwise/kernel" in spec else []
    total = sum(kernel_macs(spec, (*once, *of_text, *conv, ("**", cfg.tokens))).values())
    total += cfg.layers * 2 * cfg.tokens * cfg.text_tokens * cfg.width
    if cfg.attention == "softmax":
        return total + attention_macs(spec["blocks/attn/query/kernel"], cfg.tokens)
    return total + cfg.layers * 2 * cfg.tokens * cfg.width * (cfg.head_dim + 1)
