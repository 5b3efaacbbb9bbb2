"""Reading a compiled module: collectives, counted as often as their loop runs."""

from common.compile import Topology, advice, collectives
from lit_jax.train import Config

MODULE = """\
HloModule jit_step

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %x = f32[4,128]{1,0:T(8,128)} all-gather(%y), dimensions={0}
  %s = (f32[2,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%z), dimensions={0}
  %d = f32[16,8]{1,0} all-gather-done(%s)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %r = (f32[256]{0}, bf16[8]{0}) all-reduce(%a, %b), to_apply=%add
}
"""


def test_collectives_of_a_loop_count_as_often_as_it_runs():
    assert collectives(MODULE) == {
        "all-gather": {"count": 24, "bytes": 12 * (4 * 128 * 4 + 16 * 8 * 4)},
        "all-reduce": {"count": 1, "bytes": 256 * 4 + 8 * 2},
    }


def test_advice_names_flags():
    assert advice(Config()) == "--student.remat full or --mesh.fsdp 8"


def test_chips_are_named_as_the_compiler_names_them():
    assert Topology.parse("v5e:16x16").chip.hbm == 16 * 2**30
