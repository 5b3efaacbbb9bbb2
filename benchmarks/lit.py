"""Inheritance and distillation of a linear diffusion transformer on CIFAR-10, in pixels, at equal student steps.

    python scripts/make_cifar10.py ...                                   # once: data/cifar10
    python benchmarks/lit.py --json benchmarks/results/lit_cpu.json      # two hours of one CPU core
    python benchmarks/lit.py --size gpu --features inception --json benchmarks/results/lit_gpu.json

A DiT is trained once as donor and teacher. Four students then take the same steps on the same data, over several seeds:
the DiT and the LiT from scratch, a LiT that inherits, and one that inherits and is distilled. The paper's LiT needs 20
% of its DiT's steps. Then the heads: few, default and many, with one bank of filters for all heads and with a filter
for each channel, so that the number of filters and the number of heads can be told apart; and what each costs.

Scores: squared error of the noise on 512 test pictures, and KID of 1,000 samples against 1,000 of them over 8 x 8
thumbnails; with --features over Inception features too (on a CPU three pictures a second).
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from operator import le
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import bench
from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.demo import Race
from heirloom.common.evaluate.extractor import open_extractor
from heirloom.common.evaluate.fid import kid
from heirloom.common.evaluate.generated import measurer
from heirloom.common.mesh import start
from heirloom.common.nn.functional import functional
from heirloom.common.train.parameters import load_params
from heirloom.common.train.step import StepConfig
from lit_jax.decode import to_uint8
from lit_jax.demo import race
from lit_jax.dit import Dit, DitConfig, macs
from lit_jax.losses import DistillConfig
from lit_jax.sample import SampleConfig, drawer
from lit_jax.train import DIT_OPTIMIZER, Config
from lit_jax.zoo import open_dit

HELD_OUT = 1000  # test pictures
SAMPLES = "samples.npy"
PAPER = 0.2  # share of the DiT's steps after which LiT is as good


@dataclass(frozen=True)
class Size:
    """What a machine can do."""

    model: DitConfig
    heads: int
    """Of the LiT: few."""
    donor_steps: int
    steps: int
    batch: int
    samples: int
    compute: Any = "float32"


PIXELS = DitConfig(size=32, channels=3, patch=4, width=96, layers=4, heads=6, hidden=384, classes=10)
SIZES = {
    "smoke": Size(
        replace(PIXELS, width=32, layers=2, heads=4, hidden=64), heads=2, donor_steps=20, steps=10, batch=16, samples=20
    ),
    "cpu": Size(PIXELS, heads=2, donor_steps=3000, steps=300, batch=32, samples=1000),
    "gpu": Size(
        replace(PIXELS, patch=2, width=384, layers=8, heads=6, hidden=1536),
        heads=2,
        donor_steps=20_000,
        steps=4000,
        batch=256,
        samples=5000,
    ),
}
THUMBNAIL = 8  # pixels
COLOURS = {
    "DiT, scratch": "#888888",
    "LiT, scratch": "#588b8b",
    "LiT, inherits": "#e8a87c",
    "LiT, inherits, distilled": "#c8553d",
}
Features = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    parser = bench.parser(__doc__, seeds=True)
    parser.add_argument("--data", default="data/cifar10")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--features", type=Path, help="an Inception network for KID")
    parser.add_argument("--runs", type=Path, help="keep every arm's run and score here; what is there is not run again")
    args = parser.parse_args()
    if not Path(args.data).is_dir():
        sys.exit(f"{args.data}: no such folder; make it with scripts/make_cifar10.py")
    size = SIZES[args.size]
    with nullcontext(args.runs) if args.runs else tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        runs.mkdir(parents=True, exist_ok=True)
        donor = str(runs / "donor" / "model")
        first = held_out(args.data, runs / "test")
        data = {"data": SourceConfig(f"{args.data}/train"), "held_out": SourceConfig(str(runs / "test"))}
        bench.once(
            runs / "donor.json",
            lambda: race(config(size, data, size.model, size.donor_steps, seed=100), runs / "donor").final,
        )
        features = extractors(args.features)
        real = {kind: measure(first) for kind, measure in features.items()}
        rows = []
        for seed in args.seeds:
            for name, cfg in {**arms(size, data, donor, seed), **heads(size, data, donor, seed)}.items():
                run = runs / f"{name}-{seed}".replace(", ", "-").replace(" ", "_")
                row = bench.once(run.with_suffix(".json"), lambda: score(cfg, size, run))  # noqa: B023
                for kind, measure in features.items():
                    distance = lambda: kid_of(kind, measure(np.load(run / SAMPLES)), real[kind], seed)  # noqa: B023, E731
                    row |= bench.once(run.with_suffix(f".{kind}.json"), distance)
                rows.append({"arm": name, "seed": seed, **row})
                print({k: v for k, v in rows[-1].items() if k not in ("steps", "curve")}, flush=True)
        costs = {name: latency(cfg.student, size) for name, cfg in heads(size, data, donor, 0).items()}
        costs["dit"] = latency(size.model, size)
    report(size, rows, costs)
    bench.write(args.json, bench.header() | {"size": asdict(size), "milliseconds": costs, "paper": PAPER, "rows": rows})
    if args.json:
        plot(size, rows, args.json.with_suffix(".png"))


def score(cfg: Config, size: Size, folder: Path) -> dict[str, Any]:
    """One arm: its curve and its last error; what it draws is left in its folder."""
    begun = time.perf_counter()
    run = race(cfg, folder)
    np.save(folder / SAMPLES, samples(cfg, size, run, cfg.seed))
    kind = {"heads": cfg.student.heads, "filters": cfg.student.filters}
    taken = round(time.perf_counter() - begun, 1)
    return kind | {"mse": run.final["mse"], "seconds": taken, "steps": run.steps, "curve": run.scores}


def kid_of(kind: str, drawn: np.ndarray, real: np.ndarray, seed: int) -> dict[str, float]:
    return {f"kid_{kind}": kid(real, drawn, size=min(1000, len(drawn)), seed=seed).mean}


def config(
    size: Size,
    data: dict[str, SourceConfig],
    student: DitConfig,
    steps: int,
    *,
    seed: int,
    donor: str = "",
    teacher: str = "",
) -> Config:
    return Config(
        student=student,
        donor=donor,
        teacher=teacher,
        distill=DistillConfig(),
        data=data["data"],
        held_out=data["held_out"],
        pipeline=PipelineConfig(batch=size.batch, seed=seed),
        sample=SampleConfig("ddim", steps=25, guidance=1.0),
        samples=0,
        optim=replace(DIT_OPTIMIZER, lr=1e-3, warmup=max(steps // 20, 1), schedule="cosine"),
        step=StepConfig(ema=max(0.9, 1 - 10 / steps), seed=seed, compute=size.compute),
        steps=steps,
        seed=seed,
        log_every=max(steps // 20, 1),
        eval_every=max(steps // 20, 1),
        save_every=steps,
    )


def lit(size: Size, heads: int, filters: Any = "shared") -> DitConfig:
    return replace(size.model, attention="linear", heads=heads, filters=filters)


def arms(size: Size, data: dict[str, SourceConfig], donor: str, seed: int) -> dict[str, Config]:
    """The four students of the comparison."""
    few = lit(size, size.heads)
    return {
        "DiT, scratch": config(size, data, size.model, size.steps, seed=seed),
        "LiT, scratch": config(size, data, few, size.steps, seed=seed),
        "LiT, inherits": config(size, data, few, size.steps, seed=seed, donor=donor),
        "LiT, inherits, distilled": config(size, data, few, size.steps, seed=seed, donor=donor, teacher=donor),
    }


def heads(size: Size, data: dict[str, SourceConfig], donor: str, seed: int) -> dict[str, Config]:
    """Few, default and many heads, with either kind of filters; few with shared ones is an arm above."""
    many = size.model.width // 4
    return {
        "LiT, inherits" if (n, filters) == (size.heads, "shared") else f"{n} heads, {filters} filters": config(
            size, data, lit(size, n, filters), size.steps, seed=seed, donor=donor
        )
        for n in (size.heads, size.model.heads, many)
        for filters in ("shared", "channel")
    }


def held_out(data: str, folder: Path) -> np.ndarray:
    """The first test pictures, which are left in `folder` with their labels: a data set of their own."""
    folder.mkdir(exist_ok=True)
    first = {name: np.load(f"{data}/test/{name}.npy", mmap_mode="r")[:HELD_OUT] for name in ("image", "label")}
    for name, array in first.items():
        np.save(folder / f"{name}.npy", array)
    return first["image"]


def extractors(network: Path | None) -> dict[str, Features]:
    """Functions from pictures to features, by the name of their KID."""
    features: dict[str, Features] = {"thumbnails": thumbnails}
    if network:
        measure = measurer(open_extractor(network), start(Config().mesh))
        features["inception"] = lambda pictures: measure([pictures]).pooled
    return features


def thumbnails(pictures: np.ndarray) -> np.ndarray:
    """Shrinks pictures to 8 x 8 by averaging, [n, 192] in [-1, 1]: coarse features for 32 pixels and no network."""
    n, side = pictures.shape[:2]
    cell = side // THUMBNAIL
    return pictures.reshape(n, THUMBNAIL, cell, THUMBNAIL, cell, 3).mean((2, 4)).reshape(n, -1) / 127.5 - 1


def samples(cfg: Config, size: Size, run: Race, seed: int) -> np.ndarray:
    """Pictures of all classes equally often, from the same noise whatever the model."""
    donor, mesh = open_dit(str(run.weights)), start(cfg.mesh)
    draw, params = drawer(donor.model, donor.cfg, cfg.sample, mesh), load_params(donor, mesh)
    parts = range(0, size.samples, 250)
    drawn = [
        draw(params, np.arange(i, min(i + 250, size.samples)) % 10, jax.random.fold_in(jax.random.key(seed), i))
        for i in parts
    ]
    return to_uint8(np.concatenate(drawn))


def latency(cfg: DitConfig, size: Size) -> dict[str, float]:
    """Milliseconds of one forward pass of a batch, the median of ten, and its multiply-accumulates."""
    model = functional(Dit, cfg)
    params = model.init(jax.random.key(0))
    inputs = (
        jnp.ones((size.batch, cfg.size, cfg.size, cfg.channels)),
        jnp.zeros(size.batch),
        jnp.zeros(size.batch, jnp.int32),
    )
    forward = jax.jit(model.apply)
    jax.block_until_ready(forward(params, *inputs))
    seconds = statistics.median(bench.timed(lambda: forward(params, *inputs), 10))
    return {"ms": round(1000 * seconds, 2), "gmacs": round(size.batch * macs(cfg, model.spec) / 1e9, 3)}


def report(size: Size, rows: list[dict[str, Any]], costs: dict[str, dict[str, float]]) -> None:
    distances = [name for name in rows[0] if name.startswith("kid_")]
    print(f"\n{'':<28}{'mse':>18}" + "".join(f"{name:>20}" for name in distances) + f"{'ms':>9}{'GMACs':>9}")
    for name, mine in bench.groups(rows, "arm").items():
        figures = {kind: bench.spread([row[kind] for row in mine], digits=4) for kind in ("mse", *distances)}
        cost = costs.get(name, costs["dit"] if name.startswith("DiT") else costs["LiT, inherits"])
        print(
            f"{name:<28}{figures['mse']:>18}"
            + "".join(f"{figures[kind]:>20}" for kind in distances)
            + f"{cost['ms']:>9.1f}{cost['gmacs']:>9.2f}"
        )
    last = {row["seed"]: row for row in rows if row["arm"] == "LiT, inherits, distilled"}
    for row in (r for r in rows if r["arm"] == "DiT, scratch"):
        other = last[row["seed"]]
        step = Race(other["steps"], other["curve"], {}, Path()).reaches(row["mse"], le)
        when = (
            f"after {step} of {size.steps} steps ({step / size.steps:.0%})"
            if step is not None
            else f"not within {size.steps} steps"
        )
        print(f"seed {row['seed']}: the distilled LiT has the DiT's final error {when}; the paper's after {PAPER:.0%}")


def plot(size: Size, rows: list[dict[str, Any]], file: Path) -> None:
    """The four students' errors over their steps, a line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for name, colour in COLOURS.items():
        for n, row in enumerate(r for r in rows if r["arm"] == name):
            axes.plot(row["steps"], row["curve"], color=colour, linewidth=1.5, label=None if n else name)
    axes.set(
        xlabel="step", ylabel="squared error of the noise, CIFAR-10 test pictures", yscale="log", xlim=(0, size.steps)
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
