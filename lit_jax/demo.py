"""`heirloom demo lit`: a LiT inherits from the embedded DiT and is distilled from it; a second one is trained from
scratch, on digits.
"""

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

from heirloom.common import config
from heirloom.common.checkpoint.staging import staged
from heirloom.common.data.grid import grid
from heirloom.common.data.labelled import open_labelled
from heirloom.common.data.pictures import decode
from heirloom.common.data.sources import SourceConfig
from heirloom.common.demo import Race
from heirloom.common.evaluate.fid import kid
from heirloom.common.nn.functional import functional
from heirloom.common.train import recipe
from heirloom.common.train.mesh import start
from heirloom.common.train.parameters import load_params
from lit_jax.decode import check_finite, to_uint8
from lit_jax.dit import Dit, parameters
from lit_jax.progress import held_out_loss
from lit_jax.sample import drawer
from lit_jax.train import Config
from lit_jax.zoo import open_dit

RECIPE = "lit/digits"
METRIC = "mse"
PER_CLASS, SHOWN_PER_CLASS = 30, 6  # pictures of each class that are drawn for the scores, and that the grid shows
COLOURS = {"inherited": "#c8553d", "scratch": "#588b8b"}


def run(seed: int, out: Path) -> dict[str, Any]:
    """Train both students, draw from teacher and students, write `out/demo.png`. Returns the content of `--json`."""
    started = time.perf_counter()
    loaded = config.load(RECIPE)
    assert isinstance(loaded, Config)
    cfg = replace(loaded, seed=seed, pipeline=replace(loaded.pipeline, seed=seed), step=replace(loaded.step, seed=seed))
    console = Console()
    teacher = open_dit(cfg.teacher)
    counts = {
        "teacher": parameters(teacher.model.spec)["total"],
        "student": parameters(functional(Dit, cfg.student).spec)["total"],
    }
    console.print(
        f"teacher: a DiT of {counts['teacher']:,} parameters with softmax attention; student: a LiT of"
        f" {counts['student']:,}. {cfg.steps} steps of {cfg.pipeline.batch} digits each, first inheriting and"
        " distilled, then from scratch."
    )
    with tempfile.TemporaryDirectory(
        dir=out
    ) as folder:  # in the same folder as the result, which is renamed into place
        arms = {"inherited": cfg, "scratch": replace(cfg, donor="", teacher="")}
        races = {name: race(arm, Path(folder) / name) for name, arm in arms.items()}
        models = {"teacher": cfg.teacher} | {name: str(race.weights) for name, race in races.items()}
        drawn = {name: draw(cfg, source, seed) for name, source in models.items()}
        with staged(out / "student", force=True) as student:
            races["inherited"].weights.rename(student)

    losses = {"teacher": {METRIC: loss(cfg, cfg.teacher)}} | {name: race.final for name, race in races.items()}
    known, real = real_digits(cfg.data), real_digits(cfg.held_out)
    labels = np.tile(np.arange(cfg.student.classes), PER_CLASS)
    scores: dict[str, dict[str, float]] = {
        name: (
            losses[name]
            | {
                "kid": kid(real[0], features, seed=seed).mean,
                "recognised": nearest_neighbour_accuracy(known, features, labels),
            }
        )
        for name, features in ((name, pixel_features(pictures)) for name, pictures in drawn.items())
    }
    scores["real"] = {"recognised": nearest_neighbour_accuracy(known, *real)}
    caught_up = races["inherited"].reaches(scores["scratch"][METRIC], le)
    picture = plot(races, scores["teacher"][METRIC], drawn, out)
    seconds = time.perf_counter() - started
    console.print(
        "\nloss on held-out digits, KID to real digits (lower is better), share recognised as their class",
        soft_wrap=True,
    )
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
    """Train one student. The curve starts with its loss before the first step."""
    before = recipe.evaluate(cfg, cfg.parts()).metrics[METRIC]
    cfg.train(folder)
    return Race.of(folder, METRIC, before)


def loss(cfg: Config, source: str) -> float:
    """Compute the held-out loss of a checkpoint."""
    donor, mesh = open_dit(source), start(cfg.mesh)
    return held_out_loss(cfg, donor.model, mesh)(load_params(donor, mesh)).metrics[METRIC]


