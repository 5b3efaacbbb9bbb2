"""CLIP with ViT and text towers (TinyCLIP §1; open_clip): configuration, modules, counts."""

from dataclasses import dataclass, field, replace
from functools import partial
from math import log
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from heirloom.common.errors import InputError, between, positive
from heirloom.common.nn.attention import Attention, Kernel, softmax
from heirloom.common.nn.block import Block, Remat, scan, stack
from heirloom.common.nn.dense import Dense, Sizes, constant, normal, param, uniform_fan_in
from heirloom.common.nn.mlp import Activation, check_activation
from heirloom.common.nn.norm import LayerNorm, unit
from heirloom.common.nn.patch import PatchEmbed
from heirloom.common.nn.precision import add, lookup
from heirloom.common.vit.model import VitConfig
from heirloom.common.vit.parts import LayerScale
from tinyclip_jax.resnet import ResNet, ResNetConfig
from tinyclip_jax.vit import Projection, VitImageConfig, VitTower, projection

Images = Float[Array | np.ndarray, "images size size 3"]
Tokens = Int[Array | np.ndarray, "captions context"]
ImagePool = Literal["cls", "mean_norm", "norm_mean"]
TextPool = Literal["eot", "last", "first"]
TextMask = Literal["causal", "none"]


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
    pool: ImagePool = "cls"
    """What is projected: the class token, the normalised mean of the patches, or the mean of the normalised patches."""
    pre_norm: bool = True
    """A LayerNorm before the blocks."""
    layer_scale: float = 0.0
    """Initial value of LayerScale, learned factors of the channels of each branch; 0: none."""

    def __post_init__(self) -> None:
        between(self, "heads", "hidden", "layer_scale")
        between(self, "head_dim", least=1)
        between(self, "eps", below=1.0)
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
    """The text tower: a transformer, in CLIP causal and pooled at the end-of-text token."""

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
    pool: TextPool = "eot"
    """Position that is projected: of the end-of-text token, or the last (SigLIP) or first one, whatever is there."""
    causal: bool = True
    """A token sees only the tokens before it; False: all, padding included (SigLIP)."""
    projection: Projection = "linear"
    """From the width to the joint embedding: linear, affine (with a bias), or none."""
    layer_scale: float = 0.0
    """Initial value of LayerScale; 0: none."""

    def __post_init__(self) -> None:
        between(self, "heads", "hidden", "layer_scale", "eot")
        between(self, "head_dim", least=1)
        between(self, "eps", below=1.0)
        positive(self, "context", "vocab", "width", "layers")


@dataclass(frozen=True)
class ClipConfig:
    """A CLIP: an image tower and a text tower with one joint embedding space."""

    image: ImageConfig | ResNetConfig | VitImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    joint: int = 512
    """Size of the joint embedding."""
    logit_bias: bool = False
    """A learned bias of the similarities, which the sigmoid loss needs (SigLIP)."""
    remat: Remat = "none"
    """Recompute blocks in the backward pass: whole ("full"), or all but their matmuls ("dots")."""
    attention: Kernel = "xla"
    """Attention of the image tower: "cudnn" is the flash kernel of NVIDIA GPUs, for bfloat16."""

    def __post_init__(self) -> None:
        positive(self, "joint")
        for name, c in (("image", self.image), ("text", self.text)):
            if getattr(c, "projection", "") == "none" and c.width != self.joint:
                given = f"{name}.projection is 'none' and {name}.width {c.width}, joint is {self.joint}"
                raise InputError(f"{given}: set joint to {c.width}, or {name}.projection to 'linear'")

    def override(
        self, activation: Activation | None = None, image_heads: int | None = None, text_heads: int | None = None,
        image_pool: ImagePool | None = None, text_pool: TextPool | None = None, text_mask: TextMask | None = None
    ) -> "ClipConfig":
        """Set what the shapes of the weights do not determine. Raises InputError for an invalid value."""
        if activation is not None:
            check_activation(activation)
        for name, value in (("image_heads", image_heads), ("text_heads", text_heads)):
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name} is {value!r}: write a whole number of 1 or more")
        pools = ("image_pool", image_pool, ImagePool), ("text_pool", text_pool, TextPool)
        for name, given, kind in (*pools, ("text_mask", text_mask, TextMask)):
            if given not in (None, *get_args(kind)):
                raise InputError(f"{name} is {given!r}: write one of {', '.join(get_args(kind))}")
        mask = None if text_mask is None else text_mask == "causal"
        text = _with(self.text, activation=activation, heads=text_heads, pool=text_pool, causal=mask)
        resnet = isinstance(self.image, ResNetConfig)
        if resnet and image_pool is not None:
            raise InputError("image_pool has no effect on a ResNet, which pools with attention: leave it out")
        others = {} if resnet else dict(activation=activation, pool=image_pool)
        return replace(self, image=_with(self.image, heads=image_heads, **others), text=text)


