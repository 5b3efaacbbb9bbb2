"""Low-rank adapters in one form."""

import numpy as np
import pytest

from heirloom.common.errors import InputError
from weightgen.zoo.lora import Adapter, canon, canonical_tensors


@pytest.mark.parametrize(("read", "written"), [(20, 12), (20, 2), (3, 12)])
def test_an_adapter_has_one_form(read, written, rng):
    down, up = rng.standard_normal((4, read)), rng.standard_normal((written, 4))
    first = canon(Adapter(down, up))
    np.testing.assert_allclose(first.up @ first.down, up @ down, atol=1e-10)
    assert first.up.shape == up.shape and first.down.shape == down.shape
    np.testing.assert_allclose(first.up.T @ first.up, first.down @ first.down.T, atol=1e-10)  # balanced
    for seed in range(5):
        r = np.random.default_rng(seed).standard_normal((4, 4))
        other = canon(Adapter(np.linalg.inv(r) @ down, up @ r))
        np.testing.assert_allclose(other.up, first.up, atol=1e-8)
        np.testing.assert_allclose(other.down, first.down, atol=1e-8)


def test_adapters_of_a_checkpoint(rng):
    tensors = {
        "m.q.lora_A.weight": rng.standard_normal((2, 6)),
        "m.q.lora_B.weight": rng.standard_normal((5, 2)),
        "m.scale": np.ones(1),
    }
    fixed = canonical_tensors(tensors)
    np.testing.assert_allclose(
        fixed["m.q.lora_B.weight"] @ fixed["m.q.lora_A.weight"],
        tensors["m.q.lora_B.weight"] @ tensors["m.q.lora_A.weight"],
    )
    assert fixed["m.scale"] is tensors["m.scale"]
    with pytest.raises(InputError, match="only lora_A"):
        canonical_tensors({"m.q.lora_A.weight": tensors["m.q.lora_A.weight"]})
