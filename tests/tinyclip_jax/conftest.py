"""CLIPs small enough for a test, and the checkpoints that transformers and open_clip wrote."""

from pathlib import Path

import jax
import numpy as np
import pytest

from heirloom.common.nn.functional import functional
from tinyclip_jax.model import Clip, ClipConfig, ImageConfig, TextConfig
from tinyclip_jax.zoo import FAMILY

GOLDENS = Path(__file__).parents[1] / "golden" / "clip"


@pytest.fixture(scope="session")
def goldens():
    """The folder of small foreign checkpoints."""
    return GOLDENS


@pytest.fixture(scope="session")
def families():
    return [FAMILY]


@pytest.fixture(scope="session")
def cfg():
    """Heads of 8, unlike towers: 3 and 2 layers, widths 32 and 24."""
    image = ImageConfig(size=16, patch=8, width=32, layers=3, heads=4, hidden=48, activation="quick_gelu")
    return ClipConfig(
        image,
        TextConfig(context=10, vocab=40, width=24, layers=2, heads=3, hidden=40, activation="quick_gelu"),
        joint=12,
    )


@pytest.fixture(scope="session")
def model(cfg):
    return functional(Clip, cfg)


@pytest.fixture(scope="session")
def draw():
    """`draw(spec, seed)`: parameters far from their initial values, so that no bias or scale is idle."""

    def draw(spec, seed=0):
        rng = np.random.default_rng(seed)
        out = {}
        for path, leaf in spec.items():
            noise = rng.normal(size=leaf.shape).astype(np.float32)
            if path == "logit_scale":
                noise = np.array(2.5, np.float32)
            elif path.endswith("norm/scale"):
                noise = 1 + 0.2 * noise
            elif path.endswith("kernel"):
                noise *= 1.5 * leaf.extent("read") ** -0.5
            elif path.endswith("bias"):
                noise *= 0.2
            out[path] = noise
        return out

    return draw


@pytest.fixture(scope="session")
def params(model, draw):
    return draw(model.spec)


@pytest.fixture(scope="session")
def images(cfg):
    return np.random.default_rng(1).normal(size=(4, cfg.image.size, cfg.image.size, 3)).astype(np.float32)


@pytest.fixture(scope="session")
def tokens(cfg):
    """Captions of 3, 5, 8 and 10 tokens; the end of text is the largest id, what follows is 0."""
    rng = np.random.default_rng(2)
    out = np.zeros((4, cfg.text.context), np.int32)
    for row, length in zip(out, (3, 5, 8, 10), strict=True):
        row[: length - 1] = rng.integers(1, cfg.text.vocab - 1, length - 1)
        row[length - 1] = cfg.text.vocab - 1
    return out


@pytest.fixture(scope="session")
def features(model, params, images, tokens):
    return jax.jit(model.apply)(params, images, tokens)
