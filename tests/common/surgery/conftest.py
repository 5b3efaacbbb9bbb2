"""Leaves and donors small enough to check by hand."""

from pathlib import Path

import numpy as np
import pytest

from heirloom.common.surgery.axes import Axes, Leaf
from heirloom.common.surgery.plan import Source


def make_leaf(axes: str, *shape: int, dtype: str = "float32") -> Leaf:
    return Leaf(Axes.parse(axes), shape, np.dtype(dtype))


@pytest.fixture(scope="session")
def leaf():
    return make_leaf


@pytest.fixture(scope="session")
def donor():
    """`donor({"path": ("axes", shape)}, seed)`: a source of seeded normal numbers."""

    def make(leaves: dict[str, tuple[str, tuple[int, ...]]], seed: int = 0) -> Source:
        rng = np.random.default_rng(seed)
        spec = {path: make_leaf(axes, *shape) for path, (axes, shape) in leaves.items()}
        return Source(spec, {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in spec.items()})

    return make


@pytest.fixture(scope="session")
def golden():
    """`golden(name)`: arrays that another library computed, from tests/golden."""
    return lambda name: np.load(Path(__file__).parents[2] / "golden" / name)
