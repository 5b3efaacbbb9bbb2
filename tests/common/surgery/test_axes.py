import re

import numpy as np
import pytest

from heirloom.common.errors import InputError
from heirloom.common.surgery.axes import Axes, Leaf, assign, matches, select

PATHS = [
    "image/blocks/attn/query/kernel",
    "image/blocks/attn/query/bias",
    "image/cls",
    "text/token/table",
    "logit_scale",
]


@pytest.mark.parametrize(
    ("text", "sides"),
    [
        ("layer embed -> head head_dim", "stack read write write"),
        ("embed -> embed", "read write"),
        ("-> embed", "write"),
        ("embed ->", "read"),
        ("layer embed", "stack carry"),
        ("embed", "carry"),
        ("layer -> embed", "stack write"),
        ("member layer embed -> hidden", "stack stack read write"),
        ("grid_row grid_col -> embed", "read read write"),
        ("", ""),
    ],
)
def test_notation_round_trips_and_gives_the_sides(text, sides):
    axes = Axes.parse(text)
    assert str(axes) == text
    assert axes.sides == tuple(sides.split())
    assert axes.names == tuple(text.replace("->", "").split())
    assert Axes.parse(str(axes)) == axes


def test_one_name_may_stand_once_on_each_side_but_not_twice_on_one():
    assert Axes.parse("embed -> embed").where("read", "write") == (0, 1)
    for text in ("embed embed", "embed embed -> hidden", "-> head head"):
        with pytest.raises(ValueError, match="is used twice on one side"):
            Axes.parse(text)


@pytest.mark.parametrize("text", ["embed layer", "embed layer -> hidden", "embed -> layer", "layer embed member"])
def test_stacking_axes_come_first(text):
    with pytest.raises(ValueError, match="must come first"):
        Axes.parse(text)


def test_stacked_puts_an_axis_in_front():
    assert str(Axes.parse("embed -> hidden").stacked()) == "layer embed -> hidden"
    assert str(Axes.parse("embed").stacked()) == "layer embed"
    assert Axes.parse("embed").stacked() == Axes.parse("layer embed")


def test_leaf_knows_its_extents_and_prints_its_sizes(leaf):
    query = leaf("layer embed -> head head_dim", 12, 768, 10, 64)
    assert str(query) == "layer=12 embed=768 -> head=10 head_dim=64"
    assert (query.extent("read"), query.extent("write"), query.extent("stack")) == (768, 640, 12)
    assert query.count == 12 * 768 * 640
    assert query.nbytes == 4 * query.count
    assert leaf("embed", 8, dtype="float16").nbytes == 16


def test_a_scalar_leaf_has_no_first_axis_and_one_element(leaf):
    scalar = leaf("")
    assert (scalar.layered, scalar.count, str(scalar)) == (False, 1, "scalar")
    assert leaf("layer embed", 2, 3).layered
    assert not leaf("embed", 3).layered


def test_ragged_leaf_counts_true_elements_only():
    up = Leaf(Axes.parse("layer embed -> hidden"), (3, 4, 8), np.dtype("float32"), {"hidden": (8, 5, 0)})
    assert up.count == 4 * (8 + 5 + 0)
    out = Leaf(Axes.parse("layer head head_dim -> embed"), (2, 3, 2, 4), np.dtype("float32"), {"head": (3, 1)})
    assert out.count == 3 * 2 * 4 + 1 * 2 * 4


def test_leaf_refuses_a_shape_of_another_rank(leaf):
    with pytest.raises(ValueError, match=re.escape("axes 'embed -> hidden' name 2 dimensions, the shape (3,) has 1")):
        leaf("embed -> hidden", 3)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("image/**", "image/blocks/attn/query/kernel", True),
        ("image/*", "image/blocks/attn/query/kernel", False),
        ("image/*", "image/cls", True),
        ("**", "logit_scale", True),
        ("**/kernel", "image/blocks/attn/query/kernel", True),
        ("**kernel", "image/kernel_norm", False),
        ("image/**/query/*", "image/blocks/attn/query/bias", True),
        ("*_scale", "logit_scale", True),
        ("logit.scale", "logit_scale", False),  # a dot is a dot
        ("image", "image/cls", False),
        ("", "", True),
    ],
)
def test_globs(pattern, path, expected):
    assert matches(pattern, path) is expected


def test_select_keeps_order_and_refuses_a_pattern_without_effect():
    assert select("image/**", reversed(PATHS)) == [
        "image/cls",
        "image/blocks/attn/query/bias",
        "image/blocks/attn/query/kernel",
    ]
    with pytest.raises(InputError) as error:
        select("image/clss", PATHS)
    assert str(error.value) == "pattern 'image/clss' matches no parameter; did you mean 'image/cls'?"
    with pytest.raises(InputError) as error:
        select("zzz", PATHS)
    assert str(error.value) == "pattern 'zzz' matches no parameter"


def test_assign_gives_each_path_its_first_pattern():
    found = assign(["image/cls", "image/**", "text/**", "*"], PATHS)
    assert found == dict(zip(PATHS, [1, 1, 0, 2, 3], strict=True))


def test_assign_is_total_and_names_the_uncovered_leaf():
    with pytest.raises(InputError) as error:
        assign(["image/**", "text/**"], PATHS)
    assert str(error.value) == "logit_scale: no rule covers this parameter (rules: image/**, text/**)"
    with pytest.raises(InputError, match=r"^image/cls: no rule covers this parameter; did you mean 'image/class'\?"):
        assign(["image/class", "**/bias"], ["image/class", "image/cls", "image/bias"])


def test_assign_refuses_an_idle_pattern():
    with pytest.raises(
        InputError, match="pattern 'text/tokens/table' matches no parameter; did you mean 'text/token/table'"
    ):
        assign(["text/tokens/table", "**"], PATHS)


def test_assign_refuses_a_pattern_that_stands_behind_a_wider_one():
    with pytest.raises(InputError) as error:
        assign(["image/**", "image/cls", "**"], PATHS)
    assert (
        str(error.value)
        == "pattern 'image/cls' has no effect: 'image/**' comes first and covers image/cls; put 'image/**' after it"
    )
