"""PixArt-Sigma (arXiv 2403.04692) and the text-to-image LiT (arXiv 2501.12976): a DiT that reads text by
cross-attention, with softmax or few-head linear self-attention.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from heirloom.common.errors import InputError, positive
from heirloom.common.nn.adaln import XAVIER, AdalnSingleTransformer, Modulation
from heirloom.common.nn.attention import Attention, CrossAttention, Kernel, KeyValue, Memory, softmax
from heirloom.common.nn.block import Remat, each, stack
from heirloom.common.nn.dense import Dense, Sizes, normal, param, xavier_uniform, zeros
from heirloom.common.nn.patch import PatchEmbed, unpatch
from heirloom.common.nn.position import sincos_sides
from heirloom.common.surgery.axes import Spec
from heirloom.common.surgery.report import count, kernel_macs
from lit_jax.attention import Features, Filters, LinearAttention
from lit_jax.dit import FREQUENCIES, TimeEmbed, depthwise_uses, mixing_macs
from lit_jax.linear_attention import Implementation

NULL_TEXT = "null_text"  # the leaf that is stored and not trained


@dataclass(frozen=True)
class PixArtConfig:
    """A text-conditional diffusion transformer over latents. The default is PixArt-Sigma at 512 pixels."""

    size: int = 64
    """Side of the latents it was trained on, in cells: 32, 64, 128 or 256 for pictures of 256 to 2048 pixels."""
    channels: int = 4
    patch: int = 2
    width: int = 1152
    layers: int = 28
    heads: int = 16
    """Of self-attention."""
    cross_heads: int = 16
    """Of cross-attention, which stays softmax in a LiT."""
    hidden: int = 4608
    """Units between the two layers of the MLP."""
    text_width: int = 4096
    """Channels of the text encoder's features."""
    text_tokens: int = 300
    """Tokens of a prompt in training."""
    interpolation: float = 1.0
    """Divisor of the positions: 0.5, 1, 2 and 4 for sizes 32, 64, 128 and 256, so that they always span 0 to 32."""
    null_text: bool = False
    """Whether the weights include the features of the empty prompt, which are not trained (`y_embedding` of .pth
    files).
    """
    attention: Literal["softmax", "linear"] = "softmax"
    """Self-attention: PixArt's, or LiT's linear attention with a depthwise branch on the values."""
    features: Features = "relu"
    """Kernel of linear attention: relu (LiT), gelu, focused (FLatten), focused_gelu."""
    filters: Filters = "shared"
    """Depthwise filters of linear attention: one bank for all heads (LiT), a filter per channel, or none."""
    window: int = 5
    """Side of the depthwise filters."""
    implementation: Implementation | None = None
    """What computes linear attention: see `DitConfig`."""
    remat: Remat = "none"
    """Recompute blocks in the backward pass: whole ("full"), or all but their matmuls ("dots")."""
    kernel: Kernel = "xla"
    """Softmax attention: "cudnn" is the flash kernel of NVIDIA GPUs, for bfloat16."""

    def __post_init__(self) -> None:
        positive(self, "size", "channels", "patch", "width", "layers", "hidden", "text_width", "text_tokens", "window")

    @property
    def grid(self) -> int:
        """Patches along a side at the trained size. Raises InputError when they do not fill the input."""
        if self.size < self.patch or self.size % self.patch:
            raise InputError(f"patches of {self.patch} do not fill inputs of {self.size}: change size or patch")
        return self.size // self.patch

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def span(self) -> float:
        """The positions of a side run from 0 to just below this, whatever the size of the input."""
        if self.interpolation <= 0:
            raise InputError(f"interpolation is {self.interpolation:g}, and must be above 0 (PixArt-Sigma: size / 64)")
        return self.grid / self.interpolation

    @property
    def head_dim(self) -> int:
        """Channels of one head of self-attention. Raises InputError when the heads do not divide the width."""
        return _head_dim("heads", self.heads, self.width)

    @property
    def cross_head_dim(self) -> int:
        """Channels of one head of cross-attention. Raises InputError when the heads do not divide the width."""
        return _head_dim("cross_heads", self.cross_heads, self.width)

    @property
    def kept(self) -> "PixArtConfig":
        """The config that is saved with the weights: without the implementation of attention, a setting of a run."""
        return replace(self, implementation=None)

    def override(
        self,
        heads: int | None = None,
        cross_heads: int | None = None,
        size: int | None = None,
        interpolation: float | str | None = None,
        text_tokens: int | None = None,
        features: str | None = None,
        prediction: str | None = None,
    ) -> "PixArtConfig":
        """The same model with what its weights cannot tell. Raises InputError for a value that cannot be.

        heads: with softmax attention also those of cross-attention, as in PixArt, unless cross_heads is given. size:
        with the interpolation of the published model of that size, unless it is given. prediction: "noise", which
        confirms the guess; nothing else is sampled.
        """
        whole = dict(heads=heads, cross_heads=cross_heads, size=size, text_tokens=text_tokens)
        for name, value in whole.items():
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name}={value}: give a whole number, 1 or more")
        if features is not None and (self.attention == "softmax" or features not in get_args(Features)):
            known = f"choose {', '.join(get_args(Features))}"
            what = "softmax attention has none" if self.attention == "softmax" else known
            raise InputError(f"features={features}: kernel of linear attention; {what}")
        if prediction not in (None, "noise"):
            raise InputError(
                f"prediction={prediction}: only models that predict the noise can be sampled and trained here"
            )
        changes: dict[str, Any] = {name: value for name, value in whole.items() if value is not None}
        if heads is not None and cross_heads is None and self.attention == "softmax":
            changes["cross_heads"] = heads
        if size is not None:
            changes["interpolation"] = published_interpolation(size)
        if interpolation is not None:
            changes["interpolation"] = _number("interpolation", interpolation)
        if features is not None:
            changes["features"] = features
        return replace(self, **changes)


