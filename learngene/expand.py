"""Expand a gene to a ViT of any depth (SWS §4, TLEG): one map along `layer`, the rest copied, resized or fresh."""

from collections.abc import Sequence
from typing import Literal

from heirloom.common.errors import InputError
from heirloom.common.notebook.modules import make_callable
from heirloom.common.surgery.maps import FRESH, AxisMap, first, matrix, pick, resize
from heirloom.common.surgery.plan import Maps, Plan
from heirloom.common.vit.model import OPTIONS, VitConfig
from heirloom.common.vit.stages import layer_map, linear_coefficients, unrolled_map

__all__ = ["Head", "expansion", "grid_maps", "layer_map", "other_rules", "resized", "unrolled_map"]

Head = Literal["inherit", "fresh"]
_BEHIND = ("pooler", "joint")  # of parts behind the pooling, which a student may go without


def expansion(gene: VitConfig, student: VitConfig, layers: Sequence[int] = (), head: Head = "inherit") -> Plan:
    """Plan from a gene to an ordinary ViT.

    layers: the stage of each layer, for SWS. By default the layout of the auxiliary net if the student has its depth,
    so that both compute the same, else `layer_map`. Raises InputError when gene and student do not fit together.
    """
    if gene.gene == student.gene and gene.layers == student.layers and not layers:
        return resized(gene, student, first(gene.layers), head)  # the same gene, for further training
    if student.gene != "none":
        kind = f"a gene ({student.gene}) of {student.layers} blocks"
        raise InputError(f"the student is {kind}: its donor must be one of the same kind and number of blocks")
    if gene.gene == "none":
        plain = f"an ordinary ViT of {gene.layers} layers, not a gene"
        raise InputError(f"the donor is {plain}: choose another method: select, stack, interlace, ...")
    if gene.gene == "tleg":
        if layers:
            raise InputError("the layers of a TLEG gene are linear in depth: leave the map of layers empty")
        return resized(gene, student, matrix(linear_coefficients(student.layers)), head)
    layout = unrolled_map(gene.layout)
    rows = list(layers) or (layout if student.layers == len(layout) else layer_map(student.layers, gene.layers))
    if len(rows) != student.layers:
        raise InputError(f"the map has {len(rows)} layers, the student {student.layers}: give one stage for each layer")
    if invalid := [row for row in rows if not 0 <= row < gene.layers]:
        raise InputError(f"the map names stage {invalid[0]}: choose stages 0 to {gene.layers - 1} of the gene")
    return resized(gene, student, pick(rows), head)


def resized(donor: VitConfig, student: VitConfig, layer: AxisMap, head: Head) -> Plan:
    """Plan between ViTs that differ in depth, input size and classes: `layer` maps the blocks, positions are resampled.

    The head is fresh if the number of classes differs, if it reads other features (pool cls+mean), or if `head` is
    "fresh". A student may go without the donor's pooler and projection. Raises InputError when channels, patches or
    widths differ.
    """
    for name in ("channels", "patch", "width", "hidden", *OPTIONS):
        left_out = name in _BEHIND and not getattr(student, name)
        if getattr(donor, name) != getattr(student, name) and not left_out:
            sizes = f"{getattr(student, name)}, the donor's {getattr(donor, name)}"
            may = "only depth, size and classes may differ"
            raise InputError(f"the student's {name} is {sizes}: {may}; set the same {name}, or use the method select")
    if donor.heads != student.heads and (donor.qk_norm or donor.inner_norms):
        needed = "heads must be equal, or the norms inside the attention cannot be inherited"
        raise InputError(f"the student's heads is {student.heads}, the donor's {donor.heads}: {needed}")
    heads: Maps = {} if donor.heads == student.heads else {"head head_dim": first(student.width)}
    blocks = ("blocks/**", {"layer": layer, **heads})
    return Plan((("position", grid_maps(donor, student)), blocks, *other_rules(donor, student, head)))


def other_rules(donor: VitConfig, student: VitConfig, head: Head) -> tuple[tuple[str, Maps], ...]:
    """Rules for everything but positions and blocks."""
    reads_two = [cfg.pool == "cls+mean" for cfg in (donor, student)]
    fresh = head == "fresh" or donor.classes != student.classes or reads_two[0] != reads_two[1]
    heads = ("**head/*", FRESH) if fresh else ("**head/*", {})
    return (heads, ("**", {})) if student.classes else (("**", {}),)  # type: ignore[return-value]


def grid_maps(donor: VitConfig, student: VitConfig) -> Maps:
    """Maps that resample the positions to another number of patches, as torch does (bicubic, a = -0.75)."""
    if donor.grid == student.grid:
        return {}
    (rows, columns), (to_rows, to_columns) = donor.grid, student.grid
    return {"grid_row": resize(rows, to_rows), "grid_col": resize(columns, to_columns)}


make_callable(__name__, "learngene.pretrained:expand")
