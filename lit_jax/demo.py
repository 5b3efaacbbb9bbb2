"""`heirloom demo lit`: a LiT inherits from the embedded DiT and is distilled from it, beside the same LiT from scratch, on emoji."""

import tempfile
import time
from dataclasses import replace
from operator import le
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from common import config
from common.checkpoint.weights import staged
from common.data.images import decode
from common.data.sources import open_source
from common.demo import Race
from common.evaluate.fid import kid
from common.nn.functional import functional
from common.train.mesh import shardings, start
from common.train.parameters import load_params
from lit_jax.data import adm_crop
from lit_jax.decode import Pictures
from lit_jax.dit import Dit, parameters
from lit_jax.sample import drawer, grid
from lit_jax.train import Config, held_out_loss, initial, opened
from lit_jax.zoo import open_dit

RECIPE = "lit/emoji"
METRIC = "mse"
CLASSES = ("activities", "animals", "flags", "food", "objects", "people", "smileys", "symbols", "travel")
OF_EACH, SHOWN = 16, 5  # pictures drawn of each class for the score, and those the grid has room for
THUMBNAIL = 8  # pixels
COLOURS = {"inherited": "#c8553d", "scratch": "#588b8b"}


def run(seed: int, out: Path) -> dict[str, Any]:
    """Train both students, draw from teacher and students, write `out/demo.png`; returns what `--json` writes."""
    started = time.perf_counter()
    loaded = config.load(RECIPE)
    assert isinstance(loaded, Config)
    cfg = replace(loaded, seed=seed, pipeline=replace(loaded.pipeline, seed=seed), step=replace(loaded.step, seed=seed))
    console = Console()
    teacher = open_dit(cfg.teacher)
    counts = {"teacher": parameters(teacher.model.spec)["total"], "student": parameters(functional(Dit, cfg.student).spec)["total"]}
    console.print(
        f"teacher: a DiT of {counts['teacher']:,} parameters with softmax attention; student: a LiT of {counts['student']:,}. "
        f"{cfg.steps} steps of {cfg.pipeline.batch} emoji each, first inheriting and distilled, then from scratch."
    )
    with tempfile.TemporaryDirectory(dir=out) as folder:  # beside the result, which is renamed into place
        arms = {"inherited": cfg, "scratch": replace(cfg, donor="", teacher="")}
        races = {name: race(arm, Path(folder) / name) for name, arm in arms.items()}
        models = {"teacher": cfg.teacher} | {name: str(race.weights) for name, race in races.items()}
        drawn = {name: draw(cfg, source, seed) for name, source in models.items()}
        with staged(out / "student", force=True) as student:
            races["inherited"].weights.rename(student)

    real = thumbnails(held_out_pictures(cfg))
    losses = {"teacher": {METRIC: loss(cfg, cfg.teacher)}} | {name: race.final for name, race in races.items()}
    scores = {name: losses[name] | {"kid": kid(real, thumbnails(pictures), seed=seed).mean} for name, pictures in drawn.items()}
    caught_up = races["inherited"].reaches(scores["scratch"][METRIC], le)
    picture = plot(races, scores["teacher"][METRIC], drawn, out)
    seconds = time.perf_counter() - started
    console.print("\nloss on held-out emoji, and distance of what is drawn from them (lower is better)", soft_wrap=True)
    console.print(_table(counts, scores))
    reached = f"after {caught_up} of {cfg.steps} steps" if caught_up is not None else f"not within {cfg.steps} steps"
    console.print(f"the inherited student reached scratch's final loss {reached}; took {seconds:.0f} s", soft_wrap=True)
    console.print(f"picture: {picture}   student: {out / 'student'}", soft_wrap=True)
    return {
        "parameters": counts,
        "scores": scores,
        "curves": {name: {"step": race.steps, METRIC: race.scores} for name, race in races.items()},
        "steps": cfg.steps,
        "steps_to_scratch": caught_up,
        "seconds": round(seconds, 1),
        "picture": str(picture),
    }


