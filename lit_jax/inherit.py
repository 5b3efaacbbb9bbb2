"""Which weights a LiT inherits from a DiT or a PixArt-Σ (LiT §3.3): all but self-attention, unless asked for more."""

from typing import Literal

from heirloom.common.errors import InputError
from heirloom.common.surgery.maps import FRESH, AxisMap, Fresh, first
from heirloom.common.surgery.plan import Maps, Plan
from lit_jax.dit import DitConfig
from lit_jax.pixart import PixArtConfig

Donors = DitConfig | PixArtConfig
Keep = Literal["none", "o", "v", "kv", "qkv", "qkvo", "q", "all"]
_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "out"}


SAME = ("channels", "patch", "width", "layers", "hidden")
OF_DIT = ("classes", "null_class")
OF_PIXART = ("cross_heads", "text_width", "text_tokens", "null_text")


def graft_attention(donor: Donors, student: Donors, keep: Keep = "none") -> Plan:
    """Make the plan from a DiT or a PixArt-Σ to a student of the same shape with other self-attention.

    keep: projections of self-attention that are inherited as well. The paper and its class-conditional code keep none,
    its text-to-image code "o"; "all" is for a donor with the same attention, such as a LiT of another resolution.
    Regrouping heads leaves each projection as it is, channel by channel; what the layer computes changes. Raises
    InputError when the shapes differ.
    """
    for name in (*SAME, *(OF_DIT if isinstance(student, DitConfig) else OF_PIXART)):
        if getattr(donor, name) != getattr(student, name):
            sizes = f"{getattr(student, name)}, the donor's {getattr(donor, name)}"
            raise InputError(f"the student's {name} is {sizes}: a LiT has its donor's shape")
    if keep == "all":
        return Plan((("**", {}),))
    regroup: dict[str, AxisMap] = {"head head_dim": first(student.width)}
    kept: list[tuple[str, Maps | Fresh]] = [
        (f"blocks/attn/{_PROJECTIONS[p]}/*", regroup) for p in (() if keep == "none" else keep)
    ]
    fresh = student.attention == "linear" and (student.filters != "none" or student.features.startswith("focused"))
    rest: list[tuple[str, Maps | Fresh]] = [("blocks/attn/**", FRESH)] if fresh or keep != "qkvo" else []
    return Plan((*kept, *rest, ("**", {})))
