"""A T5 with int8 kernels: its error, and the encoder that reads it layer by layer."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from qwix import QArray

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.checkpoint.family import Found
from heirloom.common.checkpoint.quantization import quantize_folder
from heirloom.common.checkpoint.weights import write_config, write_params
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from lit_jax.text.encoder import Row, TextEncoder
from lit_jax.text.layouts import FAMILY, FIRST, FORMATS, GATE, TABLE
from lit_jax.text.t5 import T5Config, T5Encoder
from lit_jax.text.verify import features, inputs

CFG = T5Config(vocabulary=96, width=64, layers=3, heads=4, head_dim=16, hidden=128)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A weights folder in float32, and the same in int8."""
    wide, small = (tmp_path_factory.mktemp("t5") / name for name in ("wide", "small"))
    wide.mkdir()
    write_params(wide, jax.device_get(functional(T5Encoder, CFG).init(jax.random.key(0))))
    write_config(wide, FAMILY.name, CFG)
    check = quantize_folder(open_donor(wide, [FAMILY]), small)
    assert check.max_error < 0.05 and check.cosine > 0.999
    return wide, small


def test_the_features_of_a_check_are_those_of_the_model(folders):
    values = open_donor(folders[0], [FAMILY]).source.values
    tokens, mask = inputs(CFG)
    expected = functional(T5Encoder, CFG).apply({k: np.asarray(v) for k, v in values.items()}, tokens, mask)
    np.testing.assert_allclose(features(CFG, values)[0], np.asarray(expected)[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("resident", [False, True])
def test_the_encoder_keeps_int8_layers_and_computes_what_the_model_does(folders, resident):
    encoder = TextEncoder(folders[1], SimpleNamespace(vocabulary=96), 64, resident=resident, cache=None)
    row = list(range(3, 20))
    (found,) = encoder._compute([Row(tuple(row), len(row))], None)
    layer = encoder._layers._read(1, 0)
    assert isinstance(layer["mlp/up/kernel"], QArray) and layer["attn/out/kernel"].qvalue.dtype == np.int8
    values = {k: np.asarray(v) for k, v in open_donor(folders[1], [FAMILY]).source.values.items()}
    expected = functional(T5Encoder, CFG).apply(values, np.array([row], np.int32), np.ones((1, 17), bool))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("sign", [f"{FIRST}.q.weight.absmax", f"{FIRST}.q.SCB"])
def test_a_t5_of_bitsandbytes_is_named_before_its_sizes_are_compared(sign, tmp_path):
    tensors = dict.fromkeys((f"{FIRST}.q.weight", GATE, TABLE, sign), np.zeros((128, 1), np.uint8))
    with pytest.raises(InputError, match="a quantised T5: take the checkpoint that was quantised, in bfloat16 or"):
        FORMATS[0].read_config(Found(tensors, tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"d_kv": 64, "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(InputError, match=r"quantization_config is \{'load_in_4bit': True\}; take the checkpoint that"):
        FORMATS[0].read_config(Found(tensors, tmp_path))