def _with(cfg: Any, **fields: Any) -> Any:
    """Copy a config with those of the fields that are not None."""
    return replace(cfg, **{name: value for name, value in fields.items() if value is not None})


def vit(size: int, patch: int, width: int, layers: int, text_width: int, text_layers: int) -> ClipConfig:
    """Config of a published ViT CLIP: heads of 64, hidden 4 x width, 77 tokens of 49,408 (release's model_configs)."""
    image = ImageConfig(size=size, patch=patch, width=width, layers=layers, heads=width // 64, hidden=4 * width)
    text = TextConfig(width=text_width, layers=text_layers, heads=text_width // 64, hidden=4 * text_width)
    return ClipConfig(image=image, text=text)


def resnet(width: int, text_layers: int) -> ClipConfig:
    """Config of a published ResNet CLIP: joint size 1024, text width 512."""
    image = ResNetConfig(width=width, heads=width // 2)
    return replace(vit(224, 32, 768, 12, 512, text_layers), image=image, joint=1024)


def head_dim(c: ImageConfig | TextConfig | VitImageConfig) -> int:
    """Channels of one head. Raises InputError when the heads (guessed for a bare file) do not divide the width."""
    if isinstance(c, VitConfig):
        return c.head_dim
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
    """Unit-norm image and text features, f32, and scale (not its logarithm) and bias of their similarities.

    The logits of a pair are scale * cosine + bias; the bias is 0 where the model has none.
    """

    image: Float[Array, "images joint"]
    text: Float[Array, "captions joint"]
    scale: Float[Array, ""]
    bias: Float[Array, ""]


class MaskedBlock(Block):
    """A block with LayerScale, if any. keep: [embed], bool, the channels that the norms of a masked model use."""

    def __init__(self, sizes: Sizes, *, layer_scale: float, rngs: nnx.Rngs, **options: Any):
        super().__init__(sizes, rngs=rngs, **options)
        self.attn_scale = LayerScale(sizes, initial=layer_scale, rngs=rngs) if layer_scale else None
        self.mlp_scale = LayerScale(sizes, initial=layer_scale, rngs=rngs) if layer_scale else None

    def __call__(self, x: jax.Array, keep: jax.Array | None = None) -> jax.Array:  # type: ignore[override]
        y = self.attn(self.attn_norm(x, keep))
        x = x + (y if self.attn_scale is None else self.attn_scale(y))
        y = self.mlp(self.mlp_norm(x, keep))
        return x + (y if self.mlp_scale is None else self.mlp_scale(y))


class ImageTower(nnx.Module):
    """CLIP's ViT, with a class token: images [batch, size, size, 3] to features [batch, joint]."""

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
        self.pre_norm = LayerNorm(sizes, eps=c.eps, rngs=rngs) if c.pre_norm else None
        block: dict[str, Any] = dict(attention=attention, activation=c.activation, eps=c.eps, layer_scale=c.layer_scale)
        self.blocks = stack(lambda rngs: MaskedBlock(sizes, **block, rngs=rngs), c.layers, rngs)
        self.post_norm = LayerNorm(sizes, eps=c.eps, rngs=rngs)
        self.projection = Dense("embed -> joint", sizes, init=normal(std), bias=None, rngs=rngs)
        self.layers, self.remat, self.pool = c.layers, cfg.remat, c.pool

    def __call__(self, images: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        x = self.patch(images)
        cls = jnp.broadcast_to(self.cls[...] + self.cls_position[...], (len(x), 1, x.shape[-1]))
        x = add(x, self.position[...].reshape(-1, x.shape[-1]))
        x = jnp.concatenate([cls.astype(x.dtype), x], axis=1)
        x = x if self.pre_norm is None else self.pre_norm(x, keep)
        x = scan(self.blocks, x, *_each_layer(keep, self.layers), remat=self.remat)
        return self.projection(self._pooled(x, keep))

    def _pooled(self, x: jax.Array, keep: jax.Array | None) -> jax.Array:
        if self.pool == "norm_mean":
            return self.post_norm(x[:, 1:], keep).mean(1)
        return self.post_norm(x[:, 0] if self.pool == "cls" else x[:, 1:].mean(1), keep)


class TextTower(nnx.Module):
    """Transformer: tokens [batch, context] to features [batch, joint], pooled at one token."""

    def __init__(self, cfg: ClipConfig, *, rngs: nnx.Rngs):
        c, std = cfg.text, cfg.text.width**-0.5
        sizes: dict[str, Any] = dict(embed=c.width, head=c.heads, head_dim=head_dim(c))
        sizes |= dict(hidden=c.hidden, joint=cfg.joint)
        sizes |= dict(vocab=c.vocab, position=c.context)
        residual = std * (2 * c.layers) ** -0.5
        attention = partial(Attention, sizes, attend=softmax(causal=c.causal), qkv=normal(std), out=normal(residual))
        mlp: dict[str, Any] = dict(activation=c.activation, up=normal((2 * c.width) ** -0.5), down=normal(residual))
        self.token = TokenTable(sizes, rngs=rngs)
        self.position = param("position -> embed", sizes, normal(0.01), rngs)
        block = dict(attention=attention, **mlp, eps=c.eps, layer_scale=c.layer_scale)
        self.blocks = stack(lambda rngs: MaskedBlock(sizes, **block, rngs=rngs), c.layers, rngs)
        self.post_norm = LayerNorm(sizes, eps=c.eps, rngs=rngs)
        self.projection = projection(c.projection, sizes, rngs=rngs)
        self.eot, self.pool, self.layers, self.remat = c.eot, c.pool, c.layers, cfg.remat

    def __call__(self, tokens: Tokens, keep: jax.Array | None = None) -> jax.Array:
        x = self._blocks(tokens := jnp.asarray(tokens), keep)
        # Pooling before the norm gives the same row, and the other rows are not normalised.
        x = self.post_norm(self._pooled(x, tokens), keep)
        return x if self.projection is None else self.projection(x)

    def _pooled(self, x: jax.Array, tokens: jax.Array) -> jax.Array:
        if self.pool != "eot":
            return x[:, -1 if self.pool == "last" else 0]
        end = jnp.argmax(tokens if self.eot is None else tokens == self.eot, axis=1)
        return jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]

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
    """Image and text towers, the logarithm of the similarity scale, and the similarities' bias, if there is one.

    images: f32, normalised. tokens: int32, padded after the end-of-text token. keep: open channels of a masked model.
    """

    def __init__(self, cfg: ClipConfig, *, rngs: nnx.Rngs):
        options: dict[str, Any] = dict(remat=cfg.remat, kernel=cfg.attention, rngs=rngs)
        if isinstance(cfg.image, ResNetConfig):
            self.image: Any = ResNet(cfg.image, cfg.joint, **options)
        elif isinstance(cfg.image, VitImageConfig):
            self.image = VitTower(cfg.image, cfg.joint, **options)
        else:
            self.image = ImageTower(cfg, rngs=rngs)
        self.text = TextTower(cfg, rngs=rngs)
        self.logit_scale = param("", {}, constant(log(1 / 0.07)), rngs)
        self.logit_bias = param("", {}, constant(-10.0), rngs) if cfg.logit_bias else None

    def __call__(self, images: Images, tokens: Tokens, keep: Keep = ALL) -> Features:
        image, text = self.encode_image(images, keep), self.encode_text(tokens, keep)
        bias = jnp.zeros(()) if self.logit_bias is None else self.logit_bias[...]
        return Features(image, text, jnp.exp(self.logit_scale[...]), bias)

    def encode_image(self, images: Images, keep: Keep = ALL) -> Float[Array, "images joint"]:
        """Unit-norm image features, f32."""
        return unit(self.image(images, keep.image).astype(jnp.float32))

    def encode_text(self, tokens: Tokens, keep: Keep = ALL) -> Float[Array, "captions joint"]:
        """Unit-norm text features, f32."""
        return unit(self.text(tokens, keep.text).astype(jnp.float32))

    def token_states(self, tokens: Tokens) -> Float[Array, "captions context embed"]:
        """The normalised last state of every token of the text tower, f32."""
        return self.text.states(tokens).astype(jnp.float32)