def published_interpolation(size: int) -> float:
    """The interpolation of PixArt-Sigma at this latent size."""
    return size / 64


def _head_dim(name: str, heads: int, width: int) -> int:
    if heads < 1 or width % heads:
        raise InputError(
            f"{name}: {heads} heads do not divide a width of {width}; say how many (convert --set {name}=N)"
        )
    return width // heads


def _number(name: str, value: float | str) -> float:
    try:
        number = float(value)
    except ValueError as error:
        raise InputError(f"{name}={value}: give a number above 0, such as 2") from error
    if not 0 < number < float("inf"):
        raise InputError(f"{name}={value}: give a number above 0, such as 2")
    return number


class Text(NamedTuple):
    """What cross-attention reads of a batch of prompts: keys and values of every layer, [layer, batch, token, head,
    head_dim], and the mask [batch, token] bool, True where there is a token.
    """

    key: jax.Array
    value: jax.Array
    mask: jax.Array


class PixArt(AdalnSingleTransformer):
    """Noise and variance of noisy latents, given a text. x: [batch, row, col, channels] f32, both sides multiples of
    the patch; t: [batch], fractional allowed; text: [batch, token, text_width]; mask: [batch, token], True where there
    is a token.

    Returns [batch, row, col, 2 channels] f32: the predicted noise, then where between its bounds the variance lies (-1
    to 1). Tokens outside the mask have no effect. Raises InputError for sides that the patches do not fill, and for a
    text without a token; under `jax.jit` the latter cannot be seen, and the result is that of the mean of all values.
    """

    def __init__(self, cfg: PixArtConfig, *, rngs: nnx.Rngs):
        sizes = dict(embed=cfg.width, head=cfg.heads, head_dim=cfg.head_dim, hidden=cfg.hidden)
        sizes |= dict(patch_row=cfg.patch, patch_col=cfg.patch, channel=cfg.channels, out_channel=2 * cfg.channels)
        sizes |= dict(frequency=FREQUENCIES, text_embed=cfg.text_width, token=cfg.text_tokens)
        cross_sizes = sizes | dict(head=cfg.cross_heads, head_dim=cfg.cross_head_dim)
        attend = softmax(kernel=cfg.kernel)
        attention: Any = partial(Attention, sizes, attend=attend, out=XAVIER)
        if cfg.attention == "linear":
            sizes |= dict(filter_row=cfg.window, filter_col=cfg.window)
            attention = partial(
                LinearAttention, sizes, features=cfg.features, filters=cfg.filters, implementation=cfg.implementation
            )
        # Zeros: a new model, or a DiT that begins to read text, ignores the text at first.
        cross = partial(CrossAttention, cross_sizes, attend=attend, query=XAVIER, out=zeros)
        self.patch = PatchEmbed(sizes, init=XAVIER, bias=zeros, rngs=rngs)
        self.time = TimeEmbed(sizes, rngs=rngs)
        self.caption = CaptionEmbed(sizes, rngs=rngs)
        super().__init__(
            sizes,
            layers=cfg.layers,
            attention=attention,
            cross=cross,
            written="patch_row patch_col out_channel",
            rngs=rngs,
        )
        # Xavier fans as in the released code: keys and values are packed in one matrix.
        packed = xavier_uniform(packed=2)
        self.memory = stack(lambda rngs: Memory(cross_sizes, init=packed, rngs=rngs), cfg.layers, rngs)
        features = normal(cfg.text_width**-0.5)
        self.null_text = param("token text_embed", sizes, features, rngs) if cfg.null_text else None
        self.cfg = cfg
        self.span = cfg.span

    def __call__(self, x: jax.Array, t: jax.Array, text: jax.Array, mask: jax.Array) -> jax.Array:
        return self.denoise(x, self.modulations(t), self.condition(text, mask))

    def modulations(self, t: jax.Array) -> Modulation:
        """What the time says to every layer: it depends on nothing else, so a sampler computes it once for all its
        steps.
        """
        return self.modulation_of(self.time(t))

    def condition(self, text: jax.Array, mask: jax.Array) -> Text:
        """What the text says to every layer: it depends on nothing else, so a sampler computes it once for all its
        steps.
        """
        mask = check_text(text, mask, self.cfg.text_width)
        memory = each(self.memory, self.caption(text))
        return Text(memory.key, memory.value, mask)

    def denoise(self, x: jax.Array, modulation: Modulation, text: Text) -> jax.Array:
        cfg = self.cfg
        rows, cols = (_patches(side, cfg.patch) for side in x.shape[1:3])
        x = self.patch(x)
        row, col = sincos_sides(rows, cols, cfg.width, self.span)
        shape = (rows, cols, cfg.width // 2)
        # Joined here: the whole table would be a constant of the program, of 75 MB for pictures of 2048 pixels.
        table = jnp.concatenate([jnp.broadcast_to(col, shape), jnp.broadcast_to(row[:, None], shape)], axis=2)
        x = x + table.reshape(rows * cols, cfg.width).astype(x.dtype)
        grid = (rows, cols) if cfg.attention == "linear" else None
        patches = self.transform(
            x, modulation, KeyValue(text.key, text.value), mask=text.mask, grid=grid, remat=cfg.remat
        )
        return unpatch(patches.astype(jnp.float32), rows, cols)


class CaptionEmbed(nnx.Module):
    """Features of a text encoder [batch, token, text_width] to [batch, token, embed]."""

    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        self.up = Dense("text_embed -> embed", sizes, init=normal(0.02), rngs=rngs)
        self.down = Dense("embed -> embed", sizes, init=normal(0.02), rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(text), approximate=True))


