"""CLIP's ResNet as image tower: a stem of three convolutions, average pools for strides, and attention that pools."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from heirloom.common.errors import InputError, between, positive
from heirloom.common.nn.attention import Kernel, softmax
from heirloom.common.nn.block import Remat, run
from heirloom.common.nn.conv import Conv
from heirloom.common.nn.dense import Dense, normal, param, zeros
from heirloom.common.nn.image import average_pool
from heirloom.common.nn.norm import BatchNorm
from heirloom.common.nn.precision import add
from heirloom.common.surgery.axes import Spec, select
from heirloom.common.surgery.maps import first
from heirloom.common.surgery.plan import Maps

EXPANSION = 4  # channels that a bottleneck writes, over those it works with
STAGES = (1, 2, 3, 4)


@dataclass(frozen=True)
class ResNetConfig:
    """The image tower: CLIP's modified ResNet."""

    size: int = 224
    """Side of the input, pixels; a multiple of 32."""
    width: int = 64
    """Channels after the stem; the last stage writes 32 times as many."""
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    """Bottlenecks of each stage."""
    heads: int = 32
    """Of the attention that pools."""
    eps: float = 1e-5
    """Of every batch norm."""

    def __post_init__(self) -> None:
        positive(self, "size", "width", "heads")
        between(self, "eps", below=1.0)
        positive(self, "blocks", most=1000)

    @property
    def embed(self) -> int:
        """Channels that are pooled."""
        return 32 * self.width

    @property
    def grid(self) -> int:
        """Positions along a side at the end. Raises InputError when strides do not divide the picture."""
        if self.size % 32:
            given = f"{self.size} px is no multiple of 32, change image.size"
            raise InputError(f"a ResNet halves its input five times: {given}")
        return self.size // 32


class ResNet(nnx.Module):
    """images: [batch, size, size, 3] to [batch, joint]."""

    def __init__(self, c: ResNetConfig, joint: int, *, remat: Remat = "none", kernel: Kernel = "xla", rngs: nnx.Rngs):
        if len(c.blocks) != len(STAGES) or min(c.blocks) < 1:
            raise InputError(f"image.blocks is {c.blocks}: a ResNet has four stages of one block or more")
        if c.heads < 1 or c.embed % c.heads:
            given = f"{c.heads} heads do not divide the {c.embed} channels that are pooled"
            raise InputError(f"{given}: change image.heads or image.width")
        half, eps, self.remat = c.width // 2, c.eps, remat
        self.conv1, self.bn1 = Conv(3, half, stride=2, bias=None, rngs=rngs), BatchNorm(half, eps=eps, rngs=rngs)
        self.conv2, self.bn2 = Conv(half, half, bias=None, rngs=rngs), BatchNorm(half, eps=eps, rngs=rngs)
        self.conv3, self.bn3 = Conv(half, c.width, bias=None, rngs=rngs), BatchNorm(c.width, eps=eps, rngs=rngs)
        channels = c.width
        for stage, count in zip(STAGES, c.blocks, strict=True):
            planes, blocks = c.width * 2 ** (stage - 1), []
            for i in range(count):
                blocks.append(Bottleneck(channels, planes, stride=2 if stage > 1 and i == 0 else 1, eps=eps, rngs=rngs))
                channels = EXPANSION * planes
            setattr(self, f"layer{stage}", nnx.List(blocks))
        self.pool = AttentionPool(c, joint, kernel=kernel, rngs=rngs)

    def __call__(self, images: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        x = images
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = jax.nn.relu(norm(conv(x)))
        x = average_pool(x, 2)
        for stage in STAGES:
            for block in getattr(self, f"layer{stage}"):
                x = run(block, x, remat=self.remat)
        return self.pool(x)


class Bottleneck(nnx.Module):
    """1x1, 3x3, average pool for a stride, 1x1; the shortcut is pooled and projected where shapes differ."""

    def __init__(self, read: int, planes: int, *, stride: int, eps: float, rngs: nnx.Rngs):
        written = EXPANSION * planes
        self.conv1, self.bn1 = Conv(read, planes, size=1, bias=None, rngs=rngs), BatchNorm(planes, eps=eps, rngs=rngs)
        self.conv2, self.bn2 = Conv(planes, planes, bias=None, rngs=rngs), BatchNorm(planes, eps=eps, rngs=rngs)
        self.conv3 = Conv(planes, written, size=1, bias=None, rngs=rngs)
        self.bn3 = BatchNorm(written, eps=eps, scale=zeros, rngs=rngs)  # at first a block is its shortcut
        self.stride, self.projects = stride, stride > 1 or read != written
        if self.projects:
            self.down = Conv(read, written, size=1, bias=None, rngs=rngs)
            self.down_bn = BatchNorm(written, eps=eps, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = jax.nn.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(average_pool(y, self.stride)))
        if self.projects:
            x = self.down_bn(self.down(average_pool(x, self.stride)))
        return jax.nn.relu(y + x)


class AttentionPool(nnx.Module):
    """One attention of the mean over all positions: [batch, row, col, embed] to [batch, joint]."""

    def __init__(self, c: ResNetConfig, joint: int, *, kernel: Kernel, rngs: nnx.Rngs):
        sizes = dict(embed=c.embed, head=c.heads, head_dim=c.embed // c.heads)
        sizes |= dict(joint=joint, grid_row=c.grid, grid_col=c.grid)
        init = normal(c.embed**-0.5)
        self.cls_position = param("-> embed", sizes, init, rngs)
        self.position = param("grid_row grid_col -> embed", sizes, init, rngs)
        self.query, self.key, self.value = (
            Dense("embed -> head head_dim", sizes, init=init, rngs=rngs) for _ in range(3)
        )
        self.out = Dense("head head_dim -> joint", sizes, init=init, rngs=rngs)
        self.attend = softmax(kernel=kernel)

    def __call__(self, x: jax.Array) -> jax.Array:
        mean = add(x.mean((1, 2))[:, None], self.cls_position[...])
        grid = add(x, self.position[...]).reshape(len(x), -1, x.shape[-1])
        tokens = jnp.concatenate([mean, grid], axis=1)
        # Only the first token's answer is used, so only its question is asked.
        return self.out(self.attend(self.query(mean), self.key(tokens), self.value(tokens)))[:, 0]


def positions(c: ResNetConfig) -> Iterator[tuple[str, int]]:
    """(path glob, how often its kernels are applied to one picture), for counting multiply-accumulates.

    Query and output of the pool count for all positions, as the published figures and the original code have it.
    """
    yield "image/conv*/**", (c.size // 2) ** 2
    for stage in STAGES:
        before, after = c.size // (4 if stage < 3 else 2**stage), c.size // 2 ** (stage + 1)
        yield f"image/layer{stage}/0/conv1/**", before**2
        yield f"image/layer{stage}/0/conv2/**", before**2
        yield f"image/layer{stage}/**", after**2
    yield "image/pool/**", c.grid**2 + 1


def leading(spec: Spec) -> list[tuple[str, Maps]]:
    """Rules that give every leaf of the image tower the leading part of its source along each axis."""
    rules: list[tuple[str, Maps]] = []
    for path in select("image/**", spec):
        leaf = spec[path]
        rules.append((path, {name: first(size) for name, size in zip(leaf.axes.names, leaf.shape, strict=True)}))
    return rules
