"""DiT (Peebles & Xie 2023) and LiT (arXiv 2501.12976): one transformer over patches, with softmax or few-head linear
attention.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from heirloom.common.errors import InputError, between, positive
from heirloom.common.nn.adaln import XAVIER, AdalnTransformer, Modulation, time_features
from heirloom.common.nn.attention import Attention, Kernel, softmax
from heirloom.common.nn.block import Remat
from heirloom.common.nn.dense import Dense, Sizes, normal, param, zeros
from heirloom.common.nn.patch import PatchEmbed, unpatch
from heirloom.common.nn.position import sincos
from heirloom.common.nn.precision import lookup
from heirloom.common.surgery.axes import Spec
from heirloom.common.surgery.report import attention_macs, count, kernel_macs
from lit_jax.attention import Features, Filters, LinearAttention
from lit_jax.linear_attention import Implementation

FREQUENCIES = 256  # of the timestep features
SOFTMAX_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the published DiTs, by width


@dataclass(frozen=True)
class DitConfig:
    """A class-conditional diffusion transformer over latents or pixels."""

    size: int = 32
    """Side of the input: latent cells, or pixels where there is no autoencoder."""
    channels: int = 4
    patch: int = 2
    width: int = 1152
    layers: int = 28
    heads: int = 16
    hidden: int = 4608
    """Units between the two layers of the MLP."""
    classes: int = 1000
    """Labels are 0 to classes - 1; the label `classes` is none, where there is one."""
    null_class: bool = True
    """Whether the table of classes has a row for none, which guidance needs (DiT trained with class_dropout_prob 0 has
    no such row).
    """
    attention: Literal["softmax", "linear"] = "softmax"
    """DiT's, or LiT's linear attention with a depthwise branch on the values."""
    features: Features = "relu"
    """Kernel of linear attention: relu (LiT), gelu, focused (FLatten), focused_gelu."""
    filters: Filters = "shared"
    """Depthwise filters of linear attention: one bank for all heads (LiT), a filter per channel, or none."""
    window: int = 5
    """Side of the depthwise filters."""
    implementation: Implementation | None = None
    """What computes linear attention: xla, or in bfloat16 the kernels for TPUs (mosaic_tpu) or Hopper GPUs
    (mosaic_gpu); None: the kernel that was measured on this kind of device, else xla (`heirloom doctor` says which).
    """
    remat: Remat = "none"
    """Recompute blocks in the backward pass: whole ("full"), or all but their matmuls ("dots")."""
    kernel: Kernel = "xla"
    """Softmax attention: "cudnn" is the flash kernel of NVIDIA GPUs, for bfloat16."""

    def __post_init__(self) -> None:
        positive(self, "size", "channels", "patch", "width", "layers", "hidden", "window")
        between(self, "classes", below=2**30)

    @property
    def grid(self) -> int:
        """Patches along a side. Raises InputError when they do not fill the input."""
        if self.size < self.patch or self.size % self.patch:
            raise InputError(f"patches of {self.patch} do not fill inputs of {self.size}: change size or patch")
        return self.size // self.patch

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def head_dim(self) -> int:
        """Channels of one head. Raises InputError when the heads do not divide the width."""
        if self.heads < 1 or self.width % self.heads:
            raise InputError(
                f"{self.heads} heads do not divide a width of {self.width}; say how many (convert --set heads=N)"
            )
        return self.width // self.heads

    @property
    def kept(self) -> "DitConfig":
        """The config that is saved with the weights: the implementation of attention is a setting of the run that
        trained them.
        """
        return replace(self, implementation=None)

    @property
    def rows(self) -> int:
        """Of the table of classes."""
        return self.classes + self.null_class

    def override(
        self,
        heads: int | None = None,
        classes: int | None = None,
        size: int | None = None,
        features: str | None = None,
        prediction: str | None = None,
    ) -> "DitConfig":
        """The same model with what its weights cannot tell. Raises InputError for a value that cannot be.

        classes: without the row for none, if the table has one. prediction: "noise", which confirms the guess; nothing
        else is sampled.
        """
        for name, value in (("heads", heads), ("classes", classes), ("size", size)):
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name}={value}: give a whole number, 1 or more")
        if classes is not None and classes not in (self.rows, self.rows - 1):
            raise InputError(
                f"classes={classes}: the table has {self.rows} rows; choose {self.rows} (no unconditional row) or"
                f" {self.rows - 1} (last row unconditional)"
            )
        if features is not None and (self.attention == "softmax" or features not in get_args(Features)):
            what = (
                "softmax attention has none"
                if self.attention == "softmax"
                else f"choose {', '.join(get_args(Features))}"
            )
            raise InputError(f"features={features}: kernel of linear attention; {what}")
        if prediction not in (None, "noise"):
            raise InputError(
                f"prediction={prediction}: only models that predict the noise can be sampled and trained here"
            )
        classes = self.classes if classes is None else classes
        return replace(
            self,
            heads=heads or self.heads,
            size=size or self.size,
            classes=classes,
            null_class=classes < self.rows,
            features=features or self.features,  # type: ignore[arg-type]
        )


class Dit(AdalnTransformer):
    """Noise and variance of a noisy input. x: [batch, size, size, channels] f32; t: [batch], fractional allowed;
    labels: [batch] int32.

    Returns [batch, size, size, 2 channels] f32: the predicted noise, then where between its bounds the variance lies
    (-1 to 1).
    """

    def __init__(self, cfg: DitConfig, *, rngs: nnx.Rngs):
        sizes = dict(embed=cfg.width, head=cfg.heads, head_dim=cfg.head_dim, hidden=cfg.hidden)
        sizes |= dict(patch_row=cfg.patch, patch_col=cfg.patch, channel=cfg.channels, out_channel=2 * cfg.channels)
        sizes |= dict(frequency=FREQUENCIES, label=cfg.rows)
        attention: Any = partial(Attention, sizes, attend=softmax(kernel=cfg.kernel), out=XAVIER)
        if cfg.attention == "linear":
            sizes |= dict(filter_row=cfg.window, filter_col=cfg.window)
            attention = partial(
                LinearAttention, sizes, features=cfg.features, filters=cfg.filters, implementation=cfg.implementation
            )
        self.patch = PatchEmbed(sizes, init=XAVIER, bias=zeros, rngs=rngs)
        self.time = TimeEmbed(sizes, rngs=rngs)
        self.label = LabelEmbed(sizes, rngs=rngs)
        super().__init__(
            sizes, layers=cfg.layers, attention=attention, written="patch_row patch_col out_channel", rngs=rngs
        )
        self.cfg = cfg

    def __call__(self, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        return self.denoise(x, self.modulations(t, labels))

    def modulations(self, t: jax.Array, labels: jax.Array) -> Modulation:
        """What time and label say to every layer: it depends on nothing else, so a sampler computes it once for all its
        steps.
        """
        return self.modulation_of(self.time(t) + self.label(labels))

    def denoise(self, x: jax.Array, modulation: Modulation) -> jax.Array:
        cfg = self.cfg
        x = self.patch(x)
        x = x + sincos(cfg.grid, cfg.grid, cfg.width).reshape(cfg.tokens, cfg.width).astype(x.dtype)
        patches = self.transform(x, modulation, remat=cfg.remat).astype(jnp.float32)
        return unpatch(patches, cfg.grid, cfg.grid)


class TimeEmbed(nnx.Module):
    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        self.up = Dense("frequency -> embed", sizes, init=normal(0.02), rngs=rngs)
        self.down = Dense("embed -> embed", sizes, init=normal(0.02), rngs=rngs)
        self.divisor = FREQUENCIES // 2

    def __call__(self, t: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.up(time_features(t, FREQUENCIES, self.divisor))))


class LabelEmbed(nnx.Module):
    def __init__(self, sizes: Sizes, *, rngs: nnx.Rngs):
        self.table = param("label -> embed", sizes, normal(0.02), rngs)

    def __call__(self, labels: jax.Array) -> jax.Array:
        return lookup(self.table[...], labels)


def parameters(spec: Spec) -> dict[str, int]:
    """Trained parameters; the fixed position table is none."""
    return {"total": count(spec, "**")}


def macs(cfg: DitConfig, spec: Spec) -> int:
    """Multiply-accumulates of one input, conditioning included (papers count the blocks' part that grows with the
    tokens).
    """
    once = [(pattern, 1) for pattern in ("time/**", "modulation/**", "final_modulation/**")]
    uses = (*once, *depthwise_uses(cfg, spec), ("**", cfg.tokens))
    return sum(kernel_macs(spec, uses).values()) + mixing_macs(cfg, spec)


def depthwise_uses(cfg: Any, spec: Spec) -> list[tuple[str, int]]:
    """The taps of the depthwise branch for `kernel_macs`: those of a shared bank serve every head."""
    uses = cfg.tokens * (cfg.heads if cfg.filters == "shared" else 1)
    return [("blocks/attn/depthwise/**", uses)] if "blocks/attn/depthwise/kernel" in spec else []


def mixing_macs(cfg: Any, spec: Spec) -> int:
    """Multiply-accumulates of self-attention between the projections. cfg: a `DitConfig` or `PixArtConfig`."""
    if cfg.attention == "softmax":
        return attention_macs(spec["blocks/attn/query/kernel"], cfg.tokens)
    # The state, its readout, and the normaliser.
    return cfg.layers * 2 * cfg.tokens * cfg.width * (cfg.head_dim + 1)
