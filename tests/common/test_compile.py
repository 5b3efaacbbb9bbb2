"""What `heirloom compile` says without a compiler."""

from common.compile import Topology, advice
from lit_jax.train import Config


def test_advice_names_flags():
    assert advice(Config()) == "--student.remat full or --mesh.fsdp 8"


def test_chips_are_named_as_the_compiler_names_them():
    assert Topology.parse("v5e:16x16").chip.hbm == 16 * 2**30
