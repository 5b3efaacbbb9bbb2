"""Text to image at 64 pixels: LiT students of a small donor, from scratch, inherited, and inherited and distilled.

    heirloom train lit/icons_donor --run runs/icons_donor
    python benchmarks/icons.py --runs runs/icons --json benchmarks/results/icons.json    # about an hour

Every arm has the recipe `lit/icons`; the seeds differ in initial weights, order and noise. --runs keeps what is done:
the same command continues. Scores are of 300 seen prompts (icons and emoji of the training set) and of 300 unseen ones
(pairs of object and colour that no training picture shows), one picture each, from the same noise for every model:

- object, colour, both: share of drawn icons whose outline and mean colour are nearest to those of the prompt
  (`lit_jax.icon_scores`);
- retrieval: share of pictures whose own prompt is the nearest among 100 by the embedded CLIP, which was trained on
  emoji and never on these icons: real pictures are its upper bound;
- KID: of that CLIP's image features, to the real pictures of the same prompts, times 1000.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench
import numpy as np

import tinyclip_jax
from heirloom.common import config
from heirloom.common.evaluate.fid import kid
from heirloom.common.train.mesh import start
from heirloom.common.train.parameters import load_params
from lit_jax.demo import race
from lit_jax.icon_scores import Icons, Judge, read_icons
from lit_jax.text_cache import TextCache
from lit_jax.text_inputs import named_data, open_drawer, write_cache
from lit_jax.text_progress import held_out_error
from lit_jax.text_recipe import Config
from lit_jax.zoo import open_pixart

COUNT, AMONG = 300, 100
GUIDANCE: dict[str, dict[str, Any]] = {
    "guided in the middle 60 % of the steps": {"guided_steps": (0.2, 0.8)},
    "guided in the first half": {"guided_steps": (0.0, 0.5)},
    "not guided": {"guidance": 1.0},
}
ARMS = {"scratch": ("", ""), "inherited": ("donor", ""), "inherited, distilled": ("donor", "teacher")}


def arm(cfg: Config, name: str, seed: int) -> Config:
    """The recipe of one arm and seed."""
    donor, teacher = (getattr(cfg, field) if field else "" for field in ARMS[name])
    pipeline, step = replace(cfg.pipeline, seed=seed), replace(cfg.step, seed=seed)
    return replace(cfg, donor=donor, teacher=teacher, seed=seed, pipeline=pipeline, step=step)


def measured(drawn: np.ndarray, icons: Icons, judge: Judge, clip: Any, real: np.ndarray) -> dict[str, float]:
    """Scores of one picture for each prompt. real: image features of the real pictures."""
    things = np.flatnonzero([bool(name) for name in icons.objects])
    found = judge.scores(drawn[things], [icons.objects[i] for i in things], [icons.colours[i] for i in things])
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
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    loaded = config.load("lit/icons")
    assert isinstance(loaded, Config)
    cfg = replace(loaded, steps=args.steps, save_every=args.steps)
    folder = args.runs / "cache"
    if not (folder / "held_out").is_dir():
        with_caches(cfg, folder)
    data, held_out = replace(cfg.data, path=str(folder / "train")), replace(cfg.held_out, path=str(folder / "held_out"))
    cfg = replace(cfg, data=data, held_out=held_out)

    train = read_icons("train", emoji=True)
    sets = {"seen": train.some(COUNT, 0), "unseen": read_icons("test").some(COUNT, 0)}
    judge, clip = Judge(read_icons("train")), tinyclip_jax.load("embedded:emoji")
    rows = []
    fixed = {"real": ("real", cfg), "donor": (cfg.teacher, cfg)}
    for name, guidance in GUIDANCE.items():
        fixed[f"donor, {name}"] = cfg.teacher, replace(cfg, sample=replace(cfg.sample, **guidance))
    for name, (source, how) in fixed.items():
        file = args.runs / f"{name.replace(', ', '-').replace(' ', '_')}.json"
        row = bench.once(file, lambda: scores(how, source, sets, judge, clip))  # noqa: B023
        mse = None if name == "real" else bench.once(file.with_suffix(".loss"), lambda: loss(cfg, source))  # noqa: B023
        rows.append({"model": name, "mse": mse} | row)
        print(rows[-1], flush=True)
    for seed in args.seeds:
        for name in ARMS:
            run = args.runs / f"{name}-{seed}".replace(", ", "-")
            one = arm(cfg, name, seed)
            curve = bench.once(run.with_suffix(".json"), lambda: vars_of(race(one, run)))  # noqa: B023
            model, file = str(run / "model"), run.with_suffix(".scores.json")
            row = bench.once(file, lambda: scores(one, model, sets, judge, clip))  # noqa: B023
            rows.append({"model": name, "seed": seed, "mse": curve["scores"][-1], "curve": curve} | row)
            print({k: v for k, v in rows[-1].items() if k != "curve"}, flush=True)
    report(rows, args.steps)
    bench.write(args.json, bench.header() | {"steps": args.steps, "prompts": COUNT, "rows": rows})


def with_caches(cfg: Config, folder: Path) -> None:
    """Encodes the pictures and captions of a recipe into `folder`."""
    for name, data in named_data(cfg).items():
        write_cache(cfg, data, folder / name)


def loss(cfg: Config, source: str) -> float:
    """The held-out loss of a checkpoint."""
    donor, mesh = open_pixart(source), start(cfg.mesh)
    return held_out_error(donor.model, TextCache(cfg.held_out.path), mesh)(load_params(donor, mesh)).metrics["mse"]


def draw(cfg: Config, source: str, prompts: Sequence[str]) -> np.ndarray:
    """A picture of each prompt, uint8 [prompt, side, side, 3]. All models begin with the same noise."""
    donor, mesh = open_pixart(source), start(cfg.mesh)
    drawer = open_drawer(replace(cfg, student=donor.cfg), donor.model, TextCache(cfg.data.path), mesh, prompts)
    return drawer(load_params(donor, mesh))


def vars_of(run: Any) -> dict[str, Any]:
    return {"steps": run.steps, "scores": run.scores}


def report(rows: list[dict[str, Any]], steps: int) -> None:
    """Prints the table, and when the inherited students reach the last error of those from scratch."""
    names = ("object", "colour", "both", "retrieval", "kid_1000")
    head = ["model", "held-out error", *(f"{kind} {name}" for kind in ("seen", "unseen") for name in names)]
    table = []
    for model, found in bench.groups(rows, "model").items():
        cells = [[row[kind][name] for row in found] for kind in ("seen", "unseen") for name in names]
        errors = "" if found[0]["mse"] is None else bench.spread([row["mse"] for row in found], 4)
        table.append([model, errors, *(bench.spread(values, 2) for values in cells)])
    print("\n".join(bench.markdown(head, table)))
    last = {row["seed"]: row["mse"] for row in rows if row["model"] == "scratch"}
    for row in rows:
        if "curve" in row and row["model"] != "scratch":
            pairs = zip(row["curve"]["steps"], row["curve"]["scores"], strict=True)
            reached = next((step for step, score in pairs if score <= last[row["seed"]]), None)
            print(f"{row['model']}, seed {row['seed']}: scratch's last error after {reached} of {steps} steps")


if __name__ == "__main__":
    main()
