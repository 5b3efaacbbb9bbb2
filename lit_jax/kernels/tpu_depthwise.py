"""The depthwise branch on TPUs (Mosaic): [head, batch, head_dim, token] with the tokens of an image along the lanes.

A tap is a rotation of the lanes and a mask at the border. Columns are shifted first, then rows, so that a window of 5 x
5 needs 10 rotations, not 25.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
CHANNELS = (32, 16, 8)  # at a time
MOST = 16384  # tokens
ROOM = 32 * 4096  # elements of an image block; more would not fit into 16 MiB together with its shifted copies


def depthwise(
    v: jax.Array, weight: jax.Array, bias: jax.Array | None, onto: jax.Array, grid: tuple[int, int]
) -> jax.Array:
    """Compute onto + convolution of v, in the dtype of `onto`.

    v, onto: [head, batch, head_dim, token]; weight: [row, col, channel]; bias: [channel].
    """
    call = _Call(v, weight, grid)
    (out,) = call(
        partial(_convolve, grid, (weight.shape[0], weight.shape[1])),
        "depthwise",
        [call.pad(v), call.pad(onto)],
        [jax.ShapeDtypeStruct(call.pad(onto).shape, onto.dtype)],
        _bank(weight, bias),
    )
    return out[..., : v.shape[-1]]


def depthwise_gradients(
    v: jax.Array, weight: jax.Array, grad: jax.Array, onto: jax.Array, grid: tuple[int, int]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute onto + gradient of v, in the dtype of `onto`; and the gradients of weight and bias, summed over the
    batch, in f32.
    """
    call = _Call(v, weight, grid)
    rows, cols, channels = weight.shape  # of all heads
    dv, dbank = call(
        partial(_gradients, grid, (rows, cols)),
        "depthwise_gradients",
        [call.pad(v), call.pad(grad), call.pad(onto)],
        [
            jax.ShapeDtypeStruct(call.pad(onto).shape, onto.dtype),
            jax.ShapeDtypeStruct((channels, rows * cols + 1), jnp.float32),
        ],
        _bank(weight, None),
    )
    return dv[..., : v.shape[-1]], dbank[:, :-1].T.reshape(weight.shape), dbank[:, -1]


def _bank(weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Pack weight and bias: [channel, taps + 1] f32, the taps in raster order, then the bias."""
    channels = weight.shape[-1]
    column = jnp.zeros((channels, 1), jnp.float32) if bias is None else bias.astype(jnp.float32)[:, None]
    return jnp.concatenate([weight.astype(jnp.float32).reshape(-1, channels).T, column], axis=1)


class _Call:
    """The grid that both kernels share: channel tiles outside, the batch inside, so that sums over the batch stay in
    one block.
    """

    def __init__(self, v: jax.Array, weight: jax.Array, grid: tuple[int, int]):
        self.heads, self.batch, self.channels, tokens = v.shape
        self.tokens = -(-tokens // LANES) * LANES
        self.size = next(size for size in CHANNELS if size * self.tokens <= ROOM and self.channels % size == 0)
        place = jnp.arange(self.tokens, dtype=jnp.int32)[None]
        self.places = [place // grid[1], place % grid[1]]

    def pad(self, x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0),) * 3 + ((0, self.tokens - x.shape[-1]),)) if x.shape[-1] < self.tokens else x

    def __call__(
        self, kernel: Any, name: str, images: list[jax.Array], results: list[jax.ShapeDtypeStruct], bank: jax.Array
    ) -> Any:
        parts = self.channels // self.size
        image = pl.BlockSpec((None, None, self.size, self.tokens), lambda h, c, b: (h, b, c, 0))
        taps = pl.BlockSpec((self.size, bank.shape[1]), lambda h, c, b: (h * parts + c, 0))
        place = pl.BlockSpec((1, self.tokens), lambda h, c, b: (0, 0))
        return pl.pallas_call(
            kernel,
            grid=(self.heads, parts, self.batch),
            in_specs=[place, place, taps, *[image] * len(images)],
            out_specs=[image, taps][: len(results)],
            out_shape=results,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            name=name,
        )(*self.places, bank, *images)


def _convolve(
    grid: tuple[int, int], window: tuple[int, int], rows: Any, cols: Any, bank: Any, v: Any, onto: Any, out: Any
) -> None:
    x = v[...].astype(jnp.float32)
    shifted = [_shift(x, dx, cols[...], grid[1], 1) for dx in _reach(window[1])]
    total = onto[...].astype(jnp.float32) + bank[:, -1:]
    for i, dy in enumerate(_reach(window[0])):
        taps = bank[:, i * window[1] : (i + 1) * window[1]]
        line: Any = sum(taps[:, j : j + 1] * image for j, image in enumerate(shifted))
        total = total + _shift(line, dy, rows[...], grid[0], grid[1])
    out[...] = total.astype(out.dtype)


def _gradients(
    grid: tuple[int, int],
    window: tuple[int, int],
    rows: Any,
    cols: Any,
    bank: Any,
    v: Any,
    grad: Any,
    onto: Any,
    dv: Any,
    dbank: Any,
) -> None:
    x, g = v[...].astype(jnp.float32), grad[...].astype(jnp.float32)
    lines = [_shift(g, -dy, rows[...], grid[0], grid[1]) for dy in _reach(window[0])]
    total, sums = onto[...].astype(jnp.float32), []
    for j, dx in enumerate(_reach(window[1])):
        taps = [bank[:, i * window[1] + j :][:, :1] for i in range(window[0])]
        image: Any = sum(tap * line for tap, line in zip(taps, lines, strict=True))
        total = total + _shift(image, -dx, cols[...], grid[1], 1)
        shifted = _shift(x, dx, cols[...], grid[1], 1)
        sums.append([(line * shifted).sum(1, keepdims=True) for line in lines])
    dv[...] = total.astype(dv.dtype)

    column = jax.lax.broadcasted_iota(jnp.int32, dbank.shape, 1)
    found = jnp.where(column == window[0] * window[1], g.sum(1, keepdims=True), 0)
    for j, of_rows in enumerate(sums):
        for i, value in enumerate(of_rows):
            found = jnp.where(column == i * window[1] + j, value, found)
    first = pl.program_id(2) == 0
    dbank[...] = found + jnp.where(first, 0, dbank[...])


def _reach(size: int) -> range:
    return range(-(size // 2), size // 2 + 1)


def _shift(x: jax.Array, by: int, place: jax.Array, extent: int, stride: int) -> jax.Array:
    """Return x[n + by * stride], zero outside the image."""
    if by == 0:
        return x
    turned = pltpu.roll(x, -by * stride % x.shape[1], 1)
    return jnp.where((place + by >= 0) & (place + by < extent), turned, 0.0)
