"""CLIP with ViT and text towers (TinyCLIP §1; open_clip): configuration, modules, counts."""

from dataclasses import dataclass, field, replace
from functools import partial
from math import log
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from heirloom.common.errors import InputError, nearest, positive
from heirloom.common.nn.attention import Attention, Kernel, softmax
from heirloom.common.nn.block import Block, Remat, scan, stack
from heirloom.common.nn.dense import Dense, constant, normal, param, uniform_fan_in
from heirloom.common.nn.mlp import ACTIVATIONS
from heirloom.common.nn.norm import LayerNorm
from heirloom.common.nn.patch import PatchEmbed
from heirloom.common.nn.precision import add, lookup
from heirloom.common.surgery.axes import Spec
from heirloom.common.surgery.report import attention_macs, count, kernel_macs
from heirloom.common.train.optim import is_statistic
from tinyclip_jax.resnet import ResNet, ResNetConfig, positions

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


@dataclass(frozen=True)
class ImageConfig:
    """The image tower: a ViT over square patches."""

    size: int = 224
    """Side of the input, pixels."""
    patch: int = 32
    """Side of a patch, pixels."""
    width: int = 768
    layers: int = 12
    heads: int | tuple[int, ...] = 12
    """Of each layer; a tuple: pruned layers that differ. A layer without heads adds a constant."""
    hidden: int | tuple[int, ...] = 3072
    """Units between the two layers of the MLP, as `heads`."""
    head_dim: int | None = None
    """Channels of a head; None: width / heads."""
    activation: Activation = "gelu"
    eps: float = 1e-5
    """Of every LayerNorm."""

    def __post_init__(self) -> None:
        positive(self, "size", "patch", "width", "layers")

    @property
    def grid(self) -> int:
        """Patches along a side. Raises InputError when they do not fill the picture."""
        if self.patch < 1 or self.size % self.patch:
            raise InputError(f"patches of {self.patch} px do not fill pictures of {self.size} px: change image.size or image.patch")
        return self.size // self.patch

    @property
    def tokens(self) -> int:
        return self.grid**2 + 1


@dataclass(frozen=True)
class TextConfig:
    """The text tower: a causal transformer pooled at the end-of-text token."""

    context: int = 77
    """Tokens per caption, start and end included."""
    vocab: int = 49408
    width: int = 512
    layers: int = 12
    heads: int | tuple[int, ...] = 8
    hidden: int | tuple[int, ...] = 2048
    head_dim: int | None = None
    activation: Activation = "gelu"
    eps: float = 1e-5
    eot: int | None = None
    """Pool at the first token with this id; None: at the first occurrence of the largest id, as CLIP does."""

    def __post_init__(self) -> None:
        positive(self, "context", "vocab", "width", "layers")


@dataclass(frozen=True)
class ClipConfig:
    """A CLIP: two towers into one joint space."""

    image: ImageConfig | ResNetConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    joint: int = 512
    """Size of the joint embedding."""
    remat: Remat = "none"
    """Recompute blocks in the backward pass: whole ("full"), or all but their matmuls ("dots")."""
    attention: Kernel = "xla"
    """Attention of the image tower: "cudnn" is the flash kernel of NVIDIA GPUs, for bfloat16."""

    def override(self, activation: Activation | None = None, image_heads: int | None = None, text_heads: int | None = None) -> "ClipConfig":
        """The same model with what the shapes of its weights cannot tell. Raises InputError for an activation there is not."""
        if activation and activation not in ACTIVATIONS:
            raise InputError(f"no activation {activation!r}{nearest(activation, ACTIVATIONS)} ({', '.join(ACTIVATIONS)})")
        image = self.image
        if isinstance(image, ImageConfig):
            image = replace(image, activation=activation or image.activation, heads=image_heads or image.heads)
        return replace(
            self,
            image=image,
            text=replace(self.text, activation=activation or self.text.activation, heads=text_heads or self.text.heads),
        )


