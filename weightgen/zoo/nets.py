"""The networks that zoos are made of: small enough that thousands train at once under `vmap`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from heirloom.common.errors import InputError, positive
from heirloom.common.nn.dense import Dense, param, uniform_fan_in, zeros
from heirloom.common.nn.functional import Functional, functional
from heirloom.common.nn.precision import add, product

Kind = Literal["head", "mlp", "cnn"]


@dataclass(frozen=True)
class NetConfig:
    """A network of a zoo."""

    kind: Kind = "head"
    """head: one linear layer on features; mlp: one hidden layer on features; cnn: the small CNN of the public model
    zoos.
    """
    features: int = 64
    """Inputs of a head or an mlp; channels of the pictures of a cnn."""
    hidden: int = 16
    """Hidden units of an mlp."""
    classes: int = 5

    def __post_init__(self) -> None:
        positive(self, "features", "hidden", "classes")


class Head(nnx.Module):
    """A linear classifier that starts at zero. x: [..., feature]; returns logits [..., class]."""

    def __init__(self, cfg: NetConfig, *, rngs: nnx.Rngs):
        self.out = Dense("feature -> class", {"feature": cfg.features, "class": cfg.classes}, init=zeros, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(x)


class SmallMlp(nnx.Module):
    """feature -> hidden -> class with ReLU; 64-16-5 has 1,125 parameters. x: [..., feature]."""

    def __init__(self, cfg: NetConfig, *, rngs: nnx.Rngs):
        sizes = {"feature": cfg.features, "hidden": cfg.hidden, "class": cfg.classes}
        self.up = Dense("feature -> hidden", sizes, bias=uniform_fan_in, rngs=rngs)
        self.out = Dense("hidden -> class", sizes, bias=uniform_fan_in, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jax.nn.relu(self.up(x)))


class SmallConv(nnx.Module):
    """A valid convolution. x: [batch, row, col, in_channels].

    It multiplies patches by a matrix: under `vmap` over networks that is a batched matmul, where XLA's own would be a
    grouped convolution, many times slower on a CPU.
    """

    def __init__(self, in_channels: str, out_channels: str, sizes: Mapping[str, int], size: int, *, rngs: nnx.Rngs):
        axes = f"row col {in_channels} -> {out_channels}"
        self.kernel = param(axes, {**sizes, "row": size, "col": size}, uniform_fan_in, rngs)
        self.bias = param(f"-> {out_channels}", sizes, uniform_fan_in, rngs, fan_in=size**2 * sizes[in_channels])
        self.size = size

    def __call__(self, x: jax.Array) -> jax.Array:
        rows, cols = (n - self.size + 1 for n in x.shape[1:3])
        shifts = [(i, j) for i in range(self.size) for j in range(self.size)]
        patches = jnp.stack([x[:, i : i + rows, j : j + cols] for i, j in shifts], axis=3)
        kernel = self.kernel[...].reshape(self.size**2, *self.kernel.shape[2:])
        return add(product("brcti,tio->brco", patches, kernel), self.bias[...])


class SmallCnn(nnx.Module):
    """The CNN of the public model zoos: 2,464 parameters at one channel, 2,864 at three. x: [batch, 28, 28, channel].

    conv 5x5 to 8, pool, conv 5x5 to 6, pool, conv 2x2 to 4, then 36 -> 20 -> classes.
    """

    def __init__(self, cfg: NetConfig, *, rngs: nnx.Rngs):
        sizes = {"channel": cfg.features, "first": 8, "second": 6, "third": 4}
        sizes |= {"cell": 9, "hidden": 20, "class": cfg.classes}
        self.conv1 = SmallConv("channel", "first", sizes, size=5, rngs=rngs)
        self.conv2 = SmallConv("first", "second", sizes, size=5, rngs=rngs)
        self.conv3 = SmallConv("second", "third", sizes, size=2, rngs=rngs)
        self.up = Dense("cell third -> hidden", sizes, bias=uniform_fan_in, rngs=rngs)
        self.out = Dense("hidden -> class", sizes, bias=uniform_fan_in, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(_pool(self.conv1(x)))
        x = jnp.tanh(_pool(self.conv2(x)))
        x = jnp.tanh(self.conv3(x))
        return self.out(jnp.tanh(self.up(x.reshape(len(x), -1, x.shape[-1]))))


def _pool(x: jax.Array) -> jax.Array:
    """Max-pool by 2 x 2."""
    n, row, col, channel = x.shape
    return x.reshape(n, row // 2, 2, col // 2, 2, channel).max((2, 4))


MODULES: dict[str, Any] = {"head": Head, "mlp": SmallMlp, "cnn": SmallCnn}


def net(cfg: NetConfig) -> Functional:
    """Build the network as functions of a flat tree. Raises InputError for an unknown kind."""
    if cfg.kind not in MODULES:
        raise InputError(f"no network {cfg.kind!r} (there are {', '.join(MODULES)})")
    return functional(MODULES[cfg.kind], cfg)


@cache
def _predictor(cfg: NetConfig, at_once: int) -> Any:
    apply = net(cfg).apply
    return jax.jit(
        lambda params, x: jax.lax.map(lambda m: apply(*m).argmax(-1), (params, x), batch_size=at_once or len(x))
    )


def predict(cfg: NetConfig, params: Mapping[str, Any], x: ArrayLike, at_once: int = 0) -> np.ndarray:
    """Predict the class of each network's own examples, [member, example] int32. x: [member, example, ...]."""
    return np.asarray(_predictor(cfg, at_once)(params, x))
