"""Counts parameters and MACs from axes; reports the provenance of inherited weights as a table and as data."""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from heirloom.common.surgery.axes import Leaf, Spec, assign, select
from heirloom.common.surgery.plan import Resolution

if TYPE_CHECKING:
    from rich.table import Table


def count(spec: Spec, pattern: str) -> int:
    """Counts parameters (without padding) of the leaves that a glob matches. Raises InputError for none."""
    return sum(spec[path].count for path in select(pattern, spec))


def kernel_macs(spec: Spec, uses: Sequence[tuple[str, int]]) -> dict[str, int]:
    """Counts multiply-accumulates of each matmul: elements times the positions it is applied to.

    uses: (path glob, positions); the first match counts, every `kernel` needs one. Lookups (`table`) and position
    tables cost none.
    """
    kernels = [path for path in spec if path.rsplit("/", 1)[-1] == "kernel"]
    rule = assign([pattern for pattern, _ in uses], kernels)
    return {path: spec[path].count * uses[rule[path]][1] for path in kernels}


def attention_macs(query: Leaf, tokens: int) -> int:
    """Counts multiply-accumulates of attention's scores and values in all layers; causal attention in full."""
    return 2 * tokens**2 * query.count // prod(query.shape[i] for i in query.axes.where("read"))


def provenance(resolution: Resolution) -> dict[str, Any]:
    """Returns the content of `provenance.json`: each leaf's source, maps and fraction; the donor's unused leaves."""
    leaves = {
        line.path: {
            "source": line.origin or None,
            "maps": line.maps(),
            "rule": line.rule,
            "fraction": round(line.fraction, 6),
        }
        for line in resolution.lines
    }
    return {"fraction": round(resolution.fraction, 6), "parameters": leaves, "unused": list(resolution.unused)}


def table(spec: Spec, provenance: dict[str, Any] | None = None) -> "Table":
    """Makes a rich table of the leaves: axes with sizes, count, and, with provenance, what each inherited."""
    from rich.table import Table

    out = Table(box=None, pad_edge=False)
    for header in ("parameter", "axes", "count", *(("inherited", "how") if provenance else ())):
        out.add_column(header, justify="right" if header in ("count", "inherited") else "left")
    for path, leaf in spec.items():
        row = [path, str(leaf), f"{leaf.count:,}"]
        if provenance:
            line = provenance["parameters"][path]
            row += [f"{line['fraction']:.0%}", line["maps"]]
        out.add_row(*row)
    return out
