"""What a report shows of a run, read from its folder."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from heirloom.common.data.labelled import LABELS, read_labels
from heirloom.common.errors import InputError
from heirloom.common.evaluate.scored import printed
from heirloom.common.fetch import fetch_folder
from heirloom.common.files import read_json
from heirloom.common.paths import METRICS, Address, AnyPath, stages_of
from heirloom.common.train import about
from heirloom.common.train.metrics import MetricsFile, last_scores

FIRST_BATCH = "first_batch.png"
SAMPLES = 8  # grids of samples shown
PROVENANCE = ("provenance.json", "pruned/provenance.json")
EVALUATION, DONOR_EVALUATION = "eval.json", "eval_donor.json"
"""Files that `heirloom eval RUN --json` and `heirloom eval DONOR --json` may write into the run's folder."""
SMALL = ("config.json", METRICS, about.FILE, "sources.json", f"model/{LABELS}")
FILES = (*SMALL, *PROVENANCE, EVALUATION, DONOR_EVALUATION, FIRST_BATCH)
"""What is downloaded of a run in a bucket, and samples."""
NUMBER = (int, float)
START = dict(time=str, command=str, python=str, versions=dict, backend=str, devices=dict, processes=int)
STUDENT = dict(parameters=dict, macs=NUMBER)


@dataclass(frozen=True)
class ScoreRow:
    """A score of a run; shares are in percent. donor: of the donor or teacher on the same data. n: examples."""

    data: str
    metric: str
    value: float | None
    donor: float | None = None
    published: float | None = None
    n: int | None = None


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A run. lines: of metrics.jsonl, at least one. about: RUN/about.json, empty for runs of older versions.

    inherited: provenance of the student's first weights. labels: class names. rows, donor_rows: those of `eval --json`.
    samples: paths of grids in order of their steps.
    """

    name: str
    lines: Sequence[dict[str, Any]]
    config: Mapping[str, Any]
    about: Mapping[str, Any]
    sources: Mapping[str, Any]
    inherited: Mapping[str, Any] | None
    labels: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]]
    donor_rows: Sequence[Mapping[str, Any]]
    first_batch: Path | None
    samples: Sequence[Path]

    @property
    def step(self) -> int:
        return self.lines[-1]["step"]

    @property
    def starts(self) -> Sequence[Mapping[str, Any]]:
        """Every start of the run: time, command, versions, devices."""
        return self.about.get("starts", [])

    @property
    def recipe(self) -> str:
        """The recipe's name or file, by the command; empty where a program ran it."""
        found = re.match(r"heirloom train (\S+)", self.starts[-1]["command"]) if self.starts else None
        return found[1] if found else ""

    @property
    def seconds(self) -> float | None:
        """Seconds of training over all starts, up to the last line of each; None where the lines have no times."""
        times = [line["timing"]["seconds"] for line in self.lines if "timing" in line]
        # The clock of each start begins at zero.
        ends = [time for time, after in pairwise([*times, 0.0]) if after < time]
        return sum(ends) if times else None

    def scores(self) -> list[ScoreRow]:
        """Returns the last held-out scores of the training, then those of `heirloom eval --json`."""
        step, scores = last_scores(self.lines)
        held_out = self.config.get("held_out") or {}
        path, split = held_out.get("path") or "", held_out.get("split") or ""
        data = "/".join(filter(None, (path, split))) or "held out"
        rows = []
        for metric, value in scores.items():
            if value is None or isinstance(value, int | float):
                donor = self._donor(metric, (data, path))
                where = f"{data}, step {step:,}"
                rows.append(ScoreRow(where, metric, None if value is None else printed(metric, value), donor))
        for row in self.rows:
            data, metric, beside = row["dataset"], row["metric"], row.get("beside")
            donor = self._donor(metric, (data,)) if beside is None else beside
            rows.append(ScoreRow(data, metric, row["value"], donor, row.get("published"), row.get("n")))
        return rows

    def _donor(self, metric: str, data: Sequence[str]) -> float | None:
        found = (row["value"] for row in self.donor_rows if row["metric"] == metric and row["dataset"] in data)
        return next(found, None)


def open_runs(places: Sequence[AnyPath]) -> list[Shown]:
    """Reads runs. Raises InputError where a place is no run, and where a file of it is damaged."""
    names = [place.name or str(place) for place in places]
    if len(set(names)) < len(names):  # runs/a/stage_1 and runs/b/stage_1
        names = [str(place) for place in places]
    return [_open(place, name) for place, name in zip(places, names, strict=True)]


