"""`heirloom demo lit`: a LiT that draws icons from text inherits from the embedded PixArt and is distilled from it; a
second one is trained from scratch.
"""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from operator import le
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from heirloom.common import config
from heirloom.common.demo import Race
from heirloom.common.files import staged
from heirloom.common.mesh import start
from heirloom.common.nn.functional import functional
from heirloom.common.train import recipe
from heirloom.common.train.parameters import load_params
from lit_jax.icon_scores import Judge, read_icons
from lit_jax.pixart import PixArt, parameters
from lit_jax.text_cache import TextCache
from lit_jax.text_inputs import named_data, open_drawer, write_cache
from lit_jax.text_progress import held_out_error
from lit_jax.text_recipe import Config
from lit_jax.zoo import open_pixart

RECIPE = "lit/icons"
METRIC = "mse"
STEPS = 800  # of the recipe's, so that both students take a few minutes
SEEN = ("a purple cat", "a pink butterfly", "a black umbrella")
UNSEEN = ("a green car", "a blue horse", "a red flower")  # pairs that no training picture shows
SHOWN = SEEN + UNSEEN
PROMPTS = 100  # held-out pairs of object and colour that are drawn for the scores
COLOURS = {"inherited": "#c8553d", "scratch": "#588b8b"}
TITLES = {"teacher": "teacher", "inherited": "inherited\nstudent", "scratch": "the same\nfrom scratch"}


def run(seed: int, out: Path) -> dict[str, Any]:
    """Train both students, draw prompts with teacher and students, write `out/demo.png`. Returns the content of
    `--json`.
    """
    started = time.perf_counter()
    loaded = config.load(RECIPE)
    assert isinstance(loaded, Config)
    steps, pipeline = min(loaded.steps, STEPS), replace(loaded.pipeline, seed=seed)
    cfg = replace(loaded, steps=steps, seed=seed, pipeline=pipeline, step=replace(loaded.step, seed=seed))
    console = Console()
    teacher = open_pixart(cfg.teacher)
    counts = {
        "teacher": parameters(teacher.model.spec)["total"],
        "student": parameters(functional(PixArt, cfg.student).spec)["total"],
    }
    console.print(
        f"teacher: a PixArt of {counts['teacher']:,} parameters with softmax attention; student: a LiT of"
        f" {counts['student']:,}. {cfg.steps} steps of {cfg.pipeline.batch} icons each, first inheriting and"
        " distilled, then from scratch.",
        soft_wrap=True,
    )
    with tempfile.TemporaryDirectory(dir=out) as temporary:  # next to the result, which is renamed into place
        folder = Path(temporary)
        cfg = with_caches(cfg, folder / "cache")
        arms = {"inherited": cfg, "scratch": replace(cfg, donor="", teacher="")}
        races = {name: race(arm, folder / name) for name, arm in arms.items()}
        models = {"teacher": cfg.teacher} | {name: str(race.weights) for name, race in races.items()}
        unseen = read_icons("test").some(PROMPTS, seed)
        prompts = (*SHOWN, *unseen.prompts)
        pictures = {name: draw(cfg, source, prompts) for name, source in models.items()}
        losses = {"teacher": errors(cfg, cfg.teacher)} | {name: race.final for name, race in races.items()}
        with staged(out / "student", force=True) as student:
            races["inherited"].weights.rename(student)

    judge, names = Judge(read_icons("train")), (unseen.objects, unseen.colours)
    scores = {name: losses[name] | judge.scores(drawn[len(SHOWN) :], *names) for name, drawn in pictures.items()}
    scores["real"] = judge.scores(unseen.pictures, *names)
    caught_up = races["inherited"].reaches(scores["scratch"][METRIC], le)
    shown = {name: drawn[: len(SHOWN)] for name, drawn in pictures.items()}
    picture = plot(races, scores["teacher"][METRIC], shown, out)
    seconds = time.perf_counter() - started
    console.print(
        f"\nloss on held-out icons; of {PROMPTS} drawn prompts, whose object and colour no training picture shows"
        " together, the share with the right object, the right colour, and both",
        soft_wrap=True,
    )
    console.print(_table(counts, scores))
    reached = f"after {caught_up} of {cfg.steps} steps" if caught_up is not None else f"not within {cfg.steps} steps"
    console.print(f"the inherited student reached scratch's final loss {reached}; took {seconds:.0f} s", soft_wrap=True)
    console.print(f"picture: {picture}   student: {out / 'student'}", soft_wrap=True)
    console.print(f'try: heirloom sample {out / "student"} --prompt "{SEEN[0]}"', soft_wrap=True)
    return {
        "parameters": counts,
        "scores": scores,
        "curves": {name: {"step": race.steps, METRIC: race.scores} for name, race in races.items()},
        "steps": cfg.steps,
        "steps_to_scratch": caught_up,
        "seconds": round(seconds, 1),
        "picture": str(picture),
    }


