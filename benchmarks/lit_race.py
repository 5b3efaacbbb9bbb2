"""LiT's claim as the paper states it: the error of a fully trained DiT after a fifth of its steps. CIFAR-10, in pixels.

    python scripts/make_cifar10.py ...                                                        # once: data/cifar10
    python benchmarks/lit_race.py --runs runs/lit_race --json benchmarks/results/lit_race.json --png docs/lit_race.png

The donor is trained with whole schedules of growing length: it is on a plateau where twice the steps bring less than
PLATEAU. A LiT inherits from the longest, with whole schedules of a share of the donor's steps, alone and distilled from
a stronger DiT. Learning rates are the best of RATES for each kind of arm, on other test pictures than the scores, with
a seed of their own. They are chosen at the shortest share; longer ones have half the rate, since it can be too high for
them, and the longest of all seeds has it, too, to show that. At EQUAL of the donor's steps: from scratch, and with half
the rate the donor as teacher, other weights of the two terms, labels dropped for the student alone, as released. At the
shortest: heads from 1 to 12, with one bank of filters for all heads or one for each channel.

Scores: squared error of the noise on 512 of the first 1,000 test pictures, and KID of 1,000 samples against these over
8 x 8 thumbnails. What is finished stays in --runs; the same command goes on, and once donor and teacher are there,
seeds can run side by side. --finished reports what is there so far.
"""

import itertools
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from operator import le
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import bench, lit
from heirloom.common.data.sources import SourceConfig
from lit_jax.demo import race
from lit_jax.dit import DitConfig
from lit_jax.losses import DistillConfig
from lit_jax.train import Config

RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
SWEEP_SEED, DONOR_SEED = 100, 200
PLATEAU = 0.02  # share of the error that twice the steps still take off
EQUAL = 0.1  # share of the donor's steps at which the small questions are asked
CLOSE = 1.02  # of the donor's error: as good
PARTS = ("curve", "equal", "heads")
HEADS = (1, 2, 3, 4, 6, 12)
SCRATCH, INHERITS, MAIN = "LiT, scratch", "LiT, inherits", "LiT, inherits, distilled"
COLOURS = {SCRATCH: "#588b8b", INHERITS: "#d9a441", MAIN: "#c8553d"}


@dataclass(frozen=True)
class Size:
    """What a machine can do; `base` is a size of `lit.py`, whose model and steps are replaced."""

    base: lit.Size
    teacher: DitConfig
    teacher_steps: int
    teacher_rate: float
    donor_steps: tuple[int, ...]
    shares: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Of the donor's longest steps: whole trainings of the LiT."""
    longest: float = 0.4
    """The same, distilled, of the first seed alone."""


CPU = replace(lit.SIZES["cpu"], model=replace(lit.PIXELS, width=72, heads=6, hidden=288))
SMOKE = lit.SIZES["smoke"]
SIZES = {
    "cpu": Size(CPU, replace(lit.PIXELS, width=128, heads=8, hidden=512), 20_000, 4e-3, (5000, 10_000, 20_000)),
    "smoke": Size(replace(SMOKE, model=replace(SMOKE.model, width=24, heads=6)), SMOKE.model, 40, 4e-3, (20, 40)),
}


