"""Inception-v3 for scores of generated pictures: pooled, spatial and class features. Pictures are resized inside.

Two sets of weights fit, and their scores are not comparable: each has a name, the protocol, which every score has too.
"adm" is the frozen graph of 2015 that published FIDs use, with pytorch-fid's names; "inception-v3-q8" is an 8-bit
ImageNet model, dequantised. Batch norms are folded into kernels and biases; `extractor.py` opens the weights.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from heirloom.common.nn.dense import Dense, param, uniform_fan_in, zeros

SIDE = 299
POOL = 2048
CHANNELS = 7  # of the spatial features, 17 x 17 each
SPATIAL = 17 * 17 * CHANNELS


@dataclass(frozen=True)
class InceptionConfig:
    """Differences between the two sets of weights.

    last_pool: kind of the pooled branch of the last block; the graph of 2015 has a maximum.
    """

    protocol: str
    classes: int
    last_pool: Literal["max", "average"]


ADM = InceptionConfig("adm", 1008, "max")
Q8 = InceptionConfig("inception-v3-q8", 1001, "average")


@dataclass(frozen=True)
class Conv:
    """A convolution with bias and ReLU. name: torchvision's. width: output channels. rows, cols: size of the kernel."""

    name: str
    width: int
    rows: int
    cols: int
    stride: int = 1
    padding: Literal["SAME", "VALID"] = "SAME"


@dataclass(frozen=True)
class Pool:
    """3x3 pooling. An average does not count padding, like TensorFlow's; with a stride of 2 nothing is padded."""

    kind: Literal["max", "average"]
    stride: int = 1


Step = Conv | Pool | tuple[Conv, Conv]
"""A pair runs in parallel and is concatenated."""
Branches = tuple[tuple[Step, ...], ...]

DOWN = Pool("max", 2)
STEM: Branches = (
    (
        Conv("Conv2d_1a_3x3", 32, 3, 3, 2, "VALID"),
        Conv("Conv2d_2a_3x3", 32, 3, 3, 1, "VALID"),
        Conv("Conv2d_2b_3x3", 64, 3, 3),
        DOWN,
        Conv("Conv2d_3b_1x1", 80, 1, 1),
        Conv("Conv2d_4a_3x3", 192, 3, 3, 1, "VALID"),
        DOWN,
    ),
)


def _mixed_5(pooled: int) -> Branches:
    return (
        (Conv("branch1x1", 64, 1, 1),),
        (Conv("branch5x5_1", 48, 1, 1), Conv("branch5x5_2", 64, 5, 5)),
        (Conv("branch3x3dbl_1", 64, 1, 1), Conv("branch3x3dbl_2", 96, 3, 3), Conv("branch3x3dbl_3", 96, 3, 3)),
        (Pool("average"), Conv("branch_pool", pooled, 1, 1)),
    )


def _mixed_6(inner: int) -> Branches:
    single = ((inner, 1, 1), (inner, 1, 7), (192, 7, 1))
    double = ((inner, 1, 1), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7))
    return (
        (Conv("branch1x1", 192, 1, 1),),
        tuple(Conv(f"branch7x7_{i}", *size) for i, size in enumerate(single, 1)),
        tuple(Conv(f"branch7x7dbl_{i}", *size) for i, size in enumerate(double, 1)),
        (Pool("average"), Conv("branch_pool", 192, 1, 1)),
    )


def _mixed_7(pool: Pool) -> Branches:
    single = (Conv("branch3x3_2a", 384, 1, 3), Conv("branch3x3_2b", 384, 3, 1))
    double = (Conv("branch3x3dbl_3a", 384, 1, 3), Conv("branch3x3dbl_3b", 384, 3, 1))
    return (
        (Conv("branch1x1", 320, 1, 1),),
        (Conv("branch3x3_1", 384, 1, 1), single),
        (Conv("branch3x3dbl_1", 448, 1, 1), Conv("branch3x3dbl_2", 384, 3, 3), double),
        (pool, Conv("branch_pool", 192, 1, 1)),
    )


_MIXED_6A: Branches = (
    (Conv("branch3x3", 384, 3, 3, 2, "VALID"),),
    (Conv("branch3x3dbl_1", 64, 1, 1), Conv("branch3x3dbl_2", 96, 3, 3), Conv("branch3x3dbl_3", 96, 3, 3, 2, "VALID")),
    (DOWN,),
)
_MIXED_7A: Branches = (
    (Conv("branch3x3_1", 192, 1, 1), Conv("branch3x3_2", 320, 3, 3, 2, "VALID")),
    (
        Conv("branch7x7x3_1", 192, 1, 1),
        Conv("branch7x7x3_2", 192, 1, 7),
        Conv("branch7x7x3_3", 192, 7, 1),
        Conv("branch7x7x3_4", 192, 3, 3, 2, "VALID"),
    ),
    (DOWN,),
)


