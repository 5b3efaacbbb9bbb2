"""`heirloom report RUN`: the curves and pictures of a run in one self-contained HTML page."""

import base64
import html
import io
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from heirloom.common.checkpoint.staging import staged
from heirloom.common.checkpoint.weights import read_json
from heirloom.common.errors import InputError
from heirloom.common.fetch import fetch_folder
from heirloom.common.paths import Address, AnyPath
from heirloom.common.train.metrics import MetricsFile

PICTURES = ("first_batch.png",)
SAMPLES = 8  # grids of samples shown


def write(to: AnyPath) -> AnyPath:
    """Writes `RUN/report.html` from config and metrics, returns its path. Raises InputError unless RUN is a run."""
    run = _downloaded(to) if isinstance(to, Address) else to
    if not (run / "metrics.jsonl").is_file():
        raise InputError(f"{to} is not a run: it has no metrics.jsonl (heirloom train CONFIG --run DIR makes one)")
    lines = MetricsFile(run / "metrics.jsonl").lines()
    if not lines:
        raise InputError(f"{to}: metrics.jsonl is empty so far; wait for the first line")
    config = read_json(run / "config.json")
    samples = _spread(sorted(run.glob("samples/*.png")))
    pictures = [p for p in (*(run / name for name in PICTURES), *samples) if p.is_file()]
    parts = [
        f"<h1>{html.escape(run.name)}</h1><p>step {lines[-1]['step']:,}, loss {_number(lines[-1]['loss'])}</p>",
        *(_figure(name, *curve) for name, curve in _curves(lines).items()),
        *(
            f"<figure>{_image(p.read_bytes())}<figcaption>{html.escape(p.stem.replace('_', ' '))}</figcaption></figure>"
            for p in pictures
        ),
        f"<details><summary>config</summary><pre>{html.escape(json.dumps(config, indent=2))}</pre></details>",
    ]
    with staged(to / "report.html", force=True) as file:
        file.write_text(_PAGE.format(title=html.escape(run.name), body="\n".join(parts)))
    return to / "report.html"


def _downloaded(run: Address) -> Path:
    """Returns a local copy of what a report shows of a run in a bucket."""
    try:
        found = run.files()
    except OSError as error:
        raise InputError(f"{run} is not readable: {error.strerror or error}") from error
    shown = ("config.json", "metrics.jsonl", *PICTURES)
    return fetch_folder(run, found, lambda name: name in shown or fnmatch(name, "samples/*.png"))


def _spread(files: list[Path]) -> list[Path]:
    """Picks at most SAMPLES files, evenly spread over the run, including the last."""
    every = -(-len(files) // SAMPLES) if files else 1
    return files[::-1][::every][::-1]


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}}
figure{{display:inline-block;margin:0 1em 1em 0}}img{{max-width:100%}}figcaption{{color:#666;text-align:center}}</style>
{body}</html>
"""


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _curves(lines: list[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Collects every number of the metrics but `step`, loss first, with the steps it was written at."""
    curves: dict[str, tuple[list[int], list[float]]] = {"loss": ([], [])}
    for line in lines:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    return curves


def _figure(name: str, steps: list[int], values: list[float]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, color="#1f6f8b", marker="o" if len(steps) < 3 else None)
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    out = io.BytesIO()
    figure.savefig(out, dpi=110)
    return f"<figure>{_image(out.getvalue())}<figcaption>{html.escape(name)}</figcaption></figure>"


def _image(png: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