def check_text(text: jax.Array, mask: jax.Array, width: int) -> jax.Array:
    """Returns the mask as bool. Raises InputError for features or a mask of another shape or type, and for an example
    without a token.
    """
    if text.ndim != 3 or text.shape[2] != width:
        raise InputError(f"text features are {list(text.shape)}, and must be [batch, token, {width}]")
    if mask.shape != text.shape[:2] or not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)):
        needed = f"bool {list(text.shape[:2])}, True where there is a token"
        raise InputError(f"the text mask is {mask.dtype} {list(mask.shape)}, and must be {needed}")
    mask = mask != 0
    if not isinstance(mask, jax.core.Tracer) and not (seen := np.asarray(mask).any(axis=1)).all():
        raise InputError(f"text {int(np.argmin(seen))} of the batch has no token in its mask: each needs one")
    return jnp.asarray(mask)


def _patches(side: int, patch: int) -> int:
    if side < patch or side % patch:
        raise InputError(f"a side of the latents is {side}: give a multiple of {patch}, the side of a patch")
    return side // patch


def parameters(spec: Spec) -> dict[str, int]:
    """Trained parameters; the fixed position table and the features of the empty prompt are none."""
    return {"total": count({path: leaf for path, leaf in spec.items() if path != NULL_TEXT}, "**")}


def macs(cfg: PixArtConfig, spec: Spec) -> int:
    """Multiply-accumulates of one input of cfg.size and a text of cfg.text_tokens, conditioning included."""
    once = [(pattern, 1) for pattern in ("time/**", "modulation/**")]
    text = [(pattern, cfg.text_tokens) for pattern in ("caption/**", "memory/**")]
    uses = (*once, *text, *depthwise_uses(cfg, spec), ("**", cfg.tokens))
    cross = 2 * cfg.layers * cfg.tokens * cfg.text_tokens * cfg.width
    return sum(kernel_macs(spec, uses).values()) + mixing_macs(cfg, spec) + cross
