"""What helps in TinyCLIP, on emoji: losses, inheritance by rule or masks, one or more stages, 50, 25 or 10 % of blocks.

    python benchmarks/tinyclip.py --out runs/benchmark --json benchmarks/results/tinyclip_cpu.json
    python benchmarks/tinyclip.py --setting long --out runs/long --json benchmarks/results/tinyclip_long.json
    python benchmarks/tinyclip.py --setting gpu --out runs/benchmark_gpu --json ...

Every arm has the same teacher (the embedded one), data, batch and number of steps; an arm in stages has equal parts of
them in each, a mask phase is part of its arm's steps. Learned masks leave more multiply-accumulates than the rule at
the same share of blocks: the arms "MACs of automatic" have a rule that keeps as many, by wider MLPs of the image tower.
Scored on 300 concepts nobody was trained on. Each arm of each seed writes OUT/ARM-SEED.json when it is done, and is not
run again; one that was stopped goes on where it was, and its seconds are those since then.
"""

import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks import bench
from heirloom.common import config
from heirloom.common.data.sources import SourceConfig
from heirloom.common.files import read_json, write_json
from heirloom.common.nn.functional import functional
from heirloom.common.train.optim import OptimConfig
from tinyclip_jax.cost import parameters, total_macs
from tinyclip_jax.masks import MaskConfig
from tinyclip_jax.model import Clip, ClipConfig, ImageConfig
from tinyclip_jax.train import Config, LossConfig, Stage
from tinyclip_jax.zoo import open_clip_model

METRICS = ("r1", "r5", "r10")
TEACHER = "embedded:emoji"
TOOK = {"seconds": "minutes", "core_seconds": "minutes of a core"}


@dataclass(frozen=True)
class Setting:
    """How much a machine can do."""

    steps: int
    batch: int
    compute: Literal["float32", "bfloat16"] = "float32"


SETTINGS = {
    "cpu": Setting(200, 64),
    "long": Setting(600, 64),
    "gpu": Setting(4000, 512, "bfloat16"),
    "smoke": Setting(12, 16),
}
SHARES = {"50 %": 0.5, "25 %": 0.75, "10 %": 0.9}  # of the blocks that masks close, by size
EQUAL = {f"{size} manual, MACs of automatic": size for size in SHARES}


