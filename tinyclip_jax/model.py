"""CLIP with ViT and text towers (TinyCLIP §1; open_clip): configuration, modules, counts."""

from dataclasses import dataclass, field, replace
from functools import partial
from math import log
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from heirloom.common.errors import InputError, positive
from heirloom.common.nn.attention import Attention, Kernel, softmax
from heirloom.common.nn.block import Block, Remat, scan, stack
from heirloom.common.nn.dense import Dense, constant, normal, param, uniform_fan_in
from heirloom.common.nn.mlp import Activation, check_activation
from heirloom.common.nn.norm import LayerNorm, unit
from heirloom.common.nn.patch import PatchEmbed
from heirloom.common.nn.precision import add, lookup
from heirloom.common.surgery.axes import Spec
from heirloom.common.surgery.report import attention_macs, count, kernel_macs
from heirloom.common.train.optim import is_statistic
from tinyclip_jax.resnet import ResNet, ResNetConfig, positions

Images = Float[Array | np.ndarray, "images size size 3"]
Tokens = Int[Array | np.ndarray, "captions context"]


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
    """Heads of each layer; a tuple where pruned layers differ. A layer with 0 heads adds a constant."""
    hidden: int | tuple[int, ...] = 3072
    """Hidden units of the MLP of each layer; a tuple where pruned layers differ."""
    head_dim: int | None = None
    """Channels of a head; None: width / heads."""
    activation: Activation = "gelu"
    eps: float = 1e-5
    """Epsilon of every LayerNorm."""

    def __post_init__(self) -> None:
        positive(self, "size", "patch", "width", "layers")

    @property
    def grid(self) -> int:
        """Number of patches along a side. Raises InputError when the patch size does not divide the image size."""
        if self.patch < 1 or self.size % self.patch:
            given = f"patches of {self.patch} px do not fill pictures of {self.size} px"
            raise InputError(f"{given}: change image.size or image.patch")
        return self.size // self.patch

    @property
    def tokens(self) -> int:
        """Length of the sequence: the patches and the class token."""
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
    """Id of the token that is pooled, at its first position; None: the first position of the largest id, as CLIP does.
    """

    def __post_init__(self) -> None:
        positive(self, "context", "vocab", "width", "layers")


@dataclass(frozen=True)
class ClipConfig:
    """A CLIP: an image tower and a text tower with one joint embedding space."""

    image: ImageConfig | ResNetConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    joint: int = 512
    """Size of the joint embedding."""
    remat: Remat = "none"
    """Recompute blocks in the backward pass: whole ("full"), or all but their matmuls ("dots")."""
    attention: Kernel = "xla"
    """Attention of the image tower: "cudnn" is the flash kernel of NVIDIA GPUs, for bfloat16."""

    def override(
        self, activation: Activation | None = None, image_heads: int | None = None, text_heads: int | None = None
    ) -> "ClipConfig":
        """Set what the shapes of the weights do not determine. Raises InputError for an unknown activation."""
        if activation:
            check_activation(activation)
        image = self.image
        if isinstance(image, ImageConfig):
            image = replace(image, activation=activation or image.activation, heads=image_heads or image.heads)
        text = replace(self.text, activation=activation or self.text.activation, heads=text_heads or self.text.heads)
        return replace(self, image=image, text=text)


