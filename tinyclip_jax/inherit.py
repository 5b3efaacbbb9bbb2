"""Manual weight inheritance (TinyCLIP §3.3; weight_inherit.py) as a plan: every step-th layer, leading channels and heads."""

from typing import Literal

from common.errors import InputError
from common.surgery.maps import FRESH, Pick, even, every, first, resize
from common.surgery.plan import Maps, Plan
from tinyclip_jax.model import ClipConfig, ImageConfig, TextConfig

DepthRule = Literal["interval", "even"]
_DEPTH = {"interval": every, "even": even}


def pick_layers(source: int, target: int, rule: DepthRule = "interval") -> list[int]:
    """The donor's layers a student of `target` layers takes: 12 -> 9 is the first nine by the released rule.

    Raises InputError when the donor is too shallow.
    """
    return _layers(source, target, rule).rows.tolist()


def manual(teacher: ClipConfig, student: ClipConfig, depth_rule: DepthRule = "interval") -> Plan:
    """The plan from a donor to a student no larger than it in any direction.

    Both towers are cut alike; the similarity scale is not inherited, as in the released code. `depth_rule="even"` spreads
    the layers. An image tower of another resolution has its position grid resampled.
    """
    return Plan(
        (
            ("logit_scale", FRESH),
            ("image/position", _grid(teacher.image, student.image)),
            ("image/**", _tower(teacher.image, student.image, depth_rule)),
            ("text/**", _tower(teacher.text, student.text, depth_rule)),
        )
    )


def _tower(teacher: ImageConfig | TextConfig, student: ImageConfig | TextConfig, rule: DepthRule) -> Maps:
    for name in ("width", "heads", "hidden"):
        if getattr(student, name) > getattr(teacher, name):
            sizes = f"{getattr(student, name)} exceeds the donor's {getattr(teacher, name)}"
            raise InputError(f"the student's {name} {sizes}: nothing to cut from")
    return {
        "layer": _layers(teacher.layers, student.layers, rule),
        "embed": first(student.width),
        "head": first(student.heads),
        "hidden": first(student.hidden),
    }


def _grid(teacher: ImageConfig, student: ImageConfig) -> Maps:
    maps: dict[str, Pick] = {"embed": first(student.width)}
    if teacher.grid == student.grid:
        return maps
    grid = resize(teacher.grid, student.grid)
    return maps | {"grid_row": grid, "grid_col": grid}


def _layers(source: int, target: int, rule: DepthRule) -> Pick:
    if not 0 < target <= source:
        raise InputError(f"the student has {target} layers, the donor {source}: choose between 1 and {source}")
    return _DEPTH[rule](source, target)