def vit(size: int, patch: int, width: int, layers: int, text_width: int, text_layers: int) -> ClipConfig:
    """A published ViT CLIP: heads of 64, MLPs of four widths, 77 tokens of 49,408 (model_configs of the release)."""
    image = ImageConfig(size=size, patch=patch, width=width, layers=layers, heads=width // 64, hidden=4 * width)
    return ClipConfig(image, TextConfig(width=text_width, layers=text_layers, heads=text_width // 64, hidden=4 * text_width))


def resnet(width: int, text_layers: int) -> ClipConfig:
    """A published ResNet CLIP: joint space of 1024, text width 512."""
    return replace(vit(224, 32, 768, 12, 512, text_layers), image=ResNetConfig(width=width, heads=width // 2), joint=1024)


def head_dim(c: ImageConfig | TextConfig) -> int:
    """Channels of one head. Raises InputError when the heads do not divide the width: a bare weights file cannot tell how many."""
    for name in ("heads", "hidden"):
        if isinstance(sizes := getattr(c, name), tuple) and len(sizes) != c.layers:
            raise InputError(f"{name} has {len(sizes)} numbers for {c.layers} layers: give one for each")
    if c.head_dim is not None and c.heads != 0:
        return c.head_dim
    if isinstance(c.heads, tuple):
        raise InputError("heads that differ from layer to layer need a head_dim: set it (64 in every published model)")
    if c.heads < 1 or c.width % c.heads:
        raise InputError(f"{c.heads} heads do not divide a width of {c.width}; say how many there are (image_heads, text_heads)")
    return c.width // c.heads


def uniform(sizes: tuple[int, ...]) -> int | tuple[int, ...]:
    """One number where all layers have the same, and have any."""
    return sizes[0] if len(set(sizes)) == 1 and sizes[0] else sizes


class Features(NamedTuple):
    """Unit-norm image and text features, [batch, joint] f32, and the scale of their similarities (not its logarithm)."""

    image: jax.Array
    text: jax.Array
    scale: jax.Array


class MaskedBlock(Block):
    """A block that learned masks may leave fewer channels. keep: [embed], bool, as in `LayerNorm`."""

    def __call__(self, x: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        if keep is None:
            return super().__call__(x)
        x = x + self.attn(self.attn_norm(x, keep))
        return x + self.mlp(self.mlp_norm(x, keep))


class ImageTower(nnx.Module):
    def __init__(self, cfg: ClipConfig, *, rngs: nnx.Rngs):
        assert isinstance(cfg.image, ImageConfig)
        c, std = cfg.image, cfg.image.width**-0.5
        sizes: dict[str, Any] = dict(embed=c.width, head=c.heads, head_dim=head_dim(c), hidden=c.hidden, joint=cfg.joint)
        sizes |= dict(patch_row=c.patch, patch_col=c.patch, channel=3, grid_row=c.grid, grid_col=c.grid)
        attention = partial(Attention, sizes, attend=softmax(kernel=cfg.attention))
        self.patch = PatchEmbed(sizes, init=uniform_fan_in, rngs=rngs)
        self.cls = param("-> embed", sizes, normal(std), rngs)
        self.cls_position = param("-> embed", sizes, normal(std), rngs)
        self.position = param("grid_row grid_col -> embed", sizes, normal(std), rngs)
        self.pre_norm = LayerNorm(sizes, eps=c.eps, rngs=rngs)
        self.blocks = stack(
            lambda rngs: MaskedBlock(sizes, attention=attention, activation=c.activation, eps=c.eps, rngs=rngs), c.layers, rngs
        )
        self.post_norm = LayerNorm(sizes, eps=c.eps, rngs=rngs)
        self.projection = Dense("embed -> joint", sizes, init=normal(std), bias=None, rngs=rngs)
        self.layers, self.remat = c.layers, cfg.remat

    def __call__(self, images: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        x = self.patch(images)
        cls = jnp.broadcast_to(self.cls[...] + self.cls_position[...], (len(x), 1, x.shape[-1]))
        x = add(x, self.position[...].reshape(-1, x.shape[-1]))
        x = self.pre_norm(jnp.concatenate([cls.astype(x.dtype), x], axis=1), keep)
        x = scan(self.blocks, x, *_each_layer(keep, self.layers), remat=self.remat)
        return self.projection(self.post_norm(x[:, 0], keep))


class TextTower(nnx.Module):
    def __init__(self, cfg: ClipConfig, *, rngs: nnx.Rngs):
        c, std = cfg.text, cfg.text.width**-0.5
        sizes: dict[str, Any] = dict(embed=c.width, head=c.heads, head_dim=head_dim(c), hidden=c.hidden, joint=cfg.joint)
        sizes |= dict(vocab=c.vocab, position=c.context)
        residual = std * (2 * c.layers) ** -0.5
        attention = partial(Attention, sizes, attend=softmax(causal=True), qkv=normal(std), out=normal(residual))
        mlp: dict[str, Any] = dict(activation=c.activation, up=normal((2 * c.width) ** -0.5), down=normal(residual))
        self.token = TokenTable(sizes, rngs=rngs)
        self.position = param("position -> embed", sizes, normal(0.01), rngs)
        self.blocks = stack(lambda rngs: MaskedBlock(sizes, attention=attention, **mlp, eps=c.eps, rngs=rngs), c.layers, rngs)
        self.post_norm = LayerNorm(sizes, eps=c.eps, rngs=rngs)
        self.projection = Dense("embed -> joint", sizes, init=normal(std), bias=None, rngs=rngs)
        self.eot, self.layers, self.remat = c.eot, c.layers, cfg.remat

    def __call__(self, tokens: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        x = self.token(tokens)
        x = add(x, self.position[: tokens.shape[1]])
        x = scan(self.blocks, x, *_each_layer(keep, self.layers), remat=self.remat)
        end = jnp.argmax(tokens if self.eot is None else tokens == self.eot, axis=1)
        # Pooling before the norm gives the same row and spares normalising the others.
        return self.projection(self.post_norm(jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0], keep))


def _each_layer(keep: jax.Array | None, layers: int) -> tuple[Any, ...]:
    """The further arguments of every block, stacked along layer."""
    return () if keep is None else (jnp.broadcast_to(keep, (layers, *keep.shape)),)


class Keep(NamedTuple):
    """Channels of the residual streams that learned masks have left, bool [embed]; None: all, as in any model that is not being pruned."""

    image: jax.Array | None = None
    text: jax.Array | None = None


ALL = Keep()


class TokenTable(nnx.Module):
    def __init__(self, sizes: dict[str, int], *, rngs: nnx.Rngs):
        self.table = param("vocab -> embed", sizes, normal(0.02), rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return lookup(self.table[...], tokens)


class Clip(nnx.Module):
    """Image and text towers and the logarithm of the similarity scale.

    images: [batch, size, size, 3] f32, normalised. tokens: [batch, context] int32, padded after the end-of-text token.
    """

    def __init__(self, cfg: ClipConfig, *, rngs: nnx.Rngs):
        resnet = cfg.image if isinstance(cfg.image, ResNetConfig) else None
        if resnet:
            self.image: Any = ResNet(resnet, cfg.joint, remat=cfg.remat, kernel=cfg.attention, rngs=rngs)
        else:
            self.image = ImageTower(cfg, rngs=rngs)
        self.text = TextTower(cfg, rngs=rngs)
        self.logit_scale = param("", {}, constant(log(1 / 0.07)), rngs)

    def __call__(self, images: jax.Array, tokens: jax.Array, keep: Keep = ALL) -> Features:
        return Features(self.encode_image(images, keep), self.encode_text(tokens, keep), jnp.exp(self.logit_scale[...]))

    def encode_image(self, images: jax.Array, keep: Keep = ALL) -> jax.Array:
        """Unit-norm features, [batch, joint] f32."""
        return _unit(self.image(images, keep.image))

    def encode_text(self, tokens: jax.Array, keep: Keep = ALL) -> jax.Array:
        """Unit-norm features, [batch, joint] f32."""
        return _unit(self.text(tokens, keep.text))


def parameters(spec: Spec) -> dict[str, int]:
    """Counts as published figures give them: image and text without the token table, the table, and the grand total.

    Running statistics are no parameters.
    """
    spec = {path: leaf for path, leaf in spec.items() if not is_statistic(path)}
    table = count(spec, "text/token/table")
    return {"image": count(spec, "image/**"), "text": count(spec, "text/**") - table, "token_table": table, "total": count(spec, "**")}


def macs(cfg: ClipConfig, spec: Spec) -> dict[str, int]:
    """Multiply-accumulates of one image and of one caption, attention scores and values included."""
    if isinstance(cfg.image, ResNetConfig):
        image, query, uses = cfg.image.grid**2 + 1, "image/pool/query/kernel", tuple(positions(cfg.image))
    else:
        image, query = cfg.image.tokens, "image/blocks/attn/query/kernel"
        uses = (("image/patch/**", image - 1), ("image/projection/**", 1), ("image/blocks/**", image))
    text = cfg.text.context
    counted = kernel_macs(spec, (*uses, ("text/projection/**", 1), ("text/blocks/**", text)))
    towers = {tower: sum(n for path, n in counted.items() if path.startswith(tower)) for tower in ("image", "text")}
    return {
        "image": towers["image"] + attention_macs(spec[query], image),
        "text": towers["text"] + attention_macs(spec["text/blocks/attn/query/kernel"], text),
    }


def total_macs(cfg: ClipConfig, spec: Spec) -> int:
    """Multiply-accumulates of one image with one caption."""
    return sum(macs(cfg, spec).values())


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
