"""Genes at equal compute: a teacher, a gene and N descendants, or N models from scratch for the same FLOPs.

    python scripts/make_fashion_mnist.py ...                                                  # once: data/fashion_mnist
    python benchmarks/gene_budget.py --runs runs/gene_budget --json benchmarks/results/gene_budget.json

The gene costs most of its compute before the first descendant; from there each costs two epochs. From scratch, the
same total is shared by N models: all get the same number of steps, so a few models train long and many train briefly.
At which N does the gene pay? SETS has the depths of the N models. Data, models and schedules are those of `genes.py`,
with a longer training of the teacher. Learning rates are the best of RATES on validation pictures, with a seed of their
own: of the teacher, the gene, the descendants, and from scratch for each N. All scores are of test pictures. FLOPs are
counted (`learngene.compare.training_flops`): the teacher's training, its forward passes, the gene, the descendants;
sweeps count on neither side. Two hours of two CPU cores, by estimate; what is finished stays in --runs, and the same
command goes on.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import bench
from benchmarks.genes import CPU, SWEEP_SEED, comparison, split, train_gene, with_rate
from heirloom.common.train.metrics import MetricsFile
from learngene.compare import Comparison, curve, descendant, teacher_row, train_model, training_flops
from learngene.config import Config
from learngene.demo import seeded

RATES = (1e-3, 3e-3, 1e-2)
DEPTH = 6  # of the sweeps
SETS = {1: (6,), 3: (4, 6, 8), 6: tuple(range(4, 10)), 12: tuple(range(3, 15))}
SIZES = {
    "cpu": (replace(CPU, teacher_epochs=10, gene_epochs=10, epochs=2), SETS),
    "smoke": (replace(CPU, train=128, validation=64, test=64, teacher_epochs=1, gene_epochs=1, epochs=1, batch=64),
              {1: (6,), 2: (4, 6)}),
}  # fmt: skip


def main() -> None:
    parser = bench.parser(__doc__, seeds=True)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--data", default="data/fashion_mnist", help="the folder of scripts/make_fashion_mnist.py")
    parser.add_argument("--runs", type=Path, required=True, help="where the runs go; what is finished is kept")
    args = parser.parse_args()
    size, sets = SIZES[args.size]
    source = Path(args.data)
    if not (source / "train" / "image.npy").is_file():
        sys.exit(f"{source}: no such data; make it with scripts/make_fashion_mnist.py")
    splits = split(source, size, args.runs / "data")
    base, tried = comparison(size, splits, "test"), comparison(size, splits, "validation")
    teacher, rates = best_teacher(tried, args.runs / "teacher")
    taught = teacher_row(base.gene, base.teacher, teacher)
    budgets = {n: budget(base, depths, teacher, taught["flops"]) for n, depths in sets.items()}
    rates |= sweep(tried, teacher, budgets, args.runs / "sweep")
    base = gene_rate(base, rates["gene"])
    rows: list[dict[str, Any]] = []
    result = {"teacher": taught, "gene_flops": gene_flops(base, teacher), "steps": budgets, "rates": rates}
    result["rows"] = rows
    for seed in args.seeds:
        cfg, folder = seeded(base, seed), args.runs / f"seed-{seed}"
        tuned = with_rate(cfg, rates["sws"])
        gene, _ = train_gene(cfg, "sws", teacher, folder)
        found = {depth: inherited(tuned, depth, gene, folder) for depth in sorted(set().union(*sets.values()))}
        for n, depths in sets.items():
            for depth in depths:
                scratch = curve(from_scratch(cfg, depth, budgets[n], rates[n]), folder / f"scratch-{n}-{depth}")
                for name, run in (("sws", found[depth]), ("scratch", scratch)):
                    one = {"models": n, "depth": depth, "seed": seed, "method": name}
                    rows.append(one | {"top1": run["top1"][-1], "flops": run["flops"]})
            print(f"seed {seed}, {n} models:", *means(rows, n, seed).items(), flush=True)
        bench.write(args.json, bench.header() | result, indent=1)
    report(result, sets)


def gene_flops(cfg: Comparison, teacher: str) -> float:
    return training_flops(replace(cfg.gene, teacher=teacher))


def budget(cfg: Comparison, depths: Sequence[int], teacher: str, taught: float) -> int:
    """Steps of each model from scratch, so that all of them together cost what teacher, gene and descendants do."""
    arms = [descendant(cfg, "scratch", depth, "", "") for depth in depths]
    total = taught + gene_flops(cfg, teacher) + sum(map(training_flops, arms))
    return round(total / sum(training_flops(replace(arm, steps=1)) for arm in arms))


def from_scratch(cfg: Comparison, depth: int, steps: int, rate: float) -> Config:
    arm = descendant(with_rate(cfg, rate), "scratch", depth, "", "")
    optim = replace(arm.optim, warmup=steps // 10)
    return replace(arm, optim=optim, steps=steps, eval_every=steps, log_every=steps, save_every=steps)


def inherited(cfg: Comparison, depth: int, gene: str, folder: Path) -> dict[str, Any]:
    return curve(descendant(cfg, "sws", depth, gene, ""), folder / f"sws-{depth}")


def best_teacher(cfg: Comparison, folder: Path) -> tuple[str, dict[Any, float]]:
    """The teacher that is best on validation pictures, and its rate."""
    scores = {}
    for rate in RATES:
        recipe = replace(cfg.teacher, optim=replace(cfg.teacher.optim, lr=rate))
        scores[rate] = last(train_model(recipe, folder / f"{rate:g}"))
    rate = best("teacher", scores)
    return str(folder / f"{rate:g}" / "model"), {"teacher": rate}


def gene_rate(cfg: Comparison, rate: float) -> Comparison:
    return replace(cfg, gene=replace(cfg.gene, optim=replace(cfg.gene.optim, lr=rate)))


def sweep(cfg: Comparison, teacher: str, budgets: dict[int, int], folder: Path) -> dict[Any, float]:
    """The rates that are best on validation pictures: of the gene, and at one depth of descendants and from scratch."""
    cfg = seeded(cfg, SWEEP_SEED)
    genes = {rate: train_gene(gene_rate(cfg, rate), "sws", teacher, folder / f"{rate:g}")[0] for rate in RATES}
    rates: dict[Any, float] = {"gene": best("gene", {rate: last(gene) for rate, gene in genes.items()})}
    gene = genes[rates["gene"]]
    tuned = {rate: inherited(with_rate(cfg, rate), DEPTH, gene, folder / f"sws-{rate:g}") for rate in (3e-4, *RATES)}
    rates["sws"] = best("sws", {rate: found["top1"][-1] for rate, found in tuned.items()})
    for n, steps in budgets.items():
        arms = {rate: (from_scratch(cfg, DEPTH, steps, rate), folder / f"scratch-{n}-{rate:g}") for rate in RATES}
        rates[n] = best(f"scratch, {n}", {rate: curve(*arm)["top1"][-1] for rate, arm in arms.items()})
    return rates


def last(model: str) -> float:
    """Top-1 of a training's last evaluation. model: the folder of its weights."""
    lines = MetricsFile(Path(model).parent / "metrics.jsonl").lines()
    return [line["eval/top1"] for line in lines if "eval/top1" in line][-1]


