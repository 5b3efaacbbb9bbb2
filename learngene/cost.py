"""Compute the savings of a gene by formula: stored parameters, pre-training, total; and each one's assumptions."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from rich.console import Console
from rich.table import Table

from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.axes import Spec
from heirloom.common.vit.model import Vit, VitConfig, macs, parameters
from learngene.zoo import auxiliary, vit

SCRATCH_EPOCHS, TUNE_EPOCHS = 100, 5  # of every descendant, as implied by the published ratios
AUX_EPOCHS = {"s": 150, "b": 100}  # released


def parse_depths(text: str) -> tuple[int, ...]:
    """Parse depths such as `6-15` or `4,6,8`. Raises InputError for anything else."""
    try:
        if "-" in text:
            low, high = (int(part) for part in text.split("-"))
            found = tuple(range(low, high + 1))
        else:
            found = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"depths is {text!r}: write 6-15, or 4,6,8") from error
    if not found or min(found) < 1:
        raise InputError(f"depths is {text!r}: give depths of 1 or more, the lower one first")
    return found


def count(cfg: VitConfig) -> int:
    """Number of stored parameters."""
    one = parameters(_of_one_block(cfg.of_depth(1)))
    return one["total"] + (cfg.layers - 1) * one["blocks"]


def forward_macs(cfg: VitConfig) -> int:
    """Multiply-accumulates of the forward pass of one picture."""
    repeated = replace(cfg, gene="sws", layers=1, layout=(cfg.depth,))
    return macs(repeated, _of_one_block(cfg.of_depth(1)))


@cache
def _of_one_block(cfg: VitConfig) -> Spec:
    return functional(Vit, cfg).spec


def ratios(size: str, depths: Sequence[int]) -> dict[str, float]:
    """The three published ratios for one size, and the ratio of total training in pictures times MACs."""
    gene, models = auxiliary(size), [vit(size, depth) for depth in depths]
    n, aux = len(depths), AUX_EPOCHS[size]
    each = [forward_macs(model) for model in models]
    before, tuning = SCRATCH_EPOCHS * sum(each), TUNE_EPOCHS * sum(each)
    return {
        "storage": sum(map(count, models)) / count(gene),
        "models": sum(map(count, models)),
        "gene": count(gene),
        "pre_training": n * SCRATCH_EPOCHS / 100,
        "pre_training_released": n * SCRATCH_EPOCHS / aux,
        "total_training": n * SCRATCH_EPOCHS / (100 + n * TUNE_EPOCHS),
        "total_training_released": n * SCRATCH_EPOCHS / (aux + n * 10),
        "total_training_macs": before / (100 * forward_macs(gene) + tuning),
    }


def report(depths: Sequence[int]) -> dict[str, Any]:
    """Print the ratios for S and B, and return them."""
    found = {size: ratios(size, depths) for size in AUX_EPOCHS}
    table = Table(box=None, pad_edge=False)
    for header in (f"depths {depths[0]} to {depths[-1]}, {len(depths)} models", "S", "B", "assumptions"):
        table.add_column(header, justify="right" if header in "SB" else "left")
    n = len(depths)
    millions = {size: f"{r['models'] / 1e6:.2f} M over {r['gene'] / 1e6:.3f} M" for size, r in found.items()}
    assumptions = {
        "storage": (
            f"all {n} models kept, or one gene file with stem, norm and head: {millions['s']} (S), {millions['b']} (B)"
        ),
        "pre_training": "100 epochs for each model, 100 for the gene; the teacher's training not counted",
        "pre_training_released": "the same, with the released 150 epochs of Aux-S and 100 of Aux-B",
        "total_training": f"and {TUNE_EPOCHS} epochs of tuning for each model; an epoch costs the same at every depth",
        "total_training_released": "the released 150 and 100 epochs for the gene, 10 of tuning",
        "total_training_macs": "100 and 5 epochs, weighted by the MACs of an epoch: the auxiliary net has 16 layers",
    }
    for name, why in assumptions.items():
        cells = (f"{found[size][name]:.{1 if name == 'storage' else 2}f}x" for size in found)
        table.add_row(name.replace("_", " "), *cells, why)
    console = Console()
    console.print(table)
    shared = "any method with a gene of this size and these epochs has the same"
    console.print(f"no ratio is specific to SWS: {shared}", soft_wrap=True)
    return {"depths": list(depths), **found}