@dataclass(frozen=True)
class Arms:
    """Makes the trainings. where: the data; donor and teacher: folders of weights, empty before they are trained."""

    size: Size
    where: dict[str, SourceConfig]
    donor: str = ""
    teacher: str = ""

    def dit(self, model: DitConfig, steps: int, rate: float, seed: int = DONOR_SEED) -> Config:
        return tuned(lit.config(self.size.base, self.where, model, steps, seed=seed), rate)

    def lit(self, steps: int, rate: float, seed: int, *, inherits: bool = True, teacher: str = "", heads: int = 0,
            filters: str = "shared", **distill: Any) -> Config:  # fmt: skip
        student = lit.lit(self.size.base, heads or self.size.base.heads, filters)
        donor = self.donor if inherits else ""
        cfg = lit.config(self.size.base, self.where, student, steps, seed=seed, donor=donor, teacher=teacher)
        return tuned(replace(cfg, distill=DistillConfig(**distill)), rate)

    def main(self, steps: int, rate: float, seed: int) -> Config:
        return self.lit(steps, rate, seed, teacher=self.teacher)

    def equal(self, steps: int, rates: dict[str, float], seed: int) -> dict[str, Config]:
        """The small questions, at equal steps; the arms of the curve are not among them."""
        distilled: dict[str, dict[str, Any]] = {
            "teacher: the donor": {"teacher": self.donor},
            "noise 0.1": {"noise": 0.1},
            "noise 1": {"noise": 1.0},
            "noise 2": {"noise": 2.0},
            "variance 0": {"variance": 0.0},
            "labels dropped for the student alone": {"dropped": "student"},
        }
        return {
            SCRATCH: self.lit(steps, rates[SCRATCH], seed, inherits=False),
            **{
                f"{MAIN}, {name}": self.lit(steps, rates[MAIN], seed, **({"teacher": self.teacher} | changes))
                for name, changes in distilled.items()
            },
        }

    def heads(self, steps: int, rate: float, seed: int) -> dict[str, Config]:
        return {
            f"{n} heads, {filters} filters": self.lit(steps, rate, seed, heads=n, filters=filters)
            for n in HEADS
            for filters in ("shared", "channel")
        }