def with_caches(cfg: Config, folder: Path) -> Config:
    """Encode the pictures and captions of a recipe into `folder` unless they are there, and return the recipe that
    reads them.
    """
    for name, data in named_data(cfg).items():
        if not (folder / name).exists():
            write_cache(cfg, data, folder / name)
    data, held_out = replace(cfg.data, path=str(folder / "train")), replace(cfg.held_out, path=str(folder / "held_out"))
    return replace(cfg, data=data, held_out=held_out)


def race(cfg: recipe.RunConfig, folder: Path) -> Race:
    """Train one student. The curve starts with its loss before the first step."""
    before = recipe.evaluate(cfg, cfg.parts()).metrics[METRIC]
    cfg.train(folder)
    return Race.of(folder, METRIC, before)


def errors(cfg: Config, source: str) -> dict[str, float]:
    """Compute the held-out errors of a checkpoint, with the right captions and with swapped ones."""
    donor, mesh = open_pixart(source), start(cfg.mesh)
    found = held_out_error(donor.model, TextCache(cfg.held_out.path), mesh)(load_params(donor, mesh))
    return dict(found.metrics)


def draw(cfg: Config, source: str, prompts: tuple[str, ...]) -> np.ndarray:
    """Draw a picture of each prompt, uint8 [prompt, side, side, 3]. All models start from the same noise."""
    donor, mesh = open_pixart(source), start(cfg.mesh)
    drawer = open_drawer(replace(cfg, student=donor.cfg), donor.model, TextCache(cfg.data.path), mesh, prompts)
    return drawer(load_params(donor, mesh))


def _table(counts: dict[str, int], scores: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for header in ("", "parameters", "loss", "object", "colour", "both"):
        table.add_column(header, justify="right" if header else "left")
    for name, metrics in scores.items():
        shares = [f"{metrics[share]:.1%}" for share in ("object", "colour", "both")]
        if name == "real":
            table.add_row("real icons", "", "", *shares)
        else:
            count = counts["teacher" if name == "teacher" else "student"]
            table.add_row(name, f"{count:,}", f"{metrics[METRIC]:.4f}", *shares)
    return table


def plot(races: dict[str, Race], teacher: float, drawn: dict[str, np.ndarray], out: Path) -> Path:
    """Plot both loss curves and the pictures of teacher and students, a column for each prompt. Returns the path of the
    PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), layout="constrained", facecolor="white")
    left, right = list(figure.subfigures(1, 2, width_ratios=(1, 2.1)))  # type: ignore[arg-type]
    axes = left.subplots()
    for name, race in races.items():
        axes.plot(race.steps, race.scores, color=COLOURS[name], linewidth=2.5, label=name)
    axes.axhline(teacher, color="#888", linestyle="--", linewidth=1)
    last = races["scratch"].steps[-1]
    axes.annotate("teacher", (last, teacher), (-2, 3), textcoords="offset points", color="#666", ha="right")
    axes.set(xlabel="step", ylabel="squared error of the noise, held-out icons", yscale="log", xlim=(0, last))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    cells = right.subplots(len(drawn), len(SHOWN))
    for row, (name, pictures) in zip(cells, drawn.items(), strict=True):
        for cell, prompt, picture in zip(row, SHOWN, pictures, strict=True):
            cell.imshow(picture)
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(False)
            if name == "teacher":
                cell.set_title(prompt + (" *" if prompt in UNSEEN else ""), fontsize=10)
        row[0].set_ylabel(TITLES[name], fontsize=10)
    right.supxlabel("* no training picture shows this object in this colour", fontsize=9, color="#666")
    with staged(out / "demo.png", force=True) as file:
        figure.savefig(file, dpi=120, format="png")
    return out / "demo.png"
