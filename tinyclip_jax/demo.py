"""`heirloom demo`: a student inherits from the embedded teacher and races one from scratch, on held-out emoji."""

import tempfile
import time
from dataclasses import dataclass, replace
from operator import ge
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from heirloom.common import config
from heirloom.common.data.pictures import decode
from heirloom.common.data.pipeline import evaluation_batches
from heirloom.common.data.sources import open_source
from heirloom.common.demo import Race
from heirloom.common.files import staged
from heirloom.common.mesh import start
from heirloom.common.nn.functional import functional
from heirloom.common.train.parameters import load_params
from tinyclip_jax.cost import parameters
from tinyclip_jax.evaluate import Words, score_on, setup_of
from tinyclip_jax.model import Clip
from tinyclip_jax.train import Config
from tinyclip_jax.zoo import open_clip_model

RECIPE = "tinyclip/emoji"
METRIC = "r1"
QUERIES, RESULTS = 6, 5
COLOURS = {"inherited": "#c8553d", "scratch": "#588b8b"}


def run(seed: int, out: Path) -> dict[str, Any]:
    """Train both students, print the table, write `out/demo.png`; returns what `--json` writes."""
    started = time.perf_counter()
    loaded = config.load(RECIPE)
    assert isinstance(loaded, Config)
    cfg = replace(loaded, seed=seed, pipeline=replace(loaded.pipeline, seed=seed))
    console = Console()
    teacher, spec = open_clip_model(cfg.teacher), functional(Clip, cfg.student).spec
    counts = {"teacher": parameters(teacher.model.spec), "student": parameters(spec)}
    sizes = f"teacher: {counts['teacher']['total']:,} parameters, student: {counts['student']['total']:,}"
    steps = f"{cfg.steps} steps of {cfg.pipeline.batch} emoji each, first inheriting, then from scratch"
    console.print(f"{sizes}. {steps}.")
    with tempfile.TemporaryDirectory(dir=out) as folder:  # in `out`, so that the result can be renamed into place
        donors = {"inherited": cfg.donor, "scratch": ""}
        races = {name: race(replace(cfg, donor=donor), Path(folder) / name) for name, donor in donors.items()}
        scores = {"teacher": _score(cfg, cfg.teacher)} | {name: race.final for name, race in races.items()}
        with staged(out / "student", force=True) as student:
            races["inherited"].weights.rename(student)
        students = {"inherited": out / "student", "scratch": races["scratch"].weights}
        picture = draw(cfg, races, scores["teacher"][METRIC], students, out)

    caught_up = races["inherited"].reaches(scores["scratch"][METRIC], ge)
    seconds = time.perf_counter() - started
    console.print("\nretrieval on 300 concepts that no model was trained on", soft_wrap=True)
    console.print(_table(counts, scores))
    r1 = {name: f"{100 * score[METRIC]:.1f} %" for name, score in scores.items()}
    said = f"{r1['inherited']} with inheritance, {r1['scratch']} from scratch, {r1['teacher']} for the teacher"
    console.print(f"held-out R@1: {said}", soft_wrap=True)
    reached = f"after {caught_up} of {cfg.steps} steps" if caught_up is not None else f"not within {cfg.steps} steps"
    last = f"{reached}; took {seconds:.0f} s"
    console.print(f"the inherited student reached scratch's final score {last}", soft_wrap=True)
    console.print(f"picture: {picture}   student: {out / 'student'}", soft_wrap=True)
    return {
        "parameters": {name: count["total"] for name, count in counts.items()},
        "scores": scores,
        "curves": {name: {"step": race.steps, METRIC: race.scores} for name, race in races.items()},
        "steps": cfg.steps,
        "steps_to_scratch": caught_up,
        "seconds": round(seconds, 1),
        "picture": str(picture),
    }


def race(cfg: Config, folder: Path) -> Race:
    """Train one student; returns its scores over the steps, the score before the first step included."""
    before = next(row["value"] for row in cfg.evaluate() if row["metric"] == METRIC) / 100
    cfg.train(folder)
    return Race.of(folder, METRIC, before)


def _score(cfg: Config, source: str) -> dict[str, float]:
    donor, mesh = open_clip_model(source), start(cfg.mesh)
    score = score_on(cfg.held_out, "retrieval", setup_of(donor, mesh), Words())
    return score(load_params(donor, mesh)).summary()


