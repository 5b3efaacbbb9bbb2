"""DiTs small enough for a test."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lit_jax.dit import DitConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "dit"


@pytest.fixture(scope="session")
def cfg():
    """A softmax DiT: 4 x 4 patches, width 32, 4 heads, 3 layers, 5 classes."""
    return DitConfig(size=8, channels=3, patch=2, width=32, layers=3, heads=4, hidden=48, classes=5)


@pytest.fixture(scope="session")
def lit(cfg):
    """Its LiT with 2 heads."""
    return replace(cfg, attention="linear", heads=2)


@pytest.fixture(scope="session")
def batch(cfg):
    """Noisy inputs, times and labels (the last is none)."""
    rng = np.random.default_rng(1)
    return rng.standard_normal((3, 8, 8, 3)).astype(np.float32), np.array([0, 17, 903], np.int32), np.array([2, 0, 5], np.int32)


@pytest.fixture(scope="session")
def golden():
    """A small DiT of diffusers: its folder, and its own predictions."""
    return GOLDEN, dict(np.load(GOLDEN / "outputs.npz"))