def blocks(cfg: InceptionConfig) -> dict[str, Branches]:
    """Returns the blocks after the stem by name."""
    return {
        "Mixed_5b": _mixed_5(32),
        "Mixed_5c": _mixed_5(64),
        "Mixed_5d": _mixed_5(64),
        "Mixed_6a": _MIXED_6A,
        "Mixed_6b": _mixed_6(128),
        "Mixed_6c": _mixed_6(160),
        "Mixed_6d": _mixed_6(160),
        "Mixed_6e": _mixed_6(192),
        "Mixed_7a": _MIXED_7A,
        "Mixed_7b": _mixed_7(Pool("average")),
        "Mixed_7c": _mixed_7(Pool(cfg.last_pool)),
    }


class Features(NamedTuple):
    """f32: pool [batch, 2048]; spatial [batch, 2023]; logits [batch, class], without bias, for the Inception score."""

    pool: jax.Array
    spatial: jax.Array
    logits: jax.Array


class ConvRelu(nnx.Module):
    """[batch, row, col, channel] -> [batch, row, col, feature]."""

    def __init__(self, conv: Conv, channels: int, *, rngs: nnx.Rngs):
        sizes = dict(row=conv.rows, col=conv.cols, channel=channels, feature=conv.width)
        self.kernel = param("row col channel -> feature", sizes, uniform_fan_in, rngs)
        self.bias = param("-> feature", sizes, zeros, rngs)
        self.stride, self.padding = conv.stride, conv.padding

    def __call__(self, x: jax.Array) -> jax.Array:
        # Full precision on every device: TPUs and recent GPUs would round to bf16 or TF32 and change the score.
        y = lax.conv_general_dilated(
            x,
            self.kernel[...],
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=lax.Precision.HIGHEST,
        )
        return jax.nn.relu(y + self.bias[...])


class Mixed(nnx.Module):
    """Runs branches on the same input and concatenates their channels."""

    def __init__(self, branches: Branches, channels: int, *, rngs: nnx.Rngs):
        self.branches = branches
        self.width = 0
        for branch in branches:
            inner = channels
            for step in branch:
                if isinstance(step, Pool):
                    continue
                convs = step if isinstance(step, tuple) else (step,)
                for conv in convs:
                    setattr(self, conv.name, ConvRelu(conv, inner, rngs=rngs))
                inner = sum(conv.width for conv in convs)
            self.width += inner

    def __call__(self, x: jax.Array) -> jax.Array:
        outputs = []
        for branch in self.branches:
            y = x
            for step in branch:
                y = self._step(step, y)
            outputs.append(y)
        return jnp.concatenate(outputs, -1)

    def _step(self, step: Step, x: jax.Array) -> jax.Array:
        if isinstance(step, Pool):
            return pool(x, step)
        if isinstance(step, tuple):
            return jnp.concatenate([self._step(conv, x) for conv in step], -1)
        return getattr(self, step.name)(x)


class Inception(nnx.Module):
    """Maps uint8 pictures [batch, height, width, 3] of any size to `Features`."""

    def __init__(self, cfg: InceptionConfig, *, rngs: nnx.Rngs):
        self.stem = Mixed(STEM, 3, rngs=rngs)
        self.blocks = tuple(blocks(cfg))
        width = self.stem.width
        for name, branches in blocks(cfg).items():
            block = Mixed(branches, width, rngs=rngs)
            setattr(self, name, block)
            width = block.width
        self.fc = Dense("feature -> class", {"feature": width, "class": cfg.classes}, bias=None, rngs=rngs)

    def __call__(self, images: jax.Array) -> Features:
        x = self.stem((legacy_bilinear(images, SIDE) - 128) / 128)
        for name in self.blocks:
            x = getattr(self, name)(x)
            if name == "Mixed_6d":  # its first channels are `mixed_6/conv` of the graph of 2015
                spatial = x[..., :CHANNELS].reshape(len(x), -1)
        pooled = x.mean((1, 2))
        with jax.default_matmul_precision("highest"):
            return Features(pooled, spatial, self.fc(pooled))


def pool(x: jax.Array, step: Pool) -> jax.Array:
    """Pools [batch, row, col, channel] 3x3."""
    window, strides, padding = (1, 3, 3, 1), (1, step.stride, step.stride, 1), "SAME" if step.stride == 1 else "VALID"
    if step.kind == "max":
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    total, count = (lax.reduce_window(y, 0.0, lax.add, window, strides, padding) for y in (x, ones))
    return total / count


def legacy_bilinear(images: jax.Array, side: int) -> jax.Array:
    """Resizes to [batch, side, side, channel] f32 like TensorFlow 1: no antialiasing, corner origin, edges clamped.

    The source of row i is i * (height / side), in f32; like TensorFlow it interpolates along columns, then along rows.
    """

    def source(size: int) -> tuple[np.ndarray, np.ndarray]:
        at = np.arange(side, dtype=np.float32) * (np.float32(size) / np.float32(side))
        low = at.astype(np.int32)
        return np.stack([low, np.minimum(low + 1, size - 1)]), at - low

    (top, bottom), down = source(images.shape[1])
    (left, right), across = source(images.shape[2])
    x = images.astype(jnp.float32)
    rows = x[:, :, left] + (x[:, :, right] - x[:, :, left]) * across[:, None]
    return rows[:, top] + (rows[:, bottom] - rows[:, top]) * down[:, None, None]
