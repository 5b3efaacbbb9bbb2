"""Decoding tile by tile: every pixel once, no seam, one tile's memory."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.errors import InputError
from heirloom.common.nn.conv import Conv
from heirloom.common.nn.functional import functional
from lit_jax.autoencoder_layouts import FAMILY
from lit_jax.decode import tile_side
from lit_jax.tiles import decode_tiled

GOLDEN = Path(__file__).parents[1] / "golden" / "autoencoder"


@pytest.fixture(scope="module")
def donor():
    return open_donor(GOLDEN, [FAMILY])


@pytest.fixture(scope="module")
def params(donor):
    return {path: np.asarray(view) for path, view in donor.source.values.items()}


@pytest.fixture(scope="module")
def decode(donor, params):
    return partial(jax.jit(partial(donor.model.apply, method="decode")), params)


class Local(nnx.Module):
    """A decoder that sees one position: each becomes 4 x 4 pixels."""

    def __init__(self, cfg, *, rngs):
        self.mix = Conv(4, 3, size=1, rngs=rngs)

    def decode(self, latents):
        return self.mix(latents.repeat(4, 1).repeat(4, 2))


@pytest.mark.parametrize(("tile", "overlap"), [(1, 0), (3, 1), (4, 3), (5, 2), (8, 0), (9, 4), (99, 50)])
def test_tiles_cover_every_pixel_with_weight_one(tile, overlap):
    model = functional(Local, None)
    params = model.init(jax.random.key(0))
    latents = np.random.default_rng(0).normal(size=(2, 9, 14, 4)).astype(np.float32)
    got = jax.jit(partial(decode_tiled, model, tile=tile, overlap=overlap))(params, latents)
    np.testing.assert_allclose(got, model.apply(params, latents, method="decode"), atol=1e-6)


@pytest.fixture(scope="module")
def tiled(donor, params):
    def tiled(latents, tile, overlap):
        return np.asarray(jax.jit(partial(decode_tiled, donor.model, tile=tile, overlap=overlap))(params, latents))

    return tiled


@pytest.fixture(scope="module")
def smooth():
    """Latents [1, 32, 40, 4] of a few waves."""
    row, col = np.mgrid[:32, :40][..., None] / 12
    phase = np.arange(4)
    return np.float32(np.sin(row + phase) + np.cos(col * (1 + phase / 4) - row))[None]


def test_one_tile_is_the_whole_decode_to_the_bit(decode, tiled, smooth):
    np.testing.assert_array_equal(tiled(smooth, 40, 8), np.asarray(decode(smooth)))


def test_tiles_approach_the_whole_decode_as_they_grow(decode, tiled, smooth):
    """GroupNorm and attention see a tile only, so a small random model differs; wider tiles and overlaps less and
    less.
    """
    whole = np.asarray(decode(smooth))
    errors = [
        float(np.abs(tiled(smooth, tile, overlap) - whole).mean())
        for tile, overlap in ((8, 0), (16, 8), (24, 12), (36, 32))
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * np.abs(whole).mean(), errors


@pytest.mark.parametrize("kind", ["smooth", "constant"])
def test_there_is_no_seam(kind, decode, tiled, smooth):
    """What tiling changes jumps no more where a tile begins or ends than anywhere else; without overlap it does,
    threefold.
    """
    latents = smooth if kind == "smooth" else np.broadcast_to(smooth[:, :1, :1], smooth.shape)
    whole = np.asarray(decode(latents))

    def jumps(overlap, starts):
        change = np.abs(np.diff(tiled(latents, 20, overlap) - whole, axis=2)).mean((0, 1, 3))
        seams = sorted({4 * s - 1 for s in starts[1:]} | {4 * (s + 20) - 1 for s in starts[:-1]})
        return change[seams].max() / np.delete(change, seams).mean()

    assert jumps(5, (0, 10, 20)) < 1.0
    assert jumps(0, (0, 20)) > 1.8


def test_tiles_that_do_not_advance_are_refused(donor, params, smooth):
    with pytest.raises(InputError, match="tiles of 8 cannot overlap by 8: choose an overlap from 0 to 7"):
        decode_tiled(donor.model, params, smooth, 8, 8)


def test_memory_is_that_of_one_tile(donor, params):
    """48 x 48 latents in 9 tiles of 20: what the compiler sets aside, the picture itself left out, falls with the
    area.
    """
    latents = jax.ShapeDtypeStruct((1, 48, 48, 4), np.float32)
    functions = (partial(donor.model.apply, method="decode"), partial(decode_tiled, donor.model, tile=20, overlap=6))
    whole, tiled = (jax.jit(f).lower(params, latents).compile().memory_analysis().temp_size_in_bytes for f in functions)
    assert tiled - 4 * 3 * (4 * 48) ** 2 < 0.3 * whole, (tiled, whole)


def test_the_fewest_tiles_that_are_not_too_large():
    """Latents of 640 px are decoded whole; 1024 px take 2 x 2 tiles of 72, 2048 px 4 x 4 of 76."""
    assert [tile_side(n) for n in (3, 64, 80, 81, 128, 256, 512)] == [80, 80, 80, 49, 72, 76, 78]
