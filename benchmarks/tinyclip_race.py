"""Steps to a score: students that inherit, and the same student from scratch, each with its own rate and enough time.

    python benchmarks/tinyclip_race.py --runs runs/race --json benchmarks/results/tinyclip_race.json --png docs/race.png

An arm is trained anew for each number of steps of its BUDGETS, with a cosine that ends there: a point of the curve is
what that many steps are worth, not how far a longer schedule has come. Of the 300 emoji concepts that neither the
teacher nor a student is trained on, VALIDATION choose each arm's learning rate among RATES, by R@1 and with a seed of
their own, and the others are the test. (Concepts of the training data would not do: the teacher knows them, and a
student that changes little would win.) Scores are R@1 and R@10, means of both directions. Steps to a score are read off
the curve of a seed, on a logarithmic axis of steps. Two hours of one CPU core; what is finished stays in --runs, and
the same command goes on.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute, parquet

from benchmarks import bench
from benchmarks.tinyclip import TEACHER, scores, teacher, tokenizer
from heirloom.common import config
from heirloom.common.data import emoji
from heirloom.common.data.sources import SourceConfig
from heirloom.common.nn.functional import functional
from tinyclip_jax.cost import total_macs
from tinyclip_jax.model import Clip
from tinyclip_jax.train import Config, LossConfig
from tinyclip_jax.zoo import open_clip_model

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SWEEP_SEED = 100
SCRATCH, AFFINITY, CONTRASTIVE = "scratch, contrastive", "inherited, affinity", "inherited, contrastive"
SETTINGS: dict[str, dict[str, Any]] = {
    "cpu": dict(batch=64, sweep={SCRATCH: 400, AFFINITY: 100, CONTRASTIVE: 100},
                budgets={SCRATCH: (200, 400, 800, 1600), AFFINITY: (25, 50, 100, 200, 400), CONTRASTIVE: (100, 400)}),
    "smoke": dict(batch=16, sweep={SCRATCH: 4, AFFINITY: 2, CONTRASTIVE: 2},
                  budgets={SCRATCH: (4, 8), AFFINITY: (2, 4), CONTRASTIVE: (2, 4)}),
}  # fmt: skip
LEVELS = {"r1": (0.02, 0.03, 0.04, 0.05, 0.06), "r10": (0.12, 0.16, 0.2, 0.22, 0.24)}
NAMES = {"r1": "R@1", "r10": "R@10"}
VALIDATION = 100  # concepts, of the 300 that are held out
COLOURS = {SCRATCH: "#588b8b", AFFINITY: "#c8553d", CONTRASTIVE: "#d9a441"}


def recipe(arm: str, steps: int, rate: float, seed: int, batch: int) -> Config:
    """The demo's student, as an arm trains it."""
    demo = config.load("tinyclip/emoji")
    assert isinstance(demo, Config)
    cfg = replace(
        demo,
        seed=seed,
        steps=steps,
        pipeline=replace(demo.pipeline, batch=batch, seed=seed),
        optim=replace(demo.optim, lr=rate, warmup=max(steps // 10, 1)),
        step=replace(demo.step, seed=seed),
        log_every=steps,
        eval_every=steps,
        save_every=steps,
    )
    if arm == AFFINITY:
        return cfg
    alone = replace(cfg, teacher="", tokenizer=str(tokenizer()), loss=LossConfig(alpha=0.0))
    return alone if arm == CONTRASTIVE else replace(alone, donor="")


def score(cfg: Config, run: Path) -> dict[str, float]:
    """Held-out scores after a training, which is done unless it was done before."""

    def trained() -> dict[str, float]:
        cfg.train(run)
        return scores(run)

    return bench.once(run.with_name(f"{run.name}.json"), trained)


def split(folder: Path) -> dict[str, SourceConfig]:
    """Writes the emoji anew, with VALIDATION of the held-out concepts as a split of their own; returns `validation` and
    `test`.
    """
    file = folder / "emoji.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.concat_tables([parquet.read_table(emoji.path(style)) for style in emoji.STYLES])
    tested = table.filter(compute.equal(table["split"], "test"))
    concepts = sorted(set(tested["concept"].to_pylist()))
    chosen = np.random.default_rng(0).choice(concepts, VALIDATION, replace=False)
    parts = compute.if_else(compute.is_in(table["concept"], pa.array(chosen.tolist())), "validation", table["split"])
    parquet.write_table(table.set_column(table.column_names.index("split"), "split", parts), file)
    return {part: SourceConfig(str(file), part, columns=("concept", "tags")) for part in ("validation", "test")}


def sweep(arm: str, steps: int, batch: int, held_out: SourceConfig, folder: Path) -> dict[float, float]:
    """R@1 of an arm on validation concepts by learning rate."""
    found = {}
    for rate in RATES:
        cfg = replace(recipe(arm, steps, rate, SWEEP_SEED, batch), held_out=held_out)
        found[rate] = score(cfg, folder / f"{slug(arm)}-{rate:g}")["r1"]
    return found


def slug(arm: str) -> str:
    return arm.replace(", ", "-")


def curves(rows: list[dict[str, Any]], arm: str, metric: str) -> dict[int, list[tuple[int, float]]]:
    """Points (steps, score) of an arm by seed."""
    mine = bench.groups((row for row in rows if row["arm"] == arm), "seed")
    return {seed: [(row["steps"], row[metric]) for row in found] for seed, found in mine.items()}


def main() -> None:
    parser = bench.parser(__doc__, seeds=True)
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    parser.add_argument("--runs", type=Path, required=True, help="where the runs go; what is finished is kept")
    parser.add_argument("--png", type=Path, help="a drawing of the curves")
    args = parser.parse_args()
    setting = SETTINGS[args.setting]
    batch, budgets = setting["batch"], setting["budgets"]
    held_out, runs = split(args.runs / "data"), args.runs / "sweep"
    tried = {arm: sweep(arm, n, batch, held_out["validation"], runs) for arm, n in setting["sweep"].items()}
    print("validation R@1 by rate:", tried, flush=True)
    donor = open_clip_model(TEACHER)
    student = recipe(SCRATCH, 1, RATES[0], 0, batch).student
    macs = {"teacher": total_macs(donor.cfg, donor.source.spec),
            "student": total_macs(student, functional(Clip, student).spec)}  # fmt: skip
    known = teacher(held_out["test"])
    print("teacher:", known, flush=True)
    result: dict[str, Any] = {"batch": batch, "macs": macs, "validation": tried, "teacher": known, "rows": []}
    for seed in args.seeds:
        for arm, found in budgets.items():
            rate = max(tried[arm], key=tried[arm].__getitem__)
            for steps in found:
                run = args.runs / f"seed-{seed}" / f"{slug(arm)}-{steps}-{rate:g}"
                one = {"arm": arm, "seed": seed, "steps": steps, "rate": rate}
                cfg = replace(recipe(arm, steps, rate, seed, batch), held_out=held_out["test"])
                result["rows"].append(one | score(cfg, run))
                print(result["rows"][-1], flush=True)
        bench.write(args.json, bench.header() | result, indent=1)
    for metric in LEVELS:
        print("\n".join(report(result["rows"], budgets, metric)), end="\n\n")
    if args.png:
        plot(result["rows"], known, args.png)


def report(rows: list[dict[str, Any]], budgets: dict[str, tuple[int, ...]], metric: str) -> list[str]:
    """Scores by arm and budget, and steps to each level; the ratio is scratch's to those of affinity, by seed."""
    name, steps = NAMES[metric], sorted({n for found in budgets.values() for n in found})
    head = [f"{name} after steps of", *(f"{n:,}" for n in steps)]
    table = []
    for arm in budgets:
        at = {n: [100 * row[metric] for row in rows if row["arm"] == arm and row["steps"] == n] for n in steps}
        table.append([arm, *(bench.cell(values) for values in at.values())])
    found = {arm: curves(rows, arm, metric) for arm in budgets}
    seeds = sorted(found[SCRATCH])
    reached = []
    for level in LEVELS[metric]:
        each = {arm: [bench.steps_to(level, found[arm][seed]) for seed in seeds] for arm in budgets}
        ratios = [
            "-" if mine is None else f"{'' if theirs else '> '}{(theirs or budgets[SCRATCH][-1]) / mine:.1f}"
            for theirs, mine in zip(each[SCRATCH], each[AFFINITY], strict=True)
        ]
        told = (", ".join("never" if n is None else f"{n:,.0f}" for n in each[arm]) for arm in budgets)
        reached.append([f"{100 * level:.0f} %", *told, ", ".join(ratios)])
    return [
        *bench.markdown(head, table),
        "",
        *bench.markdown([f"steps to {name} of", *budgets, "scratch / inherited, affinity"], reached),
    ]


def plot(rows: list[dict[str, Any]], teacher: dict[str, float], file: Path) -> None:
    """Scores over steps, a line for each seed and arm; dashed: the teacher."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained", facecolor="white")
    for axes, (metric, name) in zip(figure.subplots(1, 2), NAMES.items(), strict=True):
        axes.axhline(100 * teacher[metric], color="#888888", linestyle="--", linewidth=1, label="teacher")
        for arm, colour in COLOURS.items():
            for i, curve in enumerate(curves(rows, arm, metric).values()):
                steps, values = zip(*sorted(curve), strict=True)
                look: dict[str, Any] = dict(color=colour, linewidth=1.6, marker="o", markersize=3)
                axes.plot(steps, [100 * value for value in values], **look, label=None if i else arm)
        axes.set(xscale="log", xlabel="steps of a whole training", ylabel=f"{name}, 200 held-out concepts, %")
        axes.set_ylim(0, None)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    main()
