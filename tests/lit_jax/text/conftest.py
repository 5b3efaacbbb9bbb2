"""A small T5 encoder as the folder of a pipeline: text_encoder/ of ours and tokenizer/."""

import shutil
from pathlib import Path

import pytest

from heirloom.common.checkpoint import weights
from heirloom.common.nn.functional import functional
from lit_jax.text.t5 import T5Config, T5Encoder

TOKENIZER = Path(__file__).parents[2] / "golden" / "t5_tokenizer"
SMALL = T5Config(vocabulary=160, width=24, layers=3, heads=3, head_dim=4, hidden=20, buckets=8, max_distance=20)


@pytest.fixture(scope="session")
def small_t5(draw):
    """`(cfg, params)` of a small encoder far from its initial values."""
    return SMALL, draw(functional(T5Encoder, SMALL).spec)


@pytest.fixture
def pipeline(small_t5, tmp_path):
    """`pipeline(dtype)`: the folder of a pipeline with the encoder in this dtype, as a weights folder of ours."""

    def write(dtype="float32", params=None):
        cfg, drawn = small_t5
        encoder = tmp_path / dtype / "text_encoder"
        encoder.mkdir(parents=True)
        weights.write_params(encoder, params or drawn, dtype)
        weights.write_config(encoder, "t5", cfg)
        shutil.copytree(TOKENIZER, encoder.parent / "tokenizer")
        return encoder.parent

    return write
