"""Reading a compiled module: collectives, each once, as often as their loop runs, with the bytes of whole arrays."""

import pytest

from heirloom.common.hlo import collectives


def module(main, *others):
    return "\n\n".join(["HloModule jit_step", *others, f"ENTRY %main (a: f32[4,8]) -> f32[] {{\n{main}\n}}"])


GATHER = "%ag = f32[32,8]{1,0:T(8,128)} all-gather(%p), channel_id=3, dimensions={0}, metadata={op_name=\"jit(f)/dot\"}"  # fmt: skip
FUSED = "\n\n".join(
    f"%fused.{i} (p: f32[4,8]) -> f32[32,8] {{\n  {GATHER}\n  ROOT %c = f32[32,8] copy(%ag)\n}}" for i in range(3)
)
BODY = "%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{\n  {}\n}}"
CONDITION = """\
%cond (p: (f32[4,8], s32[])) -> pred[] {
  %n = s32[]{:T(128)} constant(12)
  %p = (f32[4,8], s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}"""
LOOP = "  %w = (f32[4,8], s32[]) while(%t), condition=%cond, body=%body"
FROM_2 = "  %two = s32[] constant(2)\n  %start = s32[] copy(%two)\n  %t = (f32[4,8], s32[]) tuple(%a, %start)\n"


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        (module(LOOP + ', backend_config={"known_trip_count":{"n":"5"}}', BODY.format(GATHER), CONDITION), 5),
        (module(LOOP, BODY.format(GATHER), CONDITION), 12),
        (module(FROM_2 + LOOP, BODY.format(GATHER), CONDITION), 10),
        (module(LOOP, BODY.format(GATHER), CONDITION.replace("LT", "NE")), 1),
        (
            module(
                "\n".join(f"  %f.{i} = f32[32,8] fusion(%a), kind=kCustom, calls=%fused.{i}" for i in range(3)), FUSED
            ),
            1,
        ),
        (module(f"  {GATHER}\n{LOOP}", BODY.format(GATHER), CONDITION), 1 + 12),
        (
            module(
                "  %s = ((f32[4,8]), f32[32,8], u32[]) async-start(%a), calls=%fused.0\n"
                "  %u = ((f32[4,8]), f32[32,8], u32[]) async-update(%s), calls=%fused.0\n"
                "  %d = f32[32,8] async-done(%u), calls=%fused.0",
                FUSED.replace("channel_id=3, ", ""),
            ),
            1,
        ),
        (
            module(
                "  %c = f32[32,8] conditional(%i, %a, %a), branch_computations={%fused.0, %fused.1}",
                FUSED.replace("=3", "=4", 1),
            ),
            2,
        ),
    ],
    ids=["known", "condition", "start", "unknown", "fusions", "twice", "async", "branches"],
)
def test_a_gather_counts_as_often_as_it_is_done(text, counts):
    assert collectives(text) == {"all-gather": {"count": counts, "bytes": counts * 32 * 8 * 4}}


OPERANDS = "  %a = f32[128]{0} parameter(0)\n  %b = bf16[8,8]{1,0} parameter(1)\n"


@pytest.mark.parametrize(
    ("line", "kind", "moved"),
    [
        ("(f32[128], bf16[8,8]) all-reduce(%a, %b), to_apply=%add", "all-reduce", 640),
        ("(f32[128], bf16[8,8]) all-reduce-start(%a, %b), to_apply=%add", "all-reduce", 640),
        (
            "((f32[128], bf16[8,8]), (f32[512], bf16[32,8])) all-gather-start(%a, %b), dimensions={0}",
            "all-gather",
            2560,
        ),
        ("(f32[512]{0}, /*index=1*/bf16[32,8]) all-gather(%a, %b), dimensions={0}", "all-gather", 2560),
        ("f32[32]{0} reduce-scatter(%a), dimensions={0}, to_apply=%add", "reduce-scatter", 512),
        (
            "(f32[128], f32[128], u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1}}",
            "collective-permute",
            512,
        ),
        ("f32[128]{0} all-to-all(%a), dimensions={0}", "all-to-all", 512),
    ],
)
def test_bytes_are_of_whole_arrays(line, kind, moved):
    done = f"  %d = f32[128] {kind}-done(%x)"
    assert collectives(module(f"{OPERANDS}  %x = {line}\n{done}")) == {kind: {"count": 1, "bytes": moved}}
