"""How much sooner an inheriting student arrives: the demo's race over several seeds and budgets.

    python benchmarks/inheritance.py --seeds 0 1 2 --steps 200 600 --json benchmarks/results/inheritance.json

Per budget: held-out R@1 (mean of both directions) of both students, and the speed-up: the scratch student's steps over
the steps after which the inheriting one has its final score. The paper reports 1.4 to 7.8 times (abstract), at another
scale.
"""

import tempfile
from dataclasses import replace
from operator import ge
from pathlib import Path

from benchmarks import bench
from heirloom.common import config
from tinyclip_jax.demo import METRIC, RECIPE, race
from tinyclip_jax.train import Config

PAPER = (1.4, 7.8)


def main() -> None:
    parser = bench.parser(__doc__, seeds=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[200, 600])
    args = parser.parse_args()
    rows = []
    for steps in args.steps:
        for seed in args.seeds:
            cfg = config.load(RECIPE)
            assert isinstance(cfg, Config)
            every = max(steps // 20, 1)
            cfg = replace(
                cfg,
                seed=seed,
                steps=steps,
                eval_every=every,
                log_every=every,
                pipeline=replace(cfg.pipeline, seed=seed),
            )
            with tempfile.TemporaryDirectory() as folder:
                donors = {"inherited": cfg.donor, "scratch": ""}
                races = {name: race(replace(cfg, donor=donor), Path(folder) / name) for name, donor in donors.items()}
            scores = {name: race.final[METRIC] for name, race in races.items()}
            reached = races["inherited"].reaches(scores["scratch"], ge)
            rows.append({"steps": steps, "seed": seed, **scores, "reached": reached})
            print(rows[-1], flush=True)
    print(f"\n{'steps':>6} {'inherited R@1':>16} {'scratch R@1':>16} {'speed-up':>22}   paper {PAPER[0]}-{PAPER[1]}x")
    for steps, mine in bench.groups(rows, "steps").items():
        inherited, scratch = (
            bench.spread([100 * row[name] for row in mine], unit=" %") for name in ("inherited", "scratch")
        )
        ratios = [steps / max(row["reached"], 1) if row["reached"] is not None else 0.0 for row in mine]
        print(f"{steps:>6} {inherited:>16} {scratch:>16} {min(ratios):>9.1f}x to {max(ratios):>6.1f}x")
    bench.write(args.json, bench.header() | {"rows": rows})


if __name__ == "__main__":
    main()
