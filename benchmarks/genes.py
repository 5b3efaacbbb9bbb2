"""Six claims about genes on small data: SWS, TLEG, weight selection and from scratch, with controls, over seeds.

    python scripts/make_fashion_mnist.py ...                                                  # once: data/fashion_mnist
    python benchmarks/genes.py --runs runs/genes --json benchmarks/results/genes_cpu.json
    python scripts/make_cifar10.py ...                                                        # once: data/cifar10
    python benchmarks/genes.py --size gpu --runs runs/genes_gpu --json benchmarks/results/genes_gpu.json

An hour of one CPU core (Fashion-MNIST); two hours estimated on a GPU (CIFAR-10). Everything finished is kept in --runs,
and the same command goes on where it was stopped.

A convnet teaches the genes; all genes take the same number of pictures. Each method's learning rate is the best of
three on validation pictures, at the first depth, with a seed of its own; then the seeds run on the same data and are
scored on test pictures, of which no choice is made. Controls: kd starts at random and keeps the teacher; untied distils
the auxiliary net without sharing and spreads its layers; shuffled reverses the stages.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import bench
from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.train.optim import OptimConfig
from heirloom.common.train.step import StepConfig
from heirloom.common.vit.model import VitConfig
from learngene import cost
from learngene.augment import AugmentConfig
from learngene.compare import ARMS, Comparison, curve, descendant, gene_config, gene_row, teacher_row, train_model
from learngene.convnet import ConvConfig
from learngene.demo import seeded
from learngene.train import ADAMW, CONVNET_ADAMW, Config, TeacherConfig

METHODS = ("scratch", "kd", "sws", "shuffled", "untied", "tleg", "select")
RATES = (1e-4, 3e-4, 1e-3)
SWEEP_SEED = 100


@dataclass(frozen=True)
class Size:
    """What a machine can do. Epochs are of the training pictures."""

    data: str
    train: int
    validation: int
    test: int
    student: VitConfig
    teacher: ConvConfig
    depths: tuple[int, ...]
    teacher_epochs: int
    gene_epochs: int
    epochs: int
    batch: int
    augment: AugmentConfig
    step: StepConfig


FASHION = VitConfig(size=28, patch=7, width=64, layers=3, heads=2, hidden=256, classes=10, gene="sws", layout=(2, 2, 2))
CIFAR = VitConfig(
    size=32, patch=4, width=192, layers=5, heads=3, hidden=768, classes=10, gene="sws", layout=(2, 2, 2, 2, 2)
)
CPU = Size(
    data="data/fashion_mnist",
    train=6_000,
    validation=1_000,
    test=4_000,
    student=FASHION,
    teacher=ConvConfig(size=28, widths=(16, 32, 64), blocks=1),
    depths=(4, 6),
    teacher_epochs=5,
    gene_epochs=10,
    epochs=3,
    batch=256,
    augment=AugmentConfig(crop="shift", shift=2, flips=0.5),
    step=StepConfig(),
)
SIZES = {
    "smoke": replace(
        CPU,
        train=128,
        validation=64,
        test=64,
        student=replace(FASHION, width=16, heads=2, hidden=32, layers=2, layout=(1, 2)),
        teacher=ConvConfig(size=28, widths=(8,), blocks=1),
        depths=(2,),
        teacher_epochs=1,
        gene_epochs=1,
        epochs=1,
        batch=64,
    ),
    "cpu": CPU,
    "gpu": Size(
        data="data/cifar10",
        train=45_000,
        validation=5_000,
        test=10_000,
        student=CIFAR,
        teacher=ConvConfig(size=32, widths=(64, 128, 256), blocks=3),
        depths=(5, 6, 8, 10, 12),
        teacher_epochs=30,
        gene_epochs=60,
        epochs=10,
        batch=512,
        augment=AugmentConfig(crop="shift", flips=0.5, mixup=0.2),
        step=StepConfig(compute="bfloat16"),
    ),
}


def main() -> None:
    parser = bench.parser(__doc__, seeds=True)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--data", help="the folder of scripts/make_fashion_mnist.py or make_cifar10.py")
    parser.add_argument("--runs", type=Path, required=True, help="where the runs go; what is finished is kept")
    parser.add_argument("--methods", nargs="+", choices=ARMS, default=METHODS)
    args = parser.parse_args()
    size = SIZES[args.size]
    source = Path(args.data or size.data)
    if not (source / "train" / "image.npy").is_file():
        sys.exit(f"{source}: no such data; make it with scripts/make_fashion_mnist.py or scripts/make_cifar10.py")
    splits = split(source, size, args.runs / "data")
    base = comparison(size, splits, "test")
    teacher = train_model(base.teacher, args.runs / "teacher")
    rates = sweep(comparison(size, splits, "validation"), teacher, args.methods, args.runs / "sweep")
    rows, genes = [], []
    for seed in args.seeds:
        for name in args.methods:
            cfg, folder = seeded(base, seed), args.runs / f"seed-{seed}"
            gene, recipe = train_gene(cfg, name, teacher, folder)
            if recipe:
                genes.append({"method": name, "seed": seed} | gene_row(recipe, Path(gene).parent))
            for depth in cfg.depths:
                rows.append(arm(with_rate(cfg, rates[name]), name, depth, gene, teacher, folder) | {"seed": seed})
                print(
                    {key: value for key, value in rows[-1].items() if key in ("method", "depth", "seed", "top1")},
                    flush=True,
                )
    found: dict[str, Any] = {"teacher": teacher_row(base.gene, base.teacher, teacher)}
    found |= {"genes": genes, "rates": rates, "rows": rows}
    found["claims"] = claims(size, rows, genes, found["teacher"])
    report(size, rows, found["claims"])
    bench.write(args.json, bench.header() | {"size": args.size} | found, indent=1)


def split(source: Path, size: Size, destination: Path) -> dict[str, str]:
    """Splits the training pictures at random into train and validation; returns these and test as folders of arrays."""
    order = np.random.default_rng(0).permutation(len(np.load(source / "train" / "label.npy")))
    parts = {
        "train": ("train", order[: size.train]),
        "validation": ("train", order[size.train : size.train + size.validation]),
    }
    parts["test"] = ("test", np.arange(size.test))
    for name, (origin, rows) in parts.items():
        folder = destination / name
        if not (folder / "label.npy").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            for column in ("image", "label"):
                np.save(folder / f"{column}.npy", np.load(source / origin / f"{column}.npy", mmap_mode="r")[rows])
    return {name: str(destination / name) for name in parts}


def comparison(size: Size, splits: dict[str, str], held_out: str) -> Comparison:
    epoch = size.train // size.batch
    shared: dict[str, Any] = dict(
        data=SourceConfig(splits["train"], text=""),
        storage="device",
        augment=size.augment,
        pipeline=PipelineConfig(batch=size.batch),
        held_out=SourceConfig(splits[held_out], text=""),
        crop=1.0,
        step=size.step,
        log_every=epoch,
    )

    def schedule(optim: OptimConfig, epochs: int) -> dict[str, Any]:
        steps = epochs * epoch
        return dict(optim=replace(optim, lr=1e-3, warmup=steps // 10), steps=steps, eval_every=steps, save_every=steps)

    tune = replace(ADAMW, warmup=epoch // 10)
    return Comparison(
        gene=Config(student=size.student, **shared, **schedule(ADAMW, size.gene_epochs)),
        teacher=TeacherConfig(student=size.teacher, **shared, **schedule(CONVNET_ADAMW, size.teacher_epochs)),
        depths=size.depths,
        epochs=size.epochs,
        tune=tune,
        scratch=tune,
    )


def with_rate(cfg: Comparison, lr: float) -> Comparison:
    return replace(cfg, tune=replace(cfg.tune, lr=lr), scratch=replace(cfg.scratch, lr=lr))


def train_gene(cfg: Comparison, name: str, teacher: str, folder: Path) -> tuple[str, Config | None]:
    """SOURCE and recipe of the gene a method starts from; methods share one."""
    kind = ARMS[name].gene
    if not kind:
        return "", None
    recipe = replace(cfg.gene, student=gene_config(cfg.gene.student, kind), teacher=teacher)
    return train_model(recipe, folder / f"gene-{kind}"), recipe


def arm(cfg: Comparison, name: str, depth: int, gene: str, teacher: str, folder: Path) -> dict[str, Any]:
    lr = cfg.tune.lr
    recipe = descendant(cfg, name, depth, gene, teacher)
    return {"method": name, "depth": depth} | curve(recipe, folder / f"{name}-{depth}-{lr:g}")


def sweep(cfg: Comparison, teacher: str, methods: Sequence[str], folder: Path) -> dict[str, float]:
    """For each method the rate that is best on validation pictures, at the first depth."""
    cfg, best = seeded(cfg, SWEEP_SEED), {}
    for name in methods:
        gene, _ = train_gene(cfg, name, teacher, folder)
        scores = {lr: arm(with_rate(cfg, lr), name, cfg.depths[0], gene, teacher, folder)["top1"][-1] for lr in RATES}
        best[name] = max(scores, key=lambda lr: scores[lr])
        print(
            f"{name}: validation {', '.join(f'{lr:g}: {100 * top1:.1f} %' for lr, top1 in scores.items())}", flush=True
        )
    return best


def claims(
    size: Size, rows: list[dict[str, Any]], genes: list[dict[str, Any]], teacher: dict[str, Any]
) -> dict[str, Any]:
    """The six claims as numbers: per depth the difference in accuracy, seed by seed, in points."""
    methods = {row["method"] for row in rows}

    def gap(a: str, b: str, epoch: int) -> dict[str, Any]:
        if not {a, b} <= methods:
            return {}
        score = {(row["method"], row["depth"], row["seed"]): row["top1"] for row in rows}
        return {
            str(depth): [
                round(100 * (score[a, d, s][epoch] - score[b, d, s][epoch]), 2)
                for m, d, s in score
                if m == a and d == depth
            ]
            for depth in size.depths
        }

    models = [size.student.of_depth(depth) for depth in size.depths]
    spent = {
        name: (
            sum(row["flops"] for row in rows if row["method"] == name) / len({row["seed"] for row in rows})
            + next((gene["flops"] for gene in genes if gene["method"] == name), 0.0)
        )
        for name in sorted(methods)
    }
    return {
        "1: ahead of scratch at equal epochs": {f"epoch {n}": gap("sws", "scratch", n) for n in epochs(size)},
        "2: before and after one epoch, against scratch at the end": {
            f"sws after {n}": against_end(rows, size, n) for n in (0, 1) if {"sws", "scratch"} <= methods
        },
        "3: the order of stages matters": {f"epoch {n}": gap("sws", "shuffled", n) for n in (0, 1, size.epochs)},
        "4: sharing matters beyond distillation": {
            "over untied": {f"epoch {n}": gap("sws", "untied", n) for n in (0, 1, size.epochs)},
            "over kd": {f"epoch {n}": gap("sws", "kd", n) for n in (1, size.epochs)},
        },
        "5: storage and cost": {
            "parameters of all depths over the gene's": round(
                sum(map(cost.count, models)) / cost.count(size.student), 2
            ),
            "TFLOP, gene and all depths": {name: round(flops / 1e12, 2) for name, flops in spent.items()},
            "TFLOP of the teacher's own training": round(teacher["flops"] / 1e12, 2),
        },
        "6: against TLEG and selection": {
            other: {f"epoch {n}": gap("sws", other, n) for n in (0, 1, size.epochs)} for other in ("tleg", "select")
        },
    }


def epochs(size: Size) -> list[int]:
    return sorted({n for n in (1, 2, 5, size.epochs) if n <= size.epochs})


def against_end(rows: list[dict[str, Any]], size: Size, epoch: int) -> dict[str, list[float]]:
    end = {(row["depth"], row["seed"]): row["top1"][-1] for row in rows if row["method"] == "scratch"}
    mine = [row for row in rows if row["method"] == "sws"]
    return {
        str(depth): [
            round(100 * (row["top1"][epoch] - end[depth, row["seed"]]), 2) for row in mine if row["depth"] == depth
        ]
        for depth in size.depths
    }


def report(size: Size, rows: list[dict[str, Any]], found: dict[str, Any]) -> None:
    shown = [0, *epochs(size)]
    print(f"\n{'test accuracy, %':<12}{'depth':>6}{'lr':>8}" + "".join(f"{f'epoch {n}':>15}" for n in shown))
    for (name, depth), mine in bench.groups(rows, "method", "depth").items():
        cells = "".join(f"{bench.spread([100 * row['top1'][n] for row in mine]):>15}" for n in shown)
        print(f"{name:<12}{depth:>10}{mine[0]['lr']:>8.0e}{cells}")
    for claim, numbers in found.items():
        print(f"\n({claim[0]}) {claim[3:]}; differences in points, a number for each seed")
        tell(numbers, verdict if claim[0] != "5" else lambda _: "")


def tell(numbers: Any, judge: Callable[[list[float]], str], indent: str = "  ") -> None:
    for name, value in numbers.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            tell(value, judge, indent + "  ")
        else:
            print(f"{indent}{name:<12} {value}  {judge(value) if isinstance(value, list) else ''}")


def verdict(gaps: list[float]) -> str:
    """All seeds on one side, or not."""
    return "yes" if min(gaps) > 0 else "no" if max(gaps) <= 0 else "mixed"


if __name__ == "__main__":
    main()