def tuned(cfg: Config, rate: float) -> Config:
    """With this rate, and one evaluation, at the end."""
    every: dict[str, Any] = {"log_every": max(cfg.steps // 20, 1), "eval_every": cfg.steps, "save_every": cfg.steps}
    return replace(cfg, optim=replace(cfg.optim, lr=rate), **every)


def error(cfg: Config, run: Path) -> float:
    """Held-out error after a training, which is done unless it was done before."""
    return bench.once(run.with_name(f"{run.name}.json"), lambda: race(cfg, run).final)["mse"]


def best_rate(name: str, arms: Iterable[tuple[float, Config]], folder: Path, tried: dict[str, Any]) -> float:
    """The rate with the lowest error on validation pictures; all are noted in `tried`."""
    found = {rate: error(cfg, folder / f"{slug(name)}-{rate:g}") for rate, cfg in arms}
    tried[name] = {f"{rate:g}": value for rate, value in found.items()}
    print(f"rate, {name}:", tried[name], flush=True)
    return min(found, key=found.__getitem__)


def finished(run: Path) -> bool:
    """Whether a training and its scores are done."""
    return run.with_name(f"{run.name}.json").is_file()


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(": ", "-").replace(" ", "_")


def score(cfg: Config, size: Size, run: Path, real: np.ndarray) -> dict[str, float]:
    """Error and KID of a training."""

    def measured() -> dict[str, float]:
        found = lit.score(cfg, size.base, run)
        distance = lit.kid_of("thumbnails", lit.thumbnails(np.load(run / lit.SAMPLES)), lit.thumbnails(real), cfg.seed)
        return {"mse": found["mse"], **distance}

    return bench.once(run.with_name(f"{run.name}.json"), measured)


def split_test(data: str, folder: Path) -> tuple[dict[str, SourceConfig], dict[str, SourceConfig], np.ndarray]:
    """Data for the sweeps and for the scores, which differ in the held-out pictures, and the pictures of the scores."""
    real = lit.held_out(data, folder / "test")
    other = folder / "validation"
    other.mkdir(exist_ok=True)
    for name in ("image", "label"):
        np.save(other / f"{name}.npy", np.load(f"{data}/test/{name}.npy", mmap_mode="r")[len(real) : 2 * len(real)])
    train = SourceConfig(f"{data}/train")
    return (
        {"data": train, "held_out": SourceConfig(str(other))},
        {"data": train, "held_out": SourceConfig(str(folder / "test"))},
        real,
    )


def main() -> None:
    parser = bench.parser(__doc__, seeds=True)
    parser.add_argument("--data", default="data/cifar10")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--runs", type=Path, required=True, help="where the runs go; what is finished is kept")
    parser.add_argument("--finished", action="store_true", help="train nothing: report what is finished")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--png", type=Path, help="a drawing of the curves")
    args = parser.parse_args()
    if not Path(args.data).is_dir():
        sys.exit(f"{args.data}: no such folder; make it with scripts/make_cifar10.py")
    size, runs = SIZES[args.size], args.runs
    (runs / "data").mkdir(parents=True, exist_ok=True)
    validation, test, real = split_test(args.data, runs / "data")
    tried: dict[str, Any] = {}
    result: dict[str, Any] = {"size": asdict(size), "validation": tried, "donor": [], "rows": []}

    swept = (runs / "sweep" / f"{slug(name)}-{r:g}" for name in ("DiT", SCRATCH, INHERITS, MAIN) for r in RATES)
    if args.finished and not all(map(finished, swept)):  # donor and teacher are older than the sweeps of the LiT
        sys.exit("--finished: learning rates are not chosen yet, and nothing is trained here; leave it out first")
    longest = size.donor_steps[-1]
    short = max(round(size.shares[0] * longest), 2)
    sweep, arms = Arms(size, validation), Arms(size, test)
    model = size.base.model
    dits = ((rate, sweep.dit(model, longest // 8, rate, SWEEP_SEED)) for rate in RATES)
    rate = best_rate("DiT", dits, runs / "sweep", tried)
    for steps in size.donor_steps:
        run = runs / f"donor-{steps}-{rate:g}"
        if args.finished and not finished(run):
            continue
        result["donor"].append({"steps": steps, "rate": rate} | score(arms.dit(model, steps, rate), size, run, real))
        print(result["donor"][-1], flush=True)
    # At 8e-3, the best for the donor, this width diverges after 3,000 steps.
    run = runs / f"teacher-{size.teacher_steps}-{size.teacher_rate:g}"
    found = score(arms.dit(size.teacher, size.teacher_steps, size.teacher_rate), size, run, real)
    result["teacher"] = {"steps": size.teacher_steps, "rate": size.teacher_rate} | found
    print("teacher", result["teacher"], flush=True)
    donor = runs / f"donor-{longest}-{rate:g}"
    folders: dict[str, Any] = {"donor": str(donor / "model"), "teacher": str(run / "model")}
    sweep, arms = replace(sweep, **folders), replace(arms, **folders)
    kinds: dict[str, dict[str, Any]] = {
        SCRATCH: {"inherits": False},
        INHERITS: {},
        MAIN: {"teacher": arms.teacher},
    }
    rates = {
        name: best_rate(name, ((r, sweep.lit(short, r, SWEEP_SEED, **how)) for r in RATES), runs / "sweep", tried)
        for name, how in kinds.items()
    }
    calm = {name: rate / 2 for name, rate in rates.items()}
    some = max(round(EQUAL * longest), 2)

    def curve(seed: int) -> list[tuple[str, int, Config]]:
        found = [max(round(share * longest), 2) for share in size.shares]
        more = [max(round(size.longest * longest), 2)] if seed == 0 else []
        lengths = [(found[0], rates), *((steps, calm) for steps in (*found[1:], *more)), (found[-1], rates)]
        make = {INHERITS: arms.lit, MAIN: arms.main}
        return [(name, n, arm(n, by[name], seed)) for name, arm in make.items() for n, by in lengths]

    def equal(seed: int) -> list[tuple[str, int, Config]]:
        return [(name, some, cfg) for name, cfg in arms.equal(some, calm | {SCRATCH: rates[SCRATCH]}, seed).items()]

    def heads(seed: int) -> list[tuple[str, int, Config]]:
        return [(name, short, cfg) for name, cfg in arms.heads(short, rates[INHERITS], seed).items()]

    trainings = {"curve": curve, "equal": equal, "heads": heads}
    for part, seed in itertools.product(args.parts, args.seeds):
        for name, steps, cfg in trainings[part](seed):
            run = runs / f"seed-{seed}" / f"{slug(name)}-{steps}-{cfg.optim.lr:g}"
            if args.finished and not finished(run):
                continue
            row = {"arm": name, "seed": seed, "steps": steps, "rate": cfg.optim.lr}
            result["rows"].append(row | score(cfg, size, run, real))
            print(result["rows"][-1], flush=True)
        bench.write(args.json, bench.header() | result, indent=1)
    print("\n".join(report(result)))
    if args.png:
        plot(result, args.png)


def report(result: dict[str, Any]) -> list[str]:
    """Tables: the donor by steps, every arm, and after which share of the donor's steps each seed is as good."""
    head = ["", "steps", "rate", "squared error of the noise", "KID of thumbnails"]
    donors = result["donor"]
    rows = [{"arm": "DiT, the donor", **row} for row in donors]
    rows.append({"arm": "DiT, the stronger teacher", **result["teacher"]})
    body = []
    for (name, steps, rate), mine in bench.groups([*rows, *result["rows"]], "arm", "steps", "rate").items():
        cells = [bench.spread([row[kind] for row in mine], 4).replace("+-", "±") for kind in ("mse", "kid_thumbnails")]
        body.append([name, f"{steps:,}", f"{rate:g}", *cells])
    lines = [*bench.markdown(head, body), ""]
    if len(donors) > 1:
        gain = 1 - donors[-1]["mse"] / donors[-2]["mse"]
        lines.append(f"the donor's last doubling took {gain:.1%} off (plateau: {PLATEAU:.0%})")
    level = CLOSE * donors[-1]["mse"]
    rows = [row for row in result["rows"] if row["arm"] in (INHERITS, MAIN)]
    for (name, seed, rate), mine in bench.groups(rows, "arm", "seed", "rate").items():
        steps = bench.steps_to(level, [(row["steps"], row["mse"]) for row in mine], le)
        share = f"after {steps / donors[-1]['steps']:.0%} of its steps" if steps else "never"
        lines.append(f"{name}, rate {rate:g}, seed {seed}: within {CLOSE - 1:.0%} of the donor's error {share}")
    return lines


def plot(result: dict[str, Any], file: Path) -> None:
    """Errors over steps: the donor, and the LiT of each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.plot(*zip(*((d["steps"], d["mse"]) for d in result["donor"]), strict=True), "o-", color="#888888", label="DiT")
    top = 1.2 * result["donor"][-1]["mse"]
    for name, colour in COLOURS.items():
        rows = [row for row in result["rows"] if row["arm"] == name]
        highest = max((row["rate"] for row in rows), default=0)
        for (rate, _), mine in bench.groups(rows, "rate", "seed").items():
            points = sorted((row["steps"], row["mse"]) for row in mine)
            style: dict[str, Any] = dict(color=colour, markersize=3, label=f"{name}, rate {rate:g}")
            axes.plot(*zip(*points, strict=True), "o:" if rate == highest else "o-", **style)
            for steps, mse in points:
                if mse > top:  # it diverged: drawn to scale, it would press all others together
                    axes.annotate(f"to {mse:.3f}", (steps, top), (4, -10), textcoords="offset points", color=colour)
    axes.axhline(result["donor"][-1]["mse"], color="#888888", linestyle="--", linewidth=1)
    axes.set(xscale="log", xlabel="thousand steps of a whole training", ylabel="squared error of the noise")
    axes.set_ylim(top=top)
    lengths = sorted({row["steps"] for row in (*result["donor"], *result["rows"])})
    axes.set_xticks(lengths, [f"{steps / 1000:g}" for steps in lengths])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    lines = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # one for all seeds
    axes.legend(lines.values(), lines.keys(), frameon=False)
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    main()
