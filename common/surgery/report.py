"""Counts parameters and MACs from axes; reports the provenance of inherited weights as a table and as data."""

from collections.abc import Mapping, Sequence
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


def totals(counts: Mapping[str, int], macs: int) -> str:
    """Returns `3,406,977 parameters, 0.06 GMACs (image 1,678,208, text 942,336)`. counts: by part, and `total`."""
    parts = ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in counts.items() if name != "total")
    return f"{counts['total']:,} parameters, {macs / 1e9:.2f} GMACs{f' ({parts})' if parts else ''}"


def table(spec: Spec, provenance: Mapping[str, Any] | None = None) -> "Table":
    """Makes a rich table of the leaves: axes with sizes, count, and, with provenance, what each inherited."""
    from rich.table import Table

    out = Table(box=None, pad_edge=False)
    out.add_column("parameter", no_wrap=True)  # where the terminal is narrow, axes are broken and paths are not
    out.add_column("axes, and what is inherited" if provenance else "axes")
    out.add_column("count", justify="right", no_wrap=True)
    for path, leaf in spec.items():
        about = str(leaf)
        if provenance:
            line = provenance["parameters"][path]
            about += f"\n{line['fraction']:.0%}" + (f": {line['maps']}" if line["maps"] else "")
        out.add_row(path, about, f"{leaf.count:,}")
    return out


def print_model(
    spec: Spec,
    counts: Mapping[str, int],
    macs: int,
    provenance: Mapping[str, Any] | None = None,
    remarks: Sequence[str] = (),
) -> None:
    """Prints the counts, with provenance how much is inherited from where, further sentences, and the leaves."""
    from rich.console import Console

    console = Console()
    console.print(totals(counts, macs))
    if provenance:
        share, source = provenance["fraction"], provenance["source"]
        console.print(f"inherited {share:.1%} from {source}", markup=False, soft_wrap=True)
    for text in remarks:
        console.print(text, soft_wrap=True)
    console.print()
    console.print(table(spec, provenance))