def draw(cfg: Config, source: str, seed: int) -> np.ndarray:
    """Draw pictures of every class in turn, uint8 [30 x 10, side, side, 3]. All models start from the same noise."""
    donor, mesh = open_dit(source), start(cfg.mesh)
    labels = np.tile(np.arange(cfg.student.classes), PER_CLASS)
    drawn = drawer(donor.model, donor.cfg, cfg.sample, mesh)(load_params(donor, mesh), labels, jax.random.key(seed))
    return to_uint8(check_finite(drawn, "the model's output", where=f"{source}: "))


def real_digits(source: SourceConfig) -> tuple[np.ndarray, np.ndarray]:
    """Read the features (`pixel_features`) and labels of real digits."""
    opened = open_labelled(source, "label")
    records = [opened[i] for i in range(len(opened))]
    pictures = np.stack([np.asarray(decode(record["image"])) for record in records])
    return pixel_features(pictures), np.array([record["label"] for record in records])


def pixel_features(pictures: np.ndarray) -> np.ndarray:
    """Return pixels as features, float64 [n, side * side] in [-1, 1]: the mean of the channels. 64 pixels need no
    network.
    """
    return pictures.mean(-1).reshape(len(pictures), -1) / 127.5 - 1


def nearest_neighbour_accuracy(known: tuple[np.ndarray, np.ndarray], features: np.ndarray, labels: np.ndarray) -> float:
    """Compute the share of pictures whose nearest training digit has their label."""
    pictures, names = known
    distance = (pictures**2).sum(1) - 2 * features @ pictures.T
    return float((names[distance.argmin(1)] == labels).mean())


def _table(counts: dict[str, int], scores: dict[str, dict[str, float]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for header in ("", "parameters", "loss", "KID of pixels", "recognised"):
        table.add_column(header, justify="right" if header else "left")
    for name, metrics in scores.items():
        if name == "real":
            table.add_row("held-out digits", "", "", "", f"{metrics['recognised']:.1%}")
        else:
            count = counts["teacher" if name == "teacher" else "student"]
            table.add_row(
                name, f"{count:,}", f"{metrics[METRIC]:.4f}", f"{metrics['kid']:.4f}", f"{metrics['recognised']:.1%}"
            )
    return table


def plot(races: dict[str, Race], teacher: float, drawn: dict[str, np.ndarray], out: Path) -> Path:
    """Plot both loss curves and the pictures of teacher and students, a row for each digit. Returns the path of the
    PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5.6), layout="constrained", facecolor="white")
    left, right = list(figure.subfigures(1, 2, width_ratios=(1, 2.1)))  # type: ignore[arg-type]
    axes = left.subplots()
    for name, race in races.items():
        axes.plot(race.steps, race.scores, color=COLOURS[name], linewidth=2.5, label=name)
    axes.axhline(teacher, color="#888", linestyle="--", linewidth=1)
    axes.annotate(
        "teacher", (races["scratch"].steps[-1], teacher), (-2, 3), textcoords="offset points", color="#666", ha="right"
    )
    axes.set(
        xlabel="step",
        ylabel="squared error of the noise, held-out digits",
        yscale="log",
        xlim=(0, races["scratch"].steps[-1]),
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    for cell, (name, pictures) in zip(right.subplots(1, len(drawn)), drawn.items(), strict=True):
        pictures = np.pad(pictures, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
        classes, side = len(pictures) // PER_CLASS, pictures.shape[1]
        by_class = pictures.reshape(PER_CLASS, classes, *pictures.shape[1:])[:SHOWN_PER_CLASS].swapaxes(0, 1)
        cell.imshow(grid(by_class.reshape(-1, *pictures.shape[1:]), SHOWN_PER_CLASS), interpolation="nearest")
        cell.set_yticks(
            side * (np.arange(classes) + 0.5),
            map(str, range(classes)) if name == "teacher" else [""] * classes,
            fontsize=11,
        )
        cell.set_xticks([])
        cell.tick_params(length=0)
        cell.spines[:].set_visible(False)
        cell.set_title(
            {"teacher": "the teacher draws", "inherited": "the inherited student", "scratch": "the same from scratch"}[
                name
            ]
        )
    with staged(out / "demo.png", force=True) as file:
        figure.savefig(file, dpi=120, format="png")
    return out / "demo.png"
