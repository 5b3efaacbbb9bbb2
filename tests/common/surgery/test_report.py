"""Counting and telling: numbers by hand."""

import io

import pytest
from rich.console import Console

from heirloom.common.errors import InputError
from heirloom.common.surgery.axes import Axes, Leaf
from heirloom.common.surgery.maps import FRESH, first
from heirloom.common.surgery.plan import Plan
from heirloom.common.surgery.report import attention_macs, count, kernel_macs, provenance, table, totals


@pytest.fixture
def spec(leaf):
    return {
        "blocks/query/kernel": leaf("layer embed -> head head_dim", 2, 8, 3, 4),
        "blocks/query/bias": leaf("layer -> head head_dim", 2, 3, 4),
        "token/table": leaf("vocab -> embed", 100, 8),
        "position": leaf("position -> embed", 5, 8),
        "projection/kernel": leaf("embed -> joint", 8, 6),
    }


def test_count_by_pattern(spec):
    assert count(spec, "**") == 2 * 8 * 12 + 2 * 12 + 800 + 40 + 48
    assert count(spec, "blocks/**") == 216
    with pytest.raises(InputError, match="'block/\\*\\*' matches no parameter"):
        count(spec, "block/**")


def test_trap_lookups_and_position_tables_cost_no_macs(spec):
    """They have arrows like kernels, and would add 840 multiplications a position."""
    assert kernel_macs(spec, (("blocks/**", 5), ("projection/**", 1))) == {
        "blocks/query/kernel": 5 * 192,
        "projection/kernel": 48,
    }


def test_every_kernel_must_be_told_its_positions(spec):
    with pytest.raises(InputError, match="projection/kernel: no rule covers"):
        kernel_macs(spec, (("blocks/**", 5),))


def test_attention_counts_scores_and_values(spec):
    # 2 layers x 3 heads x 5 tokens x 5 tokens x 4 dimensions, once for the scores and once for the values
    assert attention_macs(spec["blocks/query/kernel"], 5) == 2 * (2 * 3 * 5 * 5 * 4)


def test_ragged_heads_count_what_is_there(leaf):
    ragged = Leaf(Axes.parse("layer embed -> head head_dim"), (2, 8, 3, 4), leaf("").dtype, {"head": (3, 1)})
    assert attention_macs(ragged, 5) == 2 * ((3 + 1) * 5 * 5 * 4)
    assert kernel_macs({"q/kernel": ragged}, (("**", 1),)) == {"q/kernel": 8 * 4 * 4}


def test_provenance_holds_source_maps_and_fraction(leaf, donor):
    source = donor({"a": ("embed", (8,)), "b": ("embed", (8,)), "c": ("", ())})
    resolution = Plan((("a", {"embed": first(6)}), ("b", FRESH))).resolve(
        source, {"a": leaf("embed", 6), "b": leaf("embed", 2)}
    )
    assert provenance(resolution) == {
        "fraction": 0.75,
        "parameters": {
            "a": {"source": "a", "maps": "embed: first 6", "rule": "a", "fraction": 1.0},
            "b": {"source": None, "maps": "fresh", "rule": "b", "fraction": 0.0},
        },
        "unused": ["b", "c"],
    }


def test_table_has_a_row_per_parameter(spec, leaf, donor):
    plain = table(spec)
    assert [column.header for column in plain.columns] == ["parameter", "axes", "count"]
    assert list(plain.columns[0].cells) == list(spec)
    assert list(plain.columns[2].cells)[:3] == ["192", "24", "800"]
    source = donor({"a": ("embed", (8,))})
    record = provenance(Plan((("a", {"embed": first(6)}),)).resolve(source, {"a": leaf("embed", 6)}))
    told = table({"a": leaf("embed", 6)}, record)
    assert [list(c.cells) for c in told.columns] == [["a"], ["embed=6\n100%: embed: first 6"], ["6"]]


def test_paths_are_whole_in_80_columns(leaf):
    path = "image/blocks/attn/query/kernel"
    record = {"parameters": {path: {"fraction": 0.5, "maps": "layer: first 8, embed: first 128, head: first 12"}}}
    out = io.StringIO()
    wide = table({path: leaf("layer embed -> head head_dim", 8, 1152, 16, 72)}, record)
    Console(file=out, width=80).print(wide)
    lines = out.getvalue().splitlines()
    assert lines[1].startswith(f"{path}  layer=8 embed=1152") and lines[1].endswith(f"{8 * 1152 * 16 * 72:,}")
    assert max(map(len, lines)) <= 80 and "50%: layer: first 8, embed: first" in out.getvalue()


def test_totals():
    counts = {"image": 61_411_200, "token_table": 25_296_896, "total": 115_382_145}
    assert totals(counts, 5_341_000_000) == (
        "115,382,145 parameters, 5.34 GMACs (image 61,411,200, token table 25,296,896)"
    )
    assert totals({"total": 21}, 0) == "21 parameters, 0.00 GMACs"