def vit(size: int, patch: int, width: int, layers: int, text_width: int, text_layers: int) -> ClipConfig:
    """Config of a published ViT CLIP: heads of 64, hidden 4 x width, 77 tokens of 49,408 (release's model_configs)."""
    image = ImageConfig(size=size, patch=patch, width=width, layers=layers, heads=width // 64, hidden=4 * width)
    text = TextConfig(width=text_width, layers=text_layers, heads=text_width // 64, hidden=4 * text_width)
    return ClipConfig(image=image, text=text)


def resnet(width: int, text_layers: int) -> ClipConfig:
    """Config of a published ResNet CLIP: joint size 1024, text width 512."""
    image = ResNetConfig(width=width, heads=width // 2)
    return replace(vit(224, 32, 768, 12, 512, text_layers), image=image, joint=1024)


def head_dim(c: ImageConfig | TextConfig) -> int:
    """Channels of one head. Raises InputError when the heads (guessed for a bare file) do not divide the width."""
    for name in ("heads", "hidden"):
        if isinstance(sizes := getattr(c, name), tuple) and len(sizes) != c.layers:
            given = f"{name} has {len(sizes)} numbers and the tower {c.layers} layers"
            raise InputError(f"{given}: give one number for each layer")
    if c.head_dim is not None and c.heads != 0:
        return c.head_dim
    if isinstance(c.heads, tuple):
        raise InputError("heads differ between layers, which needs a head_dim: set it (64 in every published model)")
    if c.heads < 1 or c.width % c.heads:
        number = "set the number of heads (image_heads, text_heads)"
        raise InputError(f"{c.heads} heads do not divide a width of {c.width}: {number}")
    return c.width // c.heads


def uniform(sizes: tuple[int, ...]) -> int | tuple[int, ...]:
    """Return one number where all layers have the same size above 0, else the tuple."""
    return sizes[0] if len(set(sizes)) == 1 and sizes[0] else sizes


class Features(NamedTuple):
    """Unit-norm image and text features, f32, and the scale of their similarities (not its logarithm)."""

    image: Float[Array, "images joint"]
    text: Float[Array, "captions joint"]
    scale: Float[Array, ""]


class MaskedBlock(Block):
    """A block of a masked model. keep: [embed], bool, the channels that its norms use, as in `LayerNorm`."""

    def __call__(self, x: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        if keep is None:
            return super().__call__(x)
        x = x + self.attn(self.attn_norm(x, keep))
        return x + self.mlp(self.mlp_norm(x, keep))


class ImageTower(nnx.Module):
    """ViT with a class token: images [batch, size, size, 3] to features [batch, joint]."""

    def __init__(self, cfg: ClipConfig, *, rngs: nnx.Rngs):
        assert isinstance(cfg.image, ImageConfig)
        c, std = cfg.image, cfg.image.width**-0.5
        sizes: dict[str, Any] = dict(embed=c.width, head=c.heads, head_dim=head_dim(c))
        sizes |= dict(hidden=c.hidden, joint=cfg.joint)
        sizes |= dict(patch_row=c.patch, patch_col=c.patch, channel=3, grid_row=c.grid, grid_col=c.grid)
        attention = partial(Attention, sizes, attend=softmax(kernel=cfg.attention))
        self.patch = PatchEmbed(sizes, init=uniform_fan_in, rngs=rngs)
        self.cls = param("-> embed", sizes, normal(std), rngs)
        self.cls_position = param("-> embed", sizes, normal(std), rngs)
        self.position = param("grid_row grid_col -> embed", sizes, normal(std), rngs)
        self.pre_norm = LayerNorm(sizes, eps=c.eps, rngs=rngs)
        block: dict[str, Any] = dict(attention=attention, activation=c.activation, eps=c.eps)
        self.blocks = stack(lambda rngs: MaskedBlock(sizes, **block, rngs=rngs), c.layers, rngs)
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
    """Causal transformer: tokens [batch, context] to features [batch, joint], pooled at the end-of-text token."""

    def __init__(self, cfg: ClipConfig, *, rngs: nnx.Rngs):
        c, std = cfg.text, cfg.text.width**-0.5
        sizes: dict[str, Any] = dict(embed=c.width, head=c.heads, head_dim=head_dim(c))
        sizes |= dict(hidden=c.hidden, joint=cfg.joint)
        sizes |= dict(vocab=c.vocab, position=c.context)
        residual = std * (2 * c.layers) ** -0.5
        attention = partial(Attention, sizes, attend=softmax(causal=True), qkv=normal(std), out=normal(residual))
        mlp: dict[str, Any] = dict(activation=c.activation, up=normal((2 * c.width) ** -0.5), down=normal(residual))
        self.token = TokenTable(sizes, rngs=rngs)
        self.position = param("position -> embed", sizes, normal(0.01), rngs)
        block = dict(attention=attention, **mlp, eps=c.eps)
        self.blocks = stack(lambda rngs: MaskedBlock(sizes, **block, rngs=rngs), c.layers, rngs)
        self.post_norm = LayerNorm(sizes, eps=c.eps, rngs=rngs)
        self.projection = Dense("embed -> joint", sizes, init=normal(std), bias=None, rngs=rngs)
        self.eot, self.layers, self.remat = c.eot, c.layers, cfg.remat

    def __call__(self, tokens: Tokens, keep: jax.Array | None = None) -> jax.Array:
        x = self._blocks(tokens := jnp.asarray(tokens), keep)
        end = jnp.argmax(tokens if self.eot is None else tokens == self.eot, axis=1)
        # Pooling before the norm gives the same row, and the other rows are not normalised.
        return self.projection(self.post_norm(jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0], keep))

    def states(self, tokens: Tokens) -> Float[Array, "captions context embed"]:
        """The normalised last state of every token, as models that read texts take them."""
        return self.post_norm(self._blocks(jnp.asarray(tokens), None))

    def _blocks(self, tokens: jax.Array, keep: jax.Array | None) -> jax.Array:
        x = add(self.token(tokens), self.position[: tokens.shape[1]])
        return scan(self.blocks, x, *_each_layer(keep, self.layers), remat=self.remat)


def _each_layer(keep: jax.Array | None, layers: int) -> tuple[Any, ...]:
    """Arguments of the blocks besides x, stacked along layer."""
    return () if keep is None else (jnp.broadcast_to(keep, (layers, *keep.shape)),)


class Keep(NamedTuple):
    """Masks of the open channels of both residual streams; None: all, as without learned masks."""

    image: Bool[Array, " embed"] | None = None
    text: Bool[Array, " embed"] | None = None


ALL = Keep()


class TokenTable(nnx.Module):
    """Token embedding: tokens [batch, context] to [batch, context, embed]."""

    def __init__(self, sizes: dict[str, int], *, rngs: nnx.Rngs):
        self.table = param("vocab -> embed", sizes, normal(0.02), rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return lookup(self.table[...], tokens)


class Clip(nnx.Module):
    """Image and text towers and the logarithm of the similarity scale.

    images: f32, normalised. tokens: int32, padded after the end-of-text token. keep: open channels of a masked model.
    """

    def __init__(self, cfg: ClipConfig, *, rngs: nnx.Rngs):
        resnet = cfg.image if isinstance(cfg.image, ResNetConfig) else None
        if resnet:
            self.image: Any = ResNet(resnet, cfg.joint, remat=cfg.remat, kernel=cfg.attention, rngs=rngs)
        else:
            self.image = ImageTower(cfg, rngs=rngs)
        self.text = TextTower(cfg, rngs=rngs)
        self.logit_scale = param("", {}, constant(log(1 / 0.07)), rngs)

    def __call__(self, images: Images, tokens: Tokens, keep: Keep = ALL) -> Features:
        return Features(self.encode_image(images, keep), self.encode_text(tokens, keep), jnp.exp(self.logit_scale[...]))

    def encode_image(self, images: Images, keep: Keep = ALL) -> Float[Array, "images joint"]:
        """Unit-norm image features, f32."""
        return unit(self.image(images, keep.image).astype(jnp.float32))

    def encode_text(self, tokens: Tokens, keep: Keep = ALL) -> Float[Array, "captions joint"]:
        """Unit-norm text features, f32."""
        return unit(self.text(tokens, keep.text).astype(jnp.float32))

    def token_states(self, tokens: Tokens) -> Float[Array, "captions context embed"]:
        """The normalised last state of every token of the text tower, f32."""
        return self.text.states(tokens).astype(jnp.float32)


def parameters(spec: Spec) -> dict[str, int]:
    """Count parameters as published figures do: image, text without the token table, the token table, total.

    Running statistics are not counted.
    """
    spec = {path: leaf for path, leaf in spec.items() if not is_statistic(path)}
    table = count(spec, "text/token/table")
    image, text, total = (count(spec, pattern) for pattern in ("image/**", "text/**", "**"))
    return {"image": image, "text": text - table, "token_table": table, "total": total}


def macs(cfg: ClipConfig, spec: Spec) -> dict[str, int]:
    """Multiply-accumulates of one image and of one caption, including attention scores and values."""
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
    """Multiply-accumulates of one image and one caption together."""
    return sum(macs(cfg, spec).values())
