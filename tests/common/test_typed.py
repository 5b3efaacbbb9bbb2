"""Our own JSON: built with the right types, or refused in one line that names file, field and value."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pytest

from heirloom.common.errors import InputError
from heirloom.common.typed import from_json


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Other:
    blocks: tuple[int, ...] = (3,)


@dataclass(frozen=True)
class Outer:
    width: int
    rate: float = 0.5
    name: Literal["a", "b"] = "a"
    flag: bool = False
    heads: int | tuple[int, ...] = 4
    end: int | None = None
    tower: Inner | Other = field(default_factory=Inner)
    free: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.width < 1:
            raise InputError(f"width is {self.width}: choose 1 or more")


@pytest.mark.parametrize(
    "cfg",
    [Outer(3), Outer(3, 1.0, "b", True, (4, 5), 7, Other((1, 2)), {"x": [1]}), Outer(3, tower=Inner((), (0.25, 2.0)))],
)
def test_what_was_written_comes_back(cfg):
    import json

    assert from_json(Outer, json.loads(json.dumps(asdict(cfg)))) == cfg


def test_a_whole_number_may_stand_for_a_fraction_and_lists_become_tuples():
    got = from_json(Outer, {"width": 3, "rate": 1, "tower": {"sizes": [4], "pair": [1, 2]}})
    assert got.rate == 1.0 and isinstance(got.rate, float) and got.tower == Inner((4,), (1.0, 2.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"config\.json is \[\], not an object"),
        ({}, r"config\.json: the field 'width' is missing"),
        ({"widht": 3}, r"config\.json: there is no field 'widht'; did you mean 'width'"),
        ({"width": "3"}, r"config\.json: width is '3', and must be a whole number"),
        ({"width": 3.0}, "width is 3.0, and must be a whole number"),
        ({"width": True}, "width is True, and must be a whole number"),
        ({"width": None}, "width is None, and must be a whole number"),
        ({"width": 10**30}, "width is 1000000.* and must be a whole number"),
        ({"width": 0}, r"config\.json: width is 0: choose 1 or more"),
        ({"width": 3, "rate": float("nan")}, "rate is nan, and must be a finite number"),
        ({"width": 3, "rate": 1e39}, r"rate is 1e\+39, and must be a finite number \(in float32\)"),
        ({"width": 3, "rate": "x"}, "rate is 'x', and must be a finite number"),
        ({"width": 3, "name": "c"}, "name is 'c'.* it is one of a, b"),
        ({"width": 3, "name": ["a"]}, r"name is \['a'\]; it is one of a, b"),
        ({"width": 3, "flag": 1}, "flag is 1, and must be true or false"),
        ({"width": 3, "heads": "4"}, "heads is '4', and must be a whole number"),
        ({"width": 3, "heads": [4, None]}, "heads is .*, and must be a whole number"),
        ({"width": 3, "tower": 3}, "tower is 3, not an object"),
        ({"width": 3, "tower": {"pair": [1]}}, r"tower: pair is \[1\], and must be a list of 2"),
        ({"width": 3, "tower": {"blocks": {}}}, r"tower: blocks is {}, and must be a list"),
        ({"width": 3, "free": []}, r"free is \[\], not an object"),
    ],
)
def test_anything_else_is_refused_in_one_line(values, message):
    with pytest.raises(InputError, match=message) as error:
        from_json(Outer, values)
    assert "\n" not in str(error.value)