def arms(setting: Setting, seed: int) -> dict[str, Config]:
    """Every arm's recipe by name, `SIZE METHOD`."""
    demo = config.load("tinyclip/emoji")
    assert isinstance(demo, Config)
    steps, warmup = setting.steps, setting.steps // 10
    every = max(steps // 4, 1)
    base = replace(
        demo,
        seed=seed,
        steps=steps,
        pipeline=replace(demo.pipeline, batch=setting.batch, seed=seed),
        optim=OptimConfig(lr=1e-3, warmup=warmup),
        step=replace(demo.step, compute=setting.compute, seed=seed),
        log_every=every,
        eval_every=steps,
        save_every=every,
    )
    whole = open_clip_model(TEACHER).cfg
    half = demo.student
    assert isinstance(half.image, ImageConfig)
    quarter = replace(half, image=replace(half.image, width=64, heads=1, hidden=256))
    tenth = replace(
        half,
        image=replace(half.image, width=64, heads=1, hidden=192),
        text=replace(half.text, width=128, heads=2, hidden=512, layers=1),
    )
    students = dict(zip(SHARES, (half, quarter, tenth), strict=True))
    found: dict[str, Config] = {}
    for size, student in students.items():
        alone = replace(base, student=student)
        found |= {
            f"{size} scratch, contrastive": replace(
                alone, donor="", teacher="", tokenizer=str(tokenizer()), loss=LossConfig(alpha=0.0)
            ),
            f"{size} scratch, affinity": replace(alone, donor=""),
            f"{size} manual": alone,
            f"{size} automatic": replace(base, student=whole, masks=masks(steps, 0.0, SHARES[size])),
        }
    for size, number, n in (("25 %", "two", 2), ("10 %", "three", 3)):
        lengths = [steps // n] * (n - 1) + [steps - steps // n * (n - 1)]
        shares = [0.0, *SHARES.values()]
        manual = [Stage(student, k, warmup // n) for student, k in zip(students.values(), lengths, strict=False)]
        learned = [Stage(whole, k, masks=masks(k, shares[i], shares[i + 1])) for i, k in enumerate(lengths)]
        found |= {
            f"{size} manual, {number} stages": replace(base, stages=tuple(manual)),
            f"{size} automatic, {number} stages": replace(base, stages=tuple(learned)),
        }
    return found


def at_macs(student: ClipConfig, most: int) -> ClipConfig:
    """A student with the widest MLPs of the image tower at which it takes at most `most` multiply-accumulates, or with
    the narrowest where all take more.
    """
    assert isinstance(student.image, ImageConfig)
    widths = [replace(student, image=replace(student.image, hidden=hidden)) for hidden in range(768, 0, -8)]
    return next((cfg for cfg in widths if total_macs(cfg, functional(Clip, cfg).spec) <= most), widths[-1])


def masks(steps: int, start: float, target: float) -> MaskConfig:
    """Half of the steps with masks.

    Deviation: phases are short here, the release has 3,000 steps and more at a rate of 0.02. The rate is such that
    gates have time to close, and there is no momentum, with which they would go on closing.
    """
    return MaskConfig(
        prune_step=steps // 2, start=start, target=target, warmup=steps // 4, lr=12 / (steps // 2), momentum=0.0
    )


def tokenizer() -> Path:
    """The teacher's, which every arm has."""
    return open_clip_model(TEACHER).folder


def run(name: str, cfg: Config, folder: Path) -> dict[str, Any]:
    """Train one arm and say what it came to."""
    began = {"resumed": folder.exists()}
    wall, core = time.perf_counter(), time.process_time()
    cfg.train(folder)
    last = folder / f"stage_{len(cfg.stages)}" if cfg.stages else folder
    model = open_clip_model(str(last / "model"))
    took = {"seconds": time.perf_counter() - wall, "core_seconds": time.process_time() - core}
    return {"arm": name, "seed": cfg.seed} | told(model.cfg, model.source.spec) | scores(last) | began | took


def teacher(held_out: SourceConfig | None = None) -> dict[str, Any]:
    """The teacher's own row: it is scored as a student that inherits everything. held_out: None: all held-out emoji."""
    demo, whole = config.load("tinyclip/emoji"), open_clip_model(TEACHER)
    assert isinstance(demo, Config)
    scored = replace(demo, student=whole.cfg, held_out=held_out or demo.held_out).evaluate()
    found = {row["metric"]: row["value"] / 100 for row in scored}
    return {"arm": "teacher", "seed": 0} | told(whole.cfg, whole.source.spec) | {name: found[name] for name in METRICS}


def told(cfg: ClipConfig, spec: Any) -> dict[str, int]:
    return {"parameters": parameters(spec)["total"], "macs": total_macs(cfg, spec)}


def scores(folder: Path) -> dict[str, float]:
    """The last evaluation of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scored: Mapping[str, float] = next(line for line in reversed(lines) if "eval/r1" in line)
    return {name: scored[f"eval/{name}"] for name in METRICS}


def main() -> None:
    parser = bench.parser(__doc__, seeds=True)
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these, by name")
    parser.add_argument("--out", type=Path, required=True, help="runs and the result of each arm")
    args = parser.parse_args()
    setting, rows = SETTINGS[args.setting], [teacher()]
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        recipes = arms(setting, seed)
        names = [*recipes, *EQUAL]
        if unknown := [name for name in args.arms or () if name not in names]:
            parser.error(f"no arm {unknown[0]!r}; there are: {', '.join(names)}")
        for name in args.arms or names:
            file = args.out / f"{stem(name, seed)}.json"
            if not file.exists():
                if name in EQUAL:
                    other = args.out / f"{stem(f'{EQUAL[name]} automatic', seed)}.json"
                    if not other.exists():
                        parser.error(f"{name} follows {EQUAL[name]} automatic: run that first")
                    cfg = recipes[f"{EQUAL[name]} manual"]
                    cfg = replace(cfg, student=at_macs(cfg.student, read_json(other)["macs"]))
                else:
                    cfg = recipes[name]
                found = run(name, cfg, args.out / "runs" / stem(name, seed))
                write_json(file, found | {"setting": args.setting, "steps": setting.steps})
            row = read_json(file)
            if row["setting"] != args.setting:
                parser.error(f"{file} is of the setting {row['setting']!r}: take another --out")
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(table(rows))
    bench.write(args.json, bench.header() | {"rows": rows})


def stem(name: str, seed: int) -> str:
    """The name of an arm's files."""
    return f"{name.replace(' %', '').replace(',', '').replace(' ', '_')}-{seed}"


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, as Markdown, and what it all took."""
    body = []
    for name, mine in bench.groups(rows, "arm").items():
        count, macs = (statistics.mean(row[key] for row in mine) for key in ("parameters", "macs"))
        scored = (bench.cell([100 * row[key] for row in mine], unit=" %") for key in METRICS)
        body.append([name, f"{count:,.0f}", f"{macs / 1e6:,.0f} M", *scored])
    trained = [row for row in rows if "core_seconds" in row]
    took = [f"{sum(row[key] for row in trained) / 60:.0f} {what}" for key, what in TOOK.items()]
    if again := sum(row["resumed"] for row in trained):
        took.append(f"{again} of them after a stop, timed since then")
    head = ("", "parameters", "MACs", "R@1", "R@5", "R@10")
    return "\n".join([*bench.markdown(head, body), "", f"{len(trained)} arms: {', '.join(took)}"])


if __name__ == "__main__":
    main()
