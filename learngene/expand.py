"""From a gene to a ViT of any depth (SWS §4, TLEG): one map along `layer`; everything else is copied, resized or fresh."""

from collections.abc import Sequence
from typing import Literal

from heirloom.common.errors import InputError
from heirloom.common.surgery.maps import FRESH, AxisMap, first, matrix, pick, resize
from heirloom.common.surgery.plan import Maps, Plan
from learngene.stages import layer_map, linear_coefficients, unrolled_map
from learngene.vit import VitConfig

__all__ = ["Head", "around", "expansion", "grid", "layer_map", "outside", "unrolled_map"]

Head = Literal["inherit", "fresh"]


def expansion(gene: VitConfig, student: VitConfig, layers: Sequence[int] = (), head: Head = "inherit") -> Plan:
    """The plan from a gene to an ordinary ViT.

    layers: the stage of each layer, for SWS; unless given, the auxiliary net's own layout where the depth is its depth, so that the
    descendant computes what it does, else `layer_map`. Raises InputError where the two do not belong together.
    """
    if gene.gene == student.gene and gene.layers == student.layers and not layers:
        return around(gene, student, first(gene.layers), head)  # the same model, to be trained on
    if student.gene != "none":
        raise InputError(f"the student is a gene ({student.gene}): only a gene of the same kind and number of blocks can start it")
    if gene.gene == "none":
        raise InputError(f"this is an ordinary ViT of {gene.layers} layers, not a gene; choose a method: select, stack, interlace, ...")
    if gene.gene == "tleg":
        if layers:
            raise InputError("TLEG's layers lie on a line: a gene of it takes no map")
        return around(gene, student, matrix(linear_coefficients(student.layers)), head)
    own = unrolled_map(gene.layout)
    rows = list(layers) or (own if student.layers == len(own) else layer_map(student.layers, gene.layers))
    if len(rows) != student.layers:
        raise InputError(f"the map names {len(rows)} layers, the student has {student.layers}: give one stage for each layer")
    if outside := [row for row in rows if not 0 <= row < gene.layers]:
        raise InputError(f"the map names stage {outside[0]}, the gene has 0 to {gene.layers - 1}")
    return around(gene, student, pick(rows), head)


def around(donor: VitConfig, student: VitConfig, layer: AxisMap, head: Head) -> Plan:
    """A plan for models that differ in depth, input size and classes: `layer` maps the blocks, positions are resampled.

    The head is inherited with the label set: not where the number of classes differs, nor where a fresh one is asked for.
    Raises InputError where channels, patches or widths differ.
    """
    for name in ("channels", "patch", "width", "hidden"):
        if getattr(donor, name) != getattr(student, name):
            sizes = f"{getattr(student, name)}, the donor's {getattr(donor, name)}"
            raise InputError(
                f"the student's {name} is {sizes}: depth, size and classes may differ, {name} may not (or select from a larger)"
            )
    heads: Maps = {} if donor.heads == student.heads else {"head head_dim": first(student.width)}
    return Plan((("position", grid(donor, student)), ("blocks/**", {"layer": layer, **heads}), *outside(donor, student, head)))


def outside(donor: VitConfig, student: VitConfig, head: Head) -> tuple[tuple[str, Maps], ...]:
    """The rules of what is neither position nor block."""
    fresh = head == "fresh" or donor.classes != student.classes
    heads = ("**head/*", FRESH) if fresh else ("**head/*", {})
    return (heads, ("**", {}))  # type: ignore[return-value]


def grid(donor: VitConfig, student: VitConfig) -> Maps:
    """Positions for another number of patches, resampled as torch does it (bicubic, a = -0.75)."""
    if donor.grid == student.grid:
        return {}
    return {"grid_row": resize(donor.grid, student.grid), "grid_col": resize(donor.grid, student.grid)}
