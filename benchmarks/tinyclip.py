"""What helps in TinyCLIP, on emoji: losses, inheritance by rule or masks, one or two stages, 50 or 25 % of blocks.

    python benchmarks/tinyclip.py --out runs/benchmark --json benchmarks/results/tinyclip_cpu.json
    python benchmarks/tinyclip.py --setting gpu --out runs/benchmark_gpu --json ...

Every arm has the same teacher (the embedded one), data, batch and number of steps; an arm in two stages has half of
them in each, a mask phase is part of its arm's steps. Scored on 300 concepts nobody was trained on. Each arm of each
seed writes OUT/ARM-SEED.json when it is done, and is not run again; one that was stopped goes on where it was, and its
seconds are those since then.
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
from heirloom.common.checkpoint.weights import read_json, write_json
from heirloom.common.train.optim import OptimConfig
from tinyclip_jax.masks import MaskConfig
from tinyclip_jax.model import ClipConfig, ImageConfig, parameters, total_macs
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


SETTINGS = {"cpu": Setting(200, 64), "gpu": Setting(4000, 512, "bfloat16"), "smoke": Setting(12, 16)}


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
    found: dict[str, Config] = {}
    for size, student, share in (("50 %", half, 0.5), ("25 %", quarter, 0.75)):
        alone = replace(base, student=student)
        found |= {
            f"{size} scratch, contrastive": replace(
                alone, donor="", teacher="", tokenizer=str(tokenizer()), loss=LossConfig(alpha=0.0)
            ),
            f"{size} scratch, affinity": replace(alone, donor=""),
            f"{size} manual": alone,
            f"{size} automatic": replace(base, student=whole, masks=masks(steps, 0.0, share)),
        }
    first = steps // 2
    manual = (Stage(half, first, warmup // 2), Stage(quarter, steps - first, warmup // 2))
    learned = (
        Stage(whole, first, masks=masks(first, 0.0, 0.5)),
        Stage(whole, steps - first, masks=masks(steps - first, 0.5, 0.75)),
    )
    return found | {
        "25 % manual, two stages": replace(base, stages=manual),
        "25 % automatic, two stages": replace(base, stages=learned),
    }


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


def teacher() -> dict[str, Any]:
    """The teacher's own row: it is scored as a student that inherits everything."""
    demo, whole = config.load("tinyclip/emoji"), open_clip_model(TEACHER)
    assert isinstance(demo, Config)
    found = {row["metric"]: row["value"] / 100 for row in replace(demo, student=whole.cfg).evaluate()}
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
        if unknown := [name for name in args.arms or () if name not in recipes]:
            parser.error(f"no arm {unknown[0]!r}; there are: {', '.join(recipes)}")
        for name in args.arms or recipes:
            stem = f"{name.replace(' %', '').replace(',', '').replace(' ', '_')}-{seed}"
            file = args.out / f"{stem}.json"
            if not file.exists():
                write_json(
                    file,
                    run(name, recipes[name], args.out / "runs" / stem)
                    | {"setting": args.setting, "steps": setting.steps},
                )
            row = read_json(file)
            if row["setting"] != args.setting:
                parser.error(f"{file} is of the setting {row['setting']!r}: take another --out")
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(table(rows))
    bench.write(args.json, bench.header() | {"rows": rows})


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
