"""A small residual convnet: the teacher of the demo and the benchmark, for which no pretrained classifier exists."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from heirloom.common.checkpoint.family import Family
from heirloom.common.errors import InputError, positive
from heirloom.common.nn.conv import Conv
from heirloom.common.nn.dense import Dense, Init, normal
from heirloom.common.nn.norm import GroupNorm
from heirloom.common.surgery.axes import Spec
from heirloom.common.surgery.report import count
from heirloom.common.typed import from_json
from learngene.formats import finite
from learngene.inputs import sidecars

GROUPS, EPS = 8, 1e-5


def he(key: jax.Array, shape: tuple[int, ...], fan_in: int, fan_out: int) -> jax.Array:
    """He initialisation: N(0, 2 / fan_in)."""
    return (2 / fan_in) ** 0.5 * jax.random.normal(key, shape)


@dataclass(frozen=True)
class ConvConfig:
    """Config of the convnet: stages of residual blocks; each but the first halves the resolution."""

    size: int = 32
    """Side of the input, pixels."""
    widths: tuple[int, ...] = (32, 64, 128)
    """Channels of each stage, multiples of 8."""
    blocks: int = 2
    """Residual blocks in each stage."""
    classes: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        positive(self, "size", "classes", "widths")
        positive(self, "blocks", most=1000)
        if not self.widths or any(width % GROUPS for width in self.widths):
            raise InputError(f"widths is {self.widths}: give one or more multiples of {GROUPS}")


class Residual(nnx.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), with a 1 x 1 convolution on the skip where shapes differ."""

    def __init__(self, in_channels: int, width: int, stride: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(in_channels, groups=GROUPS, eps=EPS, rngs=rngs)
        self.conv1 = Conv(in_channels, width, stride=stride, init=he, rngs=rngs)
        self.norm2 = GroupNorm(width, groups=GROUPS, eps=EPS, rngs=rngs)
        self.conv2 = Conv(width, width, init=he, rngs=rngs)
        changes = (in_channels, stride) != (width, 1)
        self.past = Conv(in_channels, width, size=1, stride=stride, init=he, rngs=rngs) if changes else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(self.norm1(x))
        skip = x if self.past is None else self.past(y)
        return skip + self.conv2(jax.nn.relu(self.norm2(self.conv1(y))))


class ConvNet(nnx.Module):
    """Convnet classifier: normalised images [batch, size, size, 3] f32 to class logits [batch, classes] f32."""

    def __init__(self, cfg: ConvConfig, *, rngs: nnx.Rngs):
        self.stem = Conv(3, cfg.widths[0], init=he, rngs=rngs)
        in_channels = [cfg.widths[0], *cfg.widths]
        self.blocks = nnx.List(
            Residual(in_channels[stage] if first else width, width, 2 if stage and first else 1, rngs=rngs)
            for stage, width in enumerate(cfg.widths)
            for first in [True, *[False] * (cfg.blocks - 1)]
        )
        self.norm = GroupNorm(cfg.widths[-1], groups=GROUPS, eps=EPS, rngs=rngs)
        init: Init = normal(0.02)
        self.head = Dense("channel -> class", {"channel": cfg.widths[-1], "class": cfg.classes}, init=init, rngs=rngs)

    def __call__(self, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(jax.nn.relu(self.norm(x)).mean((1, 2))).astype(jnp.float32)


def parameters(spec: Spec) -> dict[str, int]:
    """Count the parameters."""
    return {"total": count(spec, "**")}


def macs(cfg: ConvConfig, spec: Spec) -> int:
    """Multiply-accumulates of one image: each kernel times the positions of its output."""
    total = spec["stem/kernel"].count * cfg.size**2 + spec["head/kernel"].count
    for path, leaf in spec.items():
        if path.startswith("blocks/") and path.endswith("/kernel"):
            stage = int(path.split("/")[1]) // cfg.blocks
            side = -(-cfg.size // 2**stage)
            total += leaf.count * side**2
    return total


FAMILY = Family("convnet", ConvNet, partial(from_json, ConvConfig), (), sidecars, finite, parameters, macs)
