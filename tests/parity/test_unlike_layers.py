"""Pruned ViTs and ResNets written for torch compute there what they compute here."""

import numpy as np
import pytest

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.nn.functional import functional
from tinyclip_jax.model import Clip, ClipConfig, ImageConfig, TextConfig
from tinyclip_jax.pretrained import Pretrained
from tinyclip_jax.resnet import ResNetConfig
from tinyclip_jax.zoo import FAMILY

pytestmark = pytest.mark.parity

pytest.importorskip("torch")

TEXT = TextConfig(context=8, vocab=40, width=19, layers=2, heads=(1, 0), hidden=(5, 0), head_dim=64)
MODELS = {
    "pruned": ClipConfig(
        ImageConfig(size=16, patch=8, width=23, layers=3, heads=(2, 0, 1), hidden=(7, 3, 9), head_dim=64),
        TEXT,
        joint=12,
    ),
    "resnet": ClipConfig(ResNetConfig(size=64, width=4, blocks=(1, 2, 1, 1), heads=2), TEXT, joint=12),
}


@pytest.mark.parametrize("format", ["original", "open_clip"])
@pytest.mark.parametrize("name", MODELS)
def test_torch_computes_the_same(name, format, tmp_path):
    cfg = MODELS[name]
    model, rng = functional(Clip, cfg), np.random.default_rng(0)
    params = {}
    for path, leaf in model.spec.items():
        value = rng.normal(0.5 if path.endswith(("scale", "variance")) else 0.0, 0.2, leaf.shape)
        value = np.abs(value) + 0.2 if path.endswith("variance") else value
        params[path] = np.where(leaf.filled(), value, 0).astype(np.float32) if leaf.ragged else value.astype(np.float32)
    Pretrained(cfg, model, params, Preprocess(cfg.image.size), None).save(tmp_path / "ours")
    check = convert(open_donor(tmp_path / "ours", [FAMILY]), tmp_path / "theirs", format)
    assert check.passed and check.reference and check.max_error < 1e-4
    assert open_donor(tmp_path / "theirs", [FAMILY]).cfg == cfg