def _open(place: AnyPath, name: str) -> Shown:
    run = _downloaded(place) if isinstance(place, Address) else place
    if not (run / METRICS).is_file():
        stages = stages_of(run)
        advice = "heirloom train CONFIG --run DIR makes one"
        if stages:
            advice = f"its stages are runs: heirloom report {' '.join(map(str, stages))}"
        raise InputError(f"{place} is not a run: it has no metrics.jsonl ({advice})")
    lines = MetricsFile(run / METRICS).lines()
    if not lines:
        raise InputError(f"{place}: metrics.jsonl is empty so far; wait for the first line")
    provenance = next((run / file for file in PROVENANCE if (run / file).is_file()), None)
    found = _table(run / about.FILE)
    starts, student = found.get("starts", []), found.get("student")
    _expect(run / about.FILE, isinstance(starts, list) and all(_has(start, **START) for start in starts))
    _expect(run / about.FILE, not student or (_has(student, **STUDENT) and "total" in student["parameters"]))
    sources = _table(run / "sources.json")
    _expect(run / "sources.json", all(_has(source, path=str, sha256=list) for source in sources.values()))
    inherited = _table(provenance) if provenance else None
    if provenance and inherited is not None:
        right = _has(inherited, fraction=NUMBER, source=str, parameters=dict)
        _expect(provenance, right and all(_has(x, fraction=NUMBER, maps=str) for x in inherited["parameters"].values()))
    return Shown(
        name=name if name not in ("", ".", "..") else Path(place).resolve().name,  # type: ignore[arg-type]
        lines=lines,
        config=_table(run / "config.json"),
        about=found,
        sources=sources,
        inherited=inherited,
        labels=(read_labels(run / "model") or ()) if (run / "model" / LABELS).is_file() else (),
        rows=_rows(run / EVALUATION),
        donor_rows=_rows(run / DONOR_EVALUATION),
        first_batch=run / FIRST_BATCH if (run / FIRST_BATCH).is_file() else None,
        samples=_spread(sorted(run.glob("samples/*.png"))),
    )


def _downloaded(run: Address) -> Path:
    """Returns a local copy of what a report shows of a run in a bucket."""
    try:
        found = run.files()
    except OSError as error:
        raise InputError(f"{run} is not readable: {error.strerror or error}") from error
    return fetch_folder(run, found, lambda name: name in FILES or fnmatch(name, "samples/*.png"))


def _table(file: Path) -> dict[str, Any]:
    """Reads a JSON object; empty without the file."""
    return read_json(file) if file.is_file() else {}


def _rows(file: Path) -> list[dict[str, Any]]:
    """Reads the rows of `heirloom eval --json`; none without the file."""
    if not file.is_file():
        return []
    rows, optional = _table(file).get("rows"), (*NUMBER, type(None))

    def right(row: Any) -> bool:
        known = _has(row, dataset=str, metric=str, value=optional)
        return known and all(isinstance(row.get(name), optional) for name in ("published", "beside", "n"))

    if not isinstance(rows, list) or not all(map(right, rows)):
        raise InputError(f"{file} is not what heirloom eval --json writes; rename or remove it")
    return rows


def _has(value: object, /, **types: Any) -> bool:
    """Returns whether a value is a JSON object with these fields, each of its type."""
    return isinstance(value, dict) and all(key in value and isinstance(value[key], t) for key, t in types.items())


def _expect(file: Path, right: bool) -> None:
    if not right:
        raise InputError(f"{file} is damaged: a part that a training writes is missing or wrong; restore or remove it")


def _spread(files: list[Path]) -> list[Path]:
    """Picks at most SAMPLES files, evenly spread over the run, the first and the last included."""
    if len(files) <= SAMPLES:
        return files
    return [files[round(i)] for i in np.linspace(0, len(files) - 1, SAMPLES)]


def flattened(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Yields the fields of a config as (name with dots, JSON)."""
    if isinstance(value, Mapping) and value:
        for key, one in value.items():
            yield from flattened(one, f"{name}.{key}".lstrip("."))
    else:
        yield name, json.dumps(value)


def duration(seconds: float | None) -> str:
    """Returns `12 s`, or hours, minutes and seconds as `1:02:03`; `-` for None."""
    if seconds is None:
        return "-"
    return f"{seconds:.0f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
