"""A small convolutional teacher."""


import jax
import numpy as np
import pytest

from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from learngene.convnet import ConvConfig, ConvNet, macs


def test_a_convnet_halves_pictures_and_counts_its_work():
    cfg = ConvConfig(size=8, widths=(8, 16), blocks=2, classes=3)
    model = functional(ConvNet, cfg)
    logits = jax.jit(model.apply)(model.init(jax.random.key(0)), np.ones((2, 8, 8, 3), np.float32))
    assert logits.shape == (2, 3)
    first = 64 * (3 * 8 * 9 + 4 * 8 * 8 * 9)
    second = 16 * (8 * 16 * 9 + 8 * 16 + 3 * 16 * 16 * 9)
    assert macs(cfg, model.spec) == first + second + 16 * 3
    with pytest.raises(InputError, match="multiples of 8"):
        ConvConfig(widths=(12,))