def best(name: str, scores: dict[float, float]) -> float:
    print(f"rate, {name}: {', '.join(f'{lr:g}: {100 * top1:.1f} %' for lr, top1 in scores.items())}", flush=True)
    return max(scores, key=scores.__getitem__)


def means(rows: list[dict[str, Any]], n: int, seed: int) -> dict[str, float]:
    """Mean accuracy over the N models of a seed, in percent, by method."""
    mine = bench.groups((row for row in rows if row["models"] == n and row["seed"] == seed), "method")
    return {name: round(100 * sum(row["top1"] for row in found) / len(found), 2) for name, found in mine.items()}


def report(result: dict[str, Any], sets: dict[int, tuple[int, ...]]) -> None:
    """Prints the table: mean accuracy of N models, compute, and the difference in every seed."""
    once = result["teacher"]["flops"] + result["gene_flops"]
    table, seeds = [], sorted({row["seed"] for row in result["rows"]})
    for n, depths in sets.items():
        per_seed = [means(result["rows"], n, seed) for seed in seeds]
        mine = [row for row in result["rows"] if row["models"] == n and row["seed"] == seeds[0]]
        spent = {name: sum(r["flops"] for r in found) for name, found in bench.groups(mine, "method").items()}
        gaps = ", ".join(f"{found['sws'] - found['scratch']:+.1f}" for found in per_seed)
        cells = [bench.spread([found[name] for found in per_seed]) for name in ("sws", "scratch")]
        tera = f"{(once + spent['sws']) / 1e12:.1f} / {spent['scratch'] / 1e12:.1f}"
        table.append([str(n), f"{min(depths)} to {max(depths)}", tera, str(result["steps"][n]), *cells, gaps])
    head = ["models", "layers", "TFLOP, gene / scratch", "steps from scratch", "gene, %", "scratch, %", "gene ahead by"]
    print("\n".join(bench.markdown(head, table)))
    print(f"before the first descendant: {once / 1e12:.1f} TFLOP; teacher {100 * result['teacher']['top1']:.1f} %")


if __name__ == "__main__":
    main()