def race(cfg: Config, folder: Path) -> Race:
    """Train one student; its loss before the first step belongs to the curve."""
    mesh, student = start(cfg.mesh), functional(Dit, cfg.student)
    start_weights = initial(cfg, student, opened(cfg.donor), shardings(student.spec, mesh))
    before = held_out_loss(cfg, student, mesh)(start_weights)[METRIC]
    cfg.train(folder)
    return Race.of(folder, METRIC, before)


def loss(cfg: Config, source: str) -> float:
    """The held-out loss of a checkpoint."""
    donor, mesh = open_dit(source), start(cfg.mesh)
    return held_out_loss(cfg, donor.model, mesh)(load_params(donor, mesh))[METRIC]


def draw(cfg: Config, source: str, seed: int) -> np.ndarray:
    """Pictures of every class in turn, uint8 [16 x 9, side, side, 3], from the same noise whatever the model."""
    donor, mesh = open_dit(source), start(cfg.mesh)
    labels = np.tile(np.arange(cfg.student.classes), OF_EACH)
    return Pictures.to_uint8(drawer(donor.model, donor.cfg, cfg.sample, mesh)(load_params(donor, mesh), labels, jax.random.key(seed)))


def held_out_pictures(cfg: Config) -> np.ndarray:
    source = open_source(cfg.held_out)
    return np.stack([adm_crop(decode(source[i]["image"]), cfg.student.size) for i in range(len(source))])


def thumbnails(pictures: np.ndarray) -> np.ndarray:
    """Pictures shrunk to 8 x 8 by averaging, [n, 192] in [-1, 1]: coarse features, but honest ones for 32 pixels and no network."""
    n, side = pictures.shape[:2]
    cell = side // THUMBNAIL
    return pictures.reshape(n, THUMBNAIL, cell, THUMBNAIL, cell, 3).mean((2, 4)).reshape(n, -1) / 127.5 - 1


def _table(counts: dict[str, int], scores: dict[str, dict[str, float]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for header in ("", "parameters", "loss", f"KID of {THUMBNAIL} x {THUMBNAIL} thumbnails"):
        table.add_column(header, justify="right" if header else "left")
    for name, metrics in scores.items():
        count = counts["teacher" if name == "teacher" else "student"]
        table.add_row(name, f"{count:,}", f"{metrics[METRIC]:.4f}", f"{metrics['kid']:.4f}")
    return table


def plot(races: dict[str, Race], teacher: float, drawn: dict[str, np.ndarray], out: Path) -> Path:
    """Both curves, and what teacher and students draw side by side, a row for each class; returns the PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5.6), layout="constrained", facecolor="white")
    left, right = list(figure.subfigures(1, 2, width_ratios=(1, 2.1)))  # type: ignore[arg-type]
    axes = left.subplots()
    for name, race in races.items():
        axes.plot(race.steps, race.scores, color=COLOURS[name], linewidth=2.5, label=name)
    axes.axhline(teacher, color="#888", linestyle="--", linewidth=1)
    axes.annotate("teacher", (races["scratch"].steps[-1], teacher), (-2, 3), textcoords="offset points", color="#666", ha="right")
    axes.set(xlabel="step", ylabel="squared error of the noise, held-out emoji", yscale="log", xlim=(0, races["scratch"].steps[-1]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    for cell, (name, pictures) in zip(right.subplots(1, len(drawn)), drawn.items(), strict=True):
        classes = len(CLASSES)
        by_class = pictures.reshape(-1, classes, *pictures.shape[1:])[:SHOWN].swapaxes(0, 1)
        cell.imshow(grid(by_class.reshape(-1, *pictures.shape[1:]), SHOWN), interpolation="nearest")
        side = pictures.shape[1]
        cell.set_yticks(side * (np.arange(classes) + 0.5), CLASSES if name == "teacher" else [""] * classes, fontsize=11)
        cell.set_xticks([])
        cell.tick_params(length=0)
        cell.spines[:].set_visible(False)
        cell.set_title({"teacher": "the teacher draws", "inherited": "the inherited student", "scratch": "the same from scratch"}[name])
    with staged(out / "demo.png", force=True) as file:
        figure.savefig(file, dpi=120, format="png")
    return out / "demo.png"
