"""Text to image at 64 pixels: LiT students of a small donor, from scratch, inherited, and inherited and distilled.

    heirloom train lit/icons_donor --run runs/icons_donor
    python benchmarks/icons.py --runs runs/icons --json benchmarks/results/icons.json --png docs/icons.png  # two hours

Every arm has the recipe `lit/icons`; the seeds differ in initial weights, order and noise. The arm from scratch has the
best of three learning rates (its held-out error with one more seed). The arms "long" are trained for 30 % of the
donor's steps of the same size: do they reach the donor's own error? --runs keeps what is done: the same command
continues.
Scores are of 300 seen prompts and of 300 unseen ones (pairs of object and colour that no training picture shows), one
picture each, from the same noise for every model:

- object, colour, both: share of drawn icons whose outline and mean colour are nearest to those of the prompt
  (`lit_jax.icon_scores`);
- retrieval: share of pictures whose own prompt is the nearest among 100 by the embedded CLIP, which was trained on
  emoji and never on these icons: real pictures are its upper bound;
- KID: of that CLIP's image features, to the real pictures of the same prompts, times 1000.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import tinyclip_jax
from benchmarks import bench
from heirloom.common import config
from heirloom.common.evaluate.fid import kid
from lit_jax.demo import METRIC, RECIPE, SEEN, UNSEEN, draw, errors, race, with_caches
from lit_jax.icon_scores import Icons, Judge, read_icons
from lit_jax.text_recipe import Config

COUNT, AMONG = 300, 100
RATES, RATE_SEED = (5e-4, 1e-3, 2e-3), 100  # for the arm from scratch
LONG = {"inherited, distilled, long": 1.0, "inherited, distilled, long, twice the rate": 2.0}  # times the recipe's rate
SHOWN = {
    "shown in training": (*SEEN, "an orange house", "a red fish", "a yellow crown"),
    "not shown in this colour": (*UNSEEN, "a yellow tree", "a purple butterfly", "a red apple"),
}
GUIDANCE: dict[str, dict[str, Any]] = {
    "guided in the middle 60 % of the steps": {"guided_steps": (0.2, 0.8)},
    "guided in the first half": {"guided_steps": (0.0, 0.5)},
    "not guided": {"guidance": 1.0},
}
ARMS = {
    "scratch": ("", ""),
    "inherited": ("donor", ""),
    "inherited, distilled": ("donor", "teacher"),
} | dict.fromkeys(LONG, ("donor", "teacher"))


def arm(cfg: Config, name: str, seed: int, rate: float) -> Config:
    """The recipe of one arm and seed. rate: the learning rate from scratch."""
    donor, teacher = (getattr(cfg, field) if field else "" for field in ARMS[name])
    pipeline, step = replace(cfg.pipeline, seed=seed), replace(cfg.step, seed=seed)
    cfg = replace(cfg, donor=donor, teacher=teacher, seed=seed, pipeline=pipeline, step=step)
    if name == "scratch":
        return replace(cfg, optim=replace(cfg.optim, lr=rate))
    return long(cfg, LONG[name]) if name in LONG else cfg


def long(cfg: Config, times: float) -> Config:
    """The recipe over 30 % of the donor's steps, with the donor's average of weights. times: of the learning rate."""
    donor = config.load("lit/icons_donor")
    assert isinstance(donor, Config) and donor.pipeline.batch == cfg.pipeline.batch
    steps = donor.steps * 3 // 10
    step = replace(cfg.step, ema=donor.step.ema)
    optim = replace(cfg.optim, lr=times * cfg.optim.lr)
    return replace(cfg, steps=steps, eval_every=steps // 12, save_every=steps // 12, step=step, optim=optim)


def measured(drawn: np.ndarray, icons: Icons, judge: Judge, clip: Any, real: np.ndarray) -> dict[str, float]:
    """Scores of one picture for each prompt. real: image features of the real pictures."""
    found = judge.scores(drawn, icons.objects, icons.colours)
    features = np.asarray(clip.encode_image(list(drawn)))
    texts = np.asarray(clip.encode_text(list(icons.prompts)))
    blocks = [slice(i, i + AMONG) for i in range(0, len(icons), AMONG)]
    hits = [(features[b] @ texts[b].T).argmax(1) == np.arange(len(features[b])) for b in blocks]
    distance = kid(real, features, size=len(features), subsets=1, seed=0).mean
    return found | {"retrieval": float(np.concatenate(hits).mean()), "kid_1000": 1000 * distance}


def scores(cfg: Config, source: str, sets: Mapping[str, Icons], judge: Judge, clip: Any) -> dict[str, Any]:
    """Scores of a model on seen and unseen prompts; of the real pictures where `source` is "real"."""
    found: dict[str, Any] = {}
    for name, icons in sets.items():
        begun = time.perf_counter()
        pictures = icons.pictures if source == "real" else draw(cfg, source, icons.prompts)
        seconds = {} if source == "real" else {"seconds": round(time.perf_counter() - begun, 1)}
        real = np.asarray(clip.encode_image(list(icons.pictures)))
        found[name] = measured(pictures, icons, judge, clip, real) | seconds
    return found


def main() -> None:
    parser = bench.parser(__doc__, seeds=True)
    parser.add_argument("--runs", type=Path, required=True, help="keep every arm's run and scores here")
    parser.add_argument("--png", type=Path, help="write pictures of donor and longest trained student here")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--long-seeds", type=int, nargs="+", help="seeds of the long arms; default: all")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    loaded = config.load(RECIPE)
    assert isinstance(loaded, Config)
    cfg = with_caches(loaded, args.runs / "cache")

    train = read_icons("train")
    sets = {"seen": train.some(COUNT, 0), "unseen": read_icons("test").some(COUNT, 0)}
    judge, clip = Judge(train), tinyclip_jax.load("embedded:emoji")
    rows = []
    fixed = {"real": ("real", cfg), "donor": (cfg.teacher, cfg)}
    for name, guidance in GUIDANCE.items():
        fixed[f"donor, {name}"] = cfg.teacher, replace(cfg, sample=replace(cfg.sample, **guidance))
    for name, (source, how) in fixed.items():
        file = args.runs / f"{name.replace(', ', '-').replace(' ', '_')}.json"
        row = bench.once(file, lambda: scores(how, source, sets, judge, clip))  # noqa: B023
        error = lambda: errors(cfg, source)[METRIC]  # noqa: B023, E731
        mse = None if name == "real" else bench.once(file.with_suffix(".loss"), error)
        rows.append({"model": name, "mse": mse} | row)
        print(rows[-1], flush=True)
    tried = {}
    if "scratch" in args.arms:
        runs = {rate: args.runs / f"rate-{rate * 1e6:.0f}" for rate in RATES}
        tried = {rate: curve_of(arm(cfg, "scratch", RATE_SEED, rate), run)["scores"][-1] for rate, run in runs.items()}
        print(f"learning rates from scratch: {tried}", flush=True)
    rate = min(tried, key=tried.__getitem__, default=cfg.optim.lr)
    for seed in args.seeds:
        for name in args.arms:
            if name in LONG and seed not in (args.long_seeds or args.seeds):
                continue
            run = args.runs / f"{name}-{seed}".replace(", ", "-").replace(" ", "_")
            one = arm(cfg, name, seed, rate)
            curve = curve_of(one, run)
            model, file = str(run / "model"), run.with_suffix(".scores.json")
            row = bench.once(file, lambda: scores(one, model, sets, judge, clip))  # noqa: B023
            rows.append({"model": name, "seed": seed, "mse": curve["scores"][-1], "curve": curve} | row)
            print({k: v for k, v in rows[-1].items() if k != "curve"}, flush=True)
    if args.png:
        models = {"donor": cfg.teacher, "LiT": str(args.runs / f"inherited-distilled-long-{args.seeds[0]}" / "model")}
        prompts = tuple(prompt for group in SHOWN.values() for prompt in group)
        plot({name: draw(cfg, source, prompts) for name, source in models.items()}, args.png)
    report(rows)
    bench.write(args.json, bench.header() | {"steps": cfg.steps, "prompts": COUNT, "rates": tried, "rows": rows})


def curve_of(cfg: Config, run: Path) -> dict[str, Any]:
    """Steps and held-out errors of a training, which is done unless it was done before."""

    def trained() -> dict[str, Any]:
        done = race(cfg, run)
        return {"steps": done.steps, "scores": done.scores}

    return bench.once(run.with_suffix(".json"), trained)


def plot(drawn: Mapping[str, np.ndarray], file: Path) -> None:
    """Pictures of each model, a row each, over the prompts of SHOWN."""
    from matplotlib.figure import Figure

    prompts = [prompt for group in SHOWN.values() for prompt in group]
    figure = Figure(figsize=(len(prompts), 1.25 * len(drawn) + 0.2), layout="constrained", facecolor="white")
    groups = figure.subfigures(1, len(SHOWN), squeeze=False)[0]
    for group, (title, names) in zip(groups, SHOWN.items(), strict=True):
        group.suptitle(title, fontsize=10)
        cells = group.subplots(len(drawn), len(names), squeeze=False)
        for row, (model, pictures) in zip(cells, drawn.items(), strict=True):
            for cell, prompt in zip(row, names, strict=True):
                cell.imshow(pictures[prompts.index(prompt)])
                cell.set(xticks=[], yticks=[])
                cell.spines[:].set_visible(False)
                if model == next(iter(drawn)):
                    cell.set_title("\n".join(prompt.rsplit(" ", 1)), fontsize=8)
            if group is groups[0]:
                row[0].set_ylabel(model, fontsize=9)
    figure.savefig(file, dpi=100)


def report(rows: list[dict[str, Any]]) -> None:
    """Prints the table, and when the students reach the last error of those from scratch, and the donor's."""
    names = ("object", "colour", "both", "retrieval", "kid_1000")
    head = ["model", "held-out error", *(f"{kind} {name}" for kind in ("seen", "unseen") for name in names)]
    table = []
    for model, found in bench.groups(rows, "model").items():
        cells = [[row[kind][name] for row in found] for kind in ("seen", "unseen") for name in names]
        errors = "" if found[0]["mse"] is None else bench.spread([row["mse"] for row in found], 4)
        table.append([model, errors, *(bench.spread(values, 2) for values in cells)])
    print("\n".join(bench.markdown(head, table)))
    scratch = {row["seed"]: row["mse"] for row in rows if row["model"] == "scratch"}
    donor = next(row["mse"] for row in rows if row["model"] == "donor")
    for row in rows:
        if row["model"].startswith("inherited"):
            goals = {"the last error of the one from scratch": scratch.get(row["seed"], 0), "the donor's": 1.02 * donor}
            for what, goal in goals.items():
                pairs = zip(row["curve"]["steps"], row["curve"]["scores"], strict=True)
                step = next((step for step, score in pairs if score <= goal), None)
                print(f"{row['model']}, seed {row['seed']}: {what} after {step} of {row['curve']['steps'][-1]} steps")


if __name__ == "__main__":
    main()
