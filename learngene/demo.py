"""`heirloom demo learngene`: one gene, three depths, compared with the same models from scratch, on emoji by group."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from heirloom.common import config
from heirloom.common.files import staged
from learngene.compare import Comparison, compare, report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECIPE = "learngene/emoji"
COLOURS = {"sws": "#c8553d", "scratch": "#588b8b"}
LABELS = {"sws": "from the gene", "scratch": "from scratch"}


def run(seed: int, out: Path) -> dict[str, Any]:
    """Train teacher, gene, descendants; print the table, write `out/demo.png`, `out/gene`; return `--json`'s data."""
    started = time.perf_counter()
    loaded = config.load(RECIPE)
    assert isinstance(loaded, Comparison)
    cfg = seeded(loaded, seed)
    console = Console()
    depths = ", ".join(map(str, cfg.depths))
    one = f"one gene of {cfg.gene.student.layers} blocks"
    console.print(f"a teacher, {one}, and models of {depths} layers, from the gene and from scratch")
    with tempfile.TemporaryDirectory(dir=out) as folder:  # in `out`, so that the result can be renamed into place
        results = compare(cfg, Path(folder))
        with staged(out / "gene", force=True) as gene:
            (Path(folder) / "gene-sws" / "model").rename(gene)
    report(cfg, results)
    picture = draw(cfg, results, out)
    seconds = time.perf_counter() - started
    arms = results["arms"]
    ahead = [depth for depth in cfg.depths if arms[f"sws-{depth}"]["top1"][0] > arms[f"scratch-{depth}"]["top1"][-1]]
    lead = f"the gene, untrained at that depth, is ahead of {cfg.epochs} epoch from scratch"
    summary = f"for {len(ahead)} of {len(cfg.depths)} depths {lead}"
    console.print(f"{summary}; took {seconds:.0f} s", soft_wrap=True)
    more = f"heirloom expand {out / 'gene'} DEST --depth 5"
    console.print(f"picture: {picture}   gene: {out / 'gene'}   another depth: {more}", soft_wrap=True)
    deepest = cfg.depths[-1]
    scores: dict[str, Any] = {"teacher": {"top1": results["teacher"]["top1"]}}
    arm = {"inherited": arms[f"sws-{deepest}"], "scratch": arms[f"scratch-{deepest}"]}
    scores |= {name: {"top1": found["top1"][-1]} for name, found in arm.items()}
    inherited = arms[f"sws-{deepest}"]
    curve = zip(inherited["steps"], inherited["top1"], strict=True)
    reached = (step for step, top1 in curve if top1 >= scores["scratch"]["top1"])
    return {
        "parameters": {"teacher": results["teacher"]["parameters"], "student": inherited["parameters"]},
        "scores": scores,
        "comparison": results,
        "steps": inherited["steps"][-1],
        "steps_to_scratch": next(reached, None),
        "seconds": round(seconds, 1),
        "picture": str(picture),
    }


def seeded(cfg: Comparison, seed: int) -> Comparison:
    """Set the seed of initial values, order and augmentation in a comparison."""
    changed: dict[str, Any] = {}
    for name in ("gene", "teacher"):
        recipe = getattr(cfg, name)
        pipeline, step = replace(recipe.pipeline, seed=seed), replace(recipe.step, seed=seed)
        changed[name] = replace(recipe, seed=seed, pipeline=pipeline, step=step)
    return replace(cfg, **changed)


def draw(cfg: Comparison, results: dict[str, Any], out: Path) -> Path:
    """Draw the figure of a comparison into `out/demo.png`; returns the PNG."""
    with staged(out / "demo.png", force=True) as file:
        figure_of(cfg, results).savefig(file, dpi=120, format="png")
    return out / "demo.png"


def figure_of(cfg: Comparison, results: dict[str, Any]) -> "Figure":
    """Draw accuracy by depth, before and after training, and by the FLOPs of all depths together."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    width = 0.8 / len(cfg.methods)
    teacher = 100 * results["teacher"]["top1"]
    for i, name in enumerate(cfg.methods):
        arms = [results["arms"][f"{name}-{depth}"] for depth in cfg.depths]
        at = np.arange(len(arms)) + (i - (len(cfg.methods) - 1) / 2) * width
        colour, label = COLOURS.get(name, f"C{i}"), LABELS.get(name, name)
        final = [100 * arm["top1"][-1] for arm in arms]
        left.bar(at, final, width * 0.92, color=colour, label=f"{label}, {cfg.epochs} epoch")
        start = [100 * arm["top1"][0] for arm in arms]
        legend = None if i else "before its first step"
        left.scatter(at, start, color="white", edgecolor="black", zorder=3, label=legend)
        gene = results["genes"].get("sws" if name == "sws" else "", {"flops": 0.0})
        tuning = sum(arm["flops"] for arm in arms)
        spent = [gene["flops"] / 1e12, (gene["flops"] + tuning) / 1e12]
        mean = [100 * float(np.mean([arm["top1"][n] for arm in arms])) for n in (0, -1)]
        right.plot(spent, mean, color=colour, marker="o", linewidth=2.5, label=label)
    for axes in (left, right):
        axes.axhline(teacher, color="#888", linestyle="--", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, None)
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=3)
    left.set_xticks(np.arange(len(cfg.depths)), [f"{depth} layers" for depth in cfg.depths])
    left.set_ylabel("accuracy on held-out emoji, %")
    left.annotate("teacher", (-0.5, teacher), (2, 3), textcoords="offset points", color="#666")
    right.set(xlabel="TFLOP for all depths, the gene's training included", ylabel="mean accuracy over depths, %")
    return figure
