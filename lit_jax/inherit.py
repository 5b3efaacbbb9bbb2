"""Which weights a LiT inherits from a DiT or PixArt-Sigma (LiT §3.3): all but self-attention, whose projections are
optional.
"""

from typing import Literal

from heirloom.common.errors import InputError
from heirloom.common.surgery.maps import FRESH, AxisMap, Fresh, first
from heirloom.common.surgery.plan import Maps, Plan
from lit_jax.dit import DitConfig
from lit_jax.pixart import PixArtConfig

Keep = Literal["none", "o", "v", "kv", "qkv", "qkvo", "q", "all"]
_SHAPE = ("channels", "patch", "width", "layers", "hidden")  # fields that donor and student share
_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "out"}


def graft_attention(donor: DitConfig | PixArtConfig, student: DitConfig | PixArtConfig, keep: Keep = "none") -> Plan:
    """Make the plan from a DiT or PixArt to a student of the same shape with other self-attention.

    keep: projections of self-attention that are inherited as well. The paper and its class-conditional code keep none,
    its text-to-image code "o" (cross-attention is always inherited); "all" is for a donor with the same attention, such
    as a LiT of another resolution. Regrouping heads leaves each projection as it is, channel by channel; what the layer
    computes changes. Raises InputError when the shapes differ.
    """
    if type(donor) is not type(student):
        kinds = {DitConfig: "class-conditional", PixArtConfig: "text-conditional"}
        given = f"the student is {kinds[type(student)]}, the donor {kinds[type(donor)]}"
        raise InputError(f"{given}: both must be class-conditional or both text-conditional")
    if isinstance(student, DitConfig):
        shape = (*_SHAPE, "classes", "null_class")
    else:
        shape = (*_SHAPE, "text_width", "cross_heads")
    for name in shape:
        if getattr(donor, name) != getattr(student, name):
            sizes = f"{getattr(student, name)}, the donor's {getattr(donor, name)}"
            raise InputError(f"the student's {name} is {sizes}: a LiT has its donor's shape")
    if isinstance(student, PixArtConfig) and isinstance(donor, PixArtConfig) and donor.span != student.span:
        spans = f"positions up to {student.span:g}, the donor's up to {donor.span:g}"
        raise InputError(f"the student has {spans}: set student.interpolation to {student.grid / donor.span:g}")
    if keep == "all" and student.attention == donor.attention == "linear" and donor.features != student.features:
        raise InputError(f"student.features is {student.features!r}, the donor's {donor.features!r}: set it to this")
    if keep == "all":
        return Plan((("**", {}),))
    regroup: dict[str, AxisMap] = {"head head_dim": first(student.width)}
    kept: list[tuple[str, Maps | Fresh]] = [
        (f"blocks/attn/{_PROJECTIONS[p]}/*", regroup) for p in (() if keep == "none" else keep)
    ]
    fresh = student.attention == "linear" and (student.filters != "none" or student.features.startswith("focused"))
    rest: list[tuple[str, Maps | Fresh]] = [("blocks/attn/**", FRESH)] if fresh or keep != "qkvo" else []
    return Plan((*kept, *rest, ("**", {})))
