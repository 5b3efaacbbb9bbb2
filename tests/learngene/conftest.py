"""ViTs and genes small enough for a test."""

from pathlib import Path

import numpy as np
import pytest

from heirloom.common.checkpoint import weights
from heirloom.common.nn.functional import functional
from heirloom.common.vit.model import Vit, VitConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "vit"


@pytest.fixture(scope="session")
def gene():
    """A gene of two blocks whose auxiliary net has five layers: 4 patches, width 16, 2 heads, 5 classes."""
    return VitConfig(size=8, patch=4, width=16, layers=2, heads=2, hidden=32, classes=5, gene="sws", layout=(2, 3))


@pytest.fixture(scope="session")
def images():
    return np.random.default_rng(1).standard_normal((3, 8, 8, 3)).astype(np.float32)


@pytest.fixture
def folder_of(tmp_path, draw):
    """`folder_of(cfg)`: a weights folder of ours with drawn parameters."""

    def write(cfg, name="ours", seed=0):
        folder = tmp_path / name
        folder.mkdir()
        weights.write_params(folder, draw(functional(Vit, cfg).spec, seed))
        weights.write_config(folder, "learngene", cfg)
        return folder

    return write


@pytest.fixture(scope="session")
def golden():
    """The folder of ViTs that timm and transformers wrote, and their logits."""
    return GOLDEN, dict(np.load(GOLDEN / "expected.npz"))
