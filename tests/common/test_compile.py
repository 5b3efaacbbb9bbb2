"""What `heirloom compile` says without a compiler."""

import pytest

from heirloom.common import config
from heirloom.common.compile import Topology, advice
from heirloom.common.errors import InputError
from heirloom.common.mesh import start
from lit_jax.train import Config


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("pipeline.batch", "6", r"a batch of 6 cannot be divided into 8 parts"),
        ("student.implementation", "mosaic_gpu", "mosaic_gpu is a kernel for gpu, this is cpu: set it to xla"),
        ("student.window", "4", "filters of 4 x 4 tokens have no centre"),
    ],
)
def test_recipes_that_do_not_go_with_the_slice(flag, value, message):
    with pytest.raises(InputError, match=message):
        config.load("lit/smoke", [f"--{flag}", value]).abstract(start())


def test_advice_names_flags():
    assert advice(Config()) == "--student.remat full or --mesh.fsdp 8"


def test_chips_are_named_as_the_compiler_names_them():
    assert Topology.parse("v5e:16x16").chip.hbm == 15.75 * 2**30
