"""DiTs small enough for a test."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode

from heirloom.common.checkpoint import weights
from heirloom.common.cli import main
from heirloom.common.nn.functional import functional
from lit_jax.dit import Dit, DitConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "dit"
# `heirloom train lit/smoke`, six steps on emoji.
SIZES = [f"--student.{name}" for name in ("size=8", "width=16", "hidden=32", "layers=2", "heads=2")]
SHORT = ["--pipeline.batch=8", "--steps=6", "--log-every=1", "--eval-every=3", "--save-every=2", "--optim.warmup=2"]
DATA = ["--samples=2", "--sample.steps=2", "--data.path=emoji:noto", "--held-out.path=emoji:noto"]
TINY = [*SIZES, *SHORT, *DATA]


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
    return (
        rng.standard_normal((3, 8, 8, 3)).astype(np.float32),
        np.array([0, 17, 903], np.int32),
        np.array([2, 0, 5], np.int32),
    )


@pytest.fixture(scope="session")
def golden():
    """A small DiT of diffusers: its folder, and its own predictions."""
    return GOLDEN, dict(np.load(GOLDEN / "outputs.npz"))


@pytest.fixture(scope="module")
def donor(one_device, tmp_path_factory, draw):
    """A softmax DiT."""
    folder = tmp_path_factory.mktemp("donor") / "model"
    cfg = DitConfig(size=8, channels=3, patch=4, width=16, layers=2, heads=4, hidden=32, classes=9)
    folder.mkdir()
    weights.write_params(folder, draw(functional(Dit, cfg).spec))
    weights.write_config(folder, "lit", cfg)
    return str(folder)


@pytest.fixture(scope="module")
def distilled(donor, tmp_path_factory):
    """A LiT that inherits and is distilled."""
    run = tmp_path_factory.mktemp("lit") / "run"
    assert main(["train", "lit/smoke", "--run", str(run), *TINY, "--donor", donor, "--teacher", donor]) == 0
    return run


class _Numpy:
    """numpy, whose matmul takes for transposed what the interpreter read untransposed."""

    def __init__(self):
        self.turned = threading.local()

    def __getattr__(self, name):
        return getattr(np, name)

    def matmul(self, *operands, dtype):
        a, b = (np.asarray(x, dtype) for x in operands)
        left, right = self.turned.flags
        return (a.T if left else a) @ (b.T if right else b)


@pytest.fixture
def interpreted_gpu(monkeypatch):
    """Kernels of GPUs run on the CPU; memory that nothing was written to is NaN.

    JAX's interpreter (up to 0.12.0) does not know transposed operands of a wgmma: they are told apart here, and read as
    stored.
    """
    numpy, wgmma = _Numpy(), gpu_callbacks.wgmma

    def with_transposes(*, a_transforms, b_transforms, **rest):
        kept = [
            tuple(t for t in given if type(t).__name__ != "TransposeTransform")
            for given in (a_transforms, b_transforms)
        ]
        numpy.turned.flags = [len(k) < len(given) for k, given in zip(kept, (a_transforms, b_transforms), strict=True)]
        return wgmma(a_transforms=kept[0], b_transforms=kept[1], **rest)

    monkeypatch.setattr(gpu_callbacks, "np", numpy)
    monkeypatch.setattr(gpu_callbacks, "wgmma", with_transposes)
    gpu_callbacks.reset_gpu_interpret_mode_state()
    with force_gpu_interpret_mode(InterpretGPUParams(uninitialized_memory="nan")):
        yield
