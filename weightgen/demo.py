"""`heirloom demo weightgen`: heads for emoji classes the zoo never saw, on two backbones, with all baselines."""

import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from heirloom.common.files import staged
from weightgen.few_shot import SHOTS, FewShotConfig, Result, compare
from weightgen.metrics import as_json
from weightgen.zoo.data import emoji_tasks

BACKBONES = {"CLIP": "embedded:emoji", "PCA of pixels": "pixels"}
SHOWN = (
    "nearest zoo row per class",
    "prototype",
    "gradient descent on the pictures",
    "ridge",
    "generated, single sample",
    "generated, weights averaged",
    "trained on all pictures of the classes",
)
COLOURS = {5: "#588b8b", 1: "#c8553d"}


def run(seed: int, out: Path, cfg: FewShotConfig | None = None) -> dict[str, Any]:
    """Compare on both backbones, print tables and criteria, write `out/demo.png`; returns what `--json` writes."""
    started, console = time.perf_counter(), Console()
    cfg = cfg or FewShotConfig()
    results = {}
    with tempfile.TemporaryDirectory(dir=out) as folder:
        for name, backend in BACKBONES.items():
            tasks = emoji_tasks(backend)
            unseen, seen = (len(group["support"].names) for group in (tasks.unseen, tasks.seen))
            zoo = f"{seen} CLDR subgroups for the zoo, {unseen} unseen"
            heads = f"{cfg.ways}-way heads from 5 pictures of each class, or 1"
            console.print(f"\n{name}: {heads}; {zoo}", soft_wrap=True)
            results[name] = compare(
                cfg,
                tasks,
                Path(folder) / backend.replace(":", "-"),
                seed=seed,
                say=lambda line: console.print(line, soft_wrap=True),
            )
            console.print(table(results[name]))
            console.print(judgement(results[name]))
    picture = plot(results, out)
    seconds = time.perf_counter() - started
    console.print(f"picture: {picture}; took {seconds:.0f} s", soft_wrap=True)
    return {
        "scores": {
            name: {group: as_json(rows) for group, rows in result.rows.items()} for name, result in results.items()
        },
        "criteria": {name: result.criteria for name, result in results.items()},
        "report": {name: result.extra for name, result in results.items()},
        "seconds": round(seconds, 1),
        "picture": str(picture),
    }


def table(result: Result) -> Table:
    """Accuracy in percent with its 95 % interval, a column for each kind of classes and number of pictures."""
    out = Table(box=None, pad_edge=False)
    out.add_column("accuracy, %", no_wrap=True)
    for group in result.rows:
        out.add_column(group, justify="right", no_wrap=True)  # kind of classes, pictures of each
    for name in next(iter(result.rows.values())):
        out.add_row(name, *(str(rows[name]).replace(" ", "") for rows in result.rows.values()))  # 80 columns hold it
    return out


def judgement(result: Result) -> Table:
    out = Table(box=None, pad_edge=False)
    for header in ("criterion (unseen classes)", "measured", "bar", "met"):
        out.add_column(header, justify="left" if header.startswith("criterion") else "right")
    for name, found in result.criteria.items():
        out.add_row(name, found["measured"], found["bar"], "yes" if found["met"] else "NO")
    return out


def plot(results: dict[str, Result], out: Path) -> Path:
    """Unseen classes, a bar for each method and number of pictures; returns the PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.8), layout="constrained", facecolor="white")
    for axes, (name, result) in zip(figure.subplots(1, len(results), sharey=True), results.items(), strict=True):
        for i, shots in enumerate(SHOTS):
            rows = result.rows[f"unseen, {shots}"]
            place = [j + 0.38 * (0.5 - i) for j in range(len(SHOWN))]
            axes.barh(
                place,
                [100 * rows[method].mean for method in SHOWN],
                xerr=[100 * rows[method].half for method in SHOWN],
                height=0.36,
                color=COLOURS[shots],
                label=f"{shots} picture{'s' if shots > 1 else ''} of each class",
            )
        axes.axvline(20, color="#888", linestyle="--", linewidth=1)
        axes.set(
            title=f"features: {name}",
            xlabel="accuracy on unseen classes, 5-way, %",
            yticks=range(len(SHOWN)),
            xlim=(0, 100),
        )
        axes.set_yticklabels(SHOWN)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    with staged(out / "demo.png", force=True) as file:
        figure.savefig(file, dpi=120, format="png")
    return out / "demo.png"