def _table(counts: dict[str, dict[str, int]], scores: dict[str, dict[str, float]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for header in ("", "parameters", "R@1", "R@5", "R@10"):
        table.add_column(header, justify="right" if header else "left")
    for name, metrics in scores.items():
        count = counts["teacher" if name == "teacher" else "student"]["total"]
        table.add_row(name, f"{count:,}", *(f"{100 * metrics[f'r{k}']:.1f} %" for k in (1, 5, 10)))
    return table


def draw(cfg: Config, races: dict[str, Race], teacher: float, weights: dict[str, Path], out: Path) -> Path:
    """Draw both curves, and each student's results for captions that the teacher gets right; returns the PNG."""
    from matplotlib.figure import Figure

    found = {name: _search(cfg, str(path)) for name, path in {"teacher": cfg.teacher, **weights}.items()}
    right = [i for i, row in enumerate(found["teacher"].order) if found["teacher"].hit[i, row[0]]]
    queries = np.random.default_rng(0).permutation(right)[:QUERIES]

    figure = Figure(figsize=(14, 5.6), layout="constrained", facecolor="white")
    left, middle = list(figure.subfigures(1, 2, width_ratios=(1, 1.7)))  # type: ignore[arg-type]
    axes = left.subplots()
    for name, race in races.items():
        axes.plot(race.steps, [100 * r for r in race.scores], color=COLOURS[name], linewidth=2.5, label=name)
    axes.axhline(100 * teacher, color="#888", linestyle="--", linewidth=1)
    axes.annotate("teacher", (0, 100 * teacher), (2, 3), textcoords="offset points", color="#666")
    axes.set(xlabel="step", ylabel="R@1 on held-out concepts, %", ylim=(0, None), xlim=(0, cfg.steps))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right")
    grid = middle.subplots(QUERIES, 2, gridspec_kw={"wspace": 0.04})
    for row, query in zip(grid, queries, strict=True):
        for cell, name in zip(row, COLOURS, strict=True):
            cell.imshow(_strip(found[name], query))
            cell.set_xticks([])
            cell.set_yticks([])
            cell.spines[:].set_visible(False)
        row[0].set_ylabel(found["teacher"].captions[query], rotation=0, ha="right", va="center", fontsize=11)
    titles = {"inherited": "what the inherited student finds", "scratch": "the same from scratch"}
    for cell, (name, title) in zip(grid[0], titles.items(), strict=True):
        cell.set_title(title, color=COLOURS[name], fontsize=12)
    with staged(out / "demo.png", force=True) as file:
        figure.savefig(file, dpi=120, format="png")
    return out / "demo.png"


@dataclass(frozen=True)
class _Found:
    """For each caption, the pictures in order of similarity, and which of them are right."""

    captions: list[str]
    order: np.ndarray
    hit: np.ndarray
    pictures: list[Image.Image]


def _search(cfg: Config, source: str) -> _Found:
    donor, mesh = open_clip_model(source), start(cfg.mesh)
    setup, data = setup_of(donor, mesh), open_source(cfg.held_out)
    records = [data[i] for i in range(len(data))]
    captions = sorted({record["text"] for record in records})
    params = load_params(donor, mesh)
    encode = jax.jit(lambda params, x: donor.model.apply(params, x, method="encode_image"))
    batches = evaluation_batches(data, 100, setup.pre)
    image = np.concatenate([np.asarray(encode(params, batch["image"])) for batch in batches])
    tokens = setup.tokenizer(captions, donor.cfg.text.context)
    text = np.asarray(donor.model.apply(params, tokens, method="encode_text"))
    hit = np.array([[record["text"] == caption for record in records] for caption in captions])
    pictures = [decode(record["image"]) for record in records]
    return _Found(captions=captions, order=np.argsort(-(text @ image.T), axis=1), hit=hit, pictures=pictures)


def _strip(found: _Found, query: int) -> np.ndarray:
    """Draw the first results in a row, right ones in a green frame."""
    side, edge = 64, 5
    strip = np.full((side + 2 * edge, RESULTS * (side + 3 * edge), 3), 255, np.uint8)
    for i, index in enumerate(found.order[query, :RESULTS]):
        x = i * (side + 3 * edge)
        if found.hit[query, index]:
            strip[:, x : x + side + 2 * edge] = (60, 160, 80)
        strip[edge:-edge, x + edge : x + edge + side] = np.asarray(found.pictures[index].resize((side, side)))
    return strip
