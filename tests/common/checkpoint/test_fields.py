"""Foreign JSON: right types are read, wrong ones and unknown fields are refused, with file and field named."""

import json

import pytest

from heirloom.common.checkpoint.fields import Fields
from heirloom.common.errors import InputError


def fields(**values):
    return Fields(values, "config.json")


def test_fields_are_read_with_their_types_and_defaults():
    read = fields(width=64, eps=1, act="gelu", bias=False, size=[32, 32], layers=[3, 4], none=None)
    assert (read.integer("width"), read.number("eps"), read.boolean("bias")) == (64, 1.0, False)
    assert (
        read.choice("act", {"gelu": "ours"}) == "ours"
        and read.square("size") == 32
        and read.integers("layers") == (3, 4)
    )
    assert (read.integer("heads", 12), read.number("none", None), read.integers("absent", None)) == (12, None, None)
    read.done()


@pytest.mark.parametrize(
    ("take", "value", "message"),
    [
        ("integer", "768", "width is '768', and must be a whole number"),
        ("integer", 768.0, "width is 768.0, and must be a whole number"),
        ("integer", True, "width is True, and must be a whole number"),
        ("integer", None, "width is None, and must be a whole number"),
        ("integer", [768], r"width is \[768\], and must be a whole number"),
        ("integer", 0, "width is 0, and must be from 1 to 16777216"),
        ("integer", 10**9, "width is 1000000000, and must be from 1 to"),
        ("number", float("nan"), "width is nan, and must be a finite number"),
        ("number", -1.0, "width is -1.0, and must be a finite number of at least 0"),
        ("number", 1e39, "and must be a finite number of at least 0"),
        ("number", 10**400, "and must be a finite number of at least 0"),
        ("number", "1e-5", "width is '1e-5', and must be a number"),
        ("boolean", 1, "width is 1, and must be true or false"),
        ("text", 3, "width is 3, and must be a string"),
        ("integers", [1, "2"], "must be a list of positive whole numbers"),
        ("integers", 3, "must be a list of positive whole numbers"),
        ("square", [32, 16], r"width is \[32, 16\]; only squares can be read"),
        ("square", {"height": 32, "width": 16}, "width is {'height': 32, 'width': 16}; only squares can be read"),
        ("square", {"height": 32}, "width: 'width' is missing"),
        ("square", {"height": 32, "width": 32, "depth": 3}, "width: the field 'depth'"),
        ("object", 3, "width is 3, not an object"),
    ],
)
def test_values_of_another_type_are_refused_in_one_line(take, value, message):
    with pytest.raises(InputError, match=message) as error:
        getattr(fields(width=value), take)("width")
    assert "\n" not in str(error.value) and str(error.value).startswith("config.json")


def test_a_square_is_read_from_its_height_and_width():
    assert fields(size={"height": 32, "width": 32, "shortest_edge": None}).square("size") == 32


def test_numbers_have_bounds_and_one_may_stand_for_all():
    read = fields(share=1.2, zero=0, mean=[0.5, 1, 2], std=[2], one=3, bad=[1, True, 1], two=[1, 2])
    assert read.numbers("mean", length=3) == (0.5, 1.0, 2.0) and read.numbers("std", length=3) == (2.0,) * 3
    assert read.numbers("one", length=3, above=0) == (3.0,) * 3 and read.numbers("none", (1.0, 2.0), length=2) == (
        1.0,
        2.0,
    )
    for take, message in (
        (
            lambda: read.number("share", above=0, most=1),
            "share is 1.2, and must be a finite number above 0 and at most 1",
        ),
        (lambda: read.number("zero", above=0), "zero is 0, and must be a finite number above 0"),
        (lambda: read.numbers("bad", length=3), r"bad is \[1, True, 1\], and must be 1 or 3 finite numbers"),
        (lambda: read.numbers("two", length=3), r"two is \[1, 2\], and must be 1 or 3 finite numbers"),
        (
            lambda: read.numbers("mean", length=3, above=0.5),
            r"mean is \[0.5, 1, 2\], and must be 1 or 3 finite numbers above 0.5",
        ),
    ):
        with pytest.raises(InputError, match=rf"^config\.json: {message}$"):
            take()


def test_defaults_take_the_place_of_null():
    read = fields(width=None, heads=3, depth=None).with_defaults({"width": 64, "heads": 12}, "add it")
    assert (read.integer("width"), read.integer("heads"), sorted(read)) == (64, 3, ["heads", "width"])
    with pytest.raises(InputError, match=r"^config\.json: 'depth' is missing; add it$"):
        read.integer("depth")


def test_an_unknown_field_is_compared_with_the_absent_ones():
    read = fields(witdh=64)
    read.integer("width", 32)
    with pytest.raises(
        InputError, match=r"may change what the model sees; remove it if it does not; did you mean 'width'\?$"
    ):
        read.done("what the model sees")


def test_a_missing_field_without_a_default_is_named():
    with pytest.raises(InputError, match=r"config\.json: 'width' is missing"):
        fields().integer("width")


def test_a_field_that_nobody_named_is_refused():
    read = fields(width=1, rope_theta=10_000.0, dropout=0.1)
    read.integer("width")
    read.skip("*dropout")
    with pytest.raises(
        InputError, match=r"the field 'rope_theta' \(10000.0\) is not known here and may change what the model computes"
    ):
        read.done()


def test_a_field_with_one_value_is_refused_with_any_other():
    fields().fixed("qkv_bias", True)
    fields(qkv_bias=True).fixed("qkv_bias", True)
    for value in (False, 1, None, "true"):
        with pytest.raises(InputError, match="only models where it is True can be read"):
            fields(qkv_bias=value).fixed("qkv_bias", True)


def test_fields_of_every_transformers_config_change_nothing_but_those_that_do():
    read = fields(
        _name_or_path="x", torch_dtype="float16", top_k=50, id2label={"0": "a"}, pruned_heads={}, is_decoder=False
    )
    read.transformers()
    read.done()
    with pytest.raises(InputError, match="pruned_heads"):
        fields(pruned_heads={"0": [1]}).transformers()
    quantised = fields(quantization_config={"bits": 4})
    quantised.transformers()
    with pytest.raises(InputError, match=r"'quantization_config'.*; take the checkpoint that was quantised"):
        quantised.done()


def test_a_choice_names_what_there_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"act": "gelo"}))
    with pytest.raises(
        InputError, match=r"config\.json: act is 'gelo'; did you mean 'gelu'\?; only 'gelu', 'relu' can be read"
    ):
        Fields.load(tmp_path / "config.json").choice("act", {"gelu": 1, "relu": 2})
