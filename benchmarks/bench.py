"""What the benchmarks share: flags, the head of a result file, timing, and tables of means over seeds."""

import argparse
import json
import math
import operator
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np

CPU = f"CPU, {platform.machine()}"


def parser(description: str | None, *, seeds: bool = False) -> argparse.ArgumentParser:
    """A parser with the flag --json, and --seeds where a benchmark has them; the description is printed as it is."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if seeds:
        found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    found.add_argument("--json", type=Path, help="write all results to this file")
    return found


def header(packages: Sequence[str] = ("jax", "flax", "optax"), **where: str | int) -> dict[str, Any]:
    """Returns the head of a result file: date, place (default: the device) and versions of installed `packages`."""
    found: dict[str, Any] = {"date": date.today().isoformat()} | (where or {"device": device()})
    return found | ({"versions": versions(packages)} if packages else {})


def device() -> str:
    """The kind of the accelerator, or the architecture of the CPU."""
    return jax.devices()[0].device_kind if jax.default_backend() != "cpu" else CPU


def versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write(file: Path | None, result: dict[str, Any], indent: int = 2) -> None:
    """Writes a result as JSON, its folder too; nothing where no file was asked for."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=indent) + "\n")


def once(path: Path, measure: Callable[[], Any]) -> Any:
    """What `measure` returns, from `path` if it was measured before."""
    if not path.exists():
        part = path.with_suffix(".part")
        part.write_text(json.dumps(measure()))
        part.rename(path)
    return json.loads(path.read_text())


def timed(run: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each call of `run`, whose arrays are waited for. Call it once before: compilation would count."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return seconds


def groups(rows: Iterable[dict[str, Any]], *keys: str) -> dict[Any, list[dict[str, Any]]]:
    """Rows by the value of a key, or by the tuple of values of several, in the order in which these first occur."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        name = row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys)
        found.setdefault(name, []).append(row)
    return found


def spread(values: Sequence[float], digits: int = 1, unit: str = "") -> str:
    """`mean +- standard deviation` over seeds; the deviation of one value is 0."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0
    return f"{statistics.mean(values):.{digits}f} +- {deviation:.{digits}f}{unit}"


def cell(values: Sequence[float], unit: str = "") -> str:
    """The same for a cell of a Markdown table, where one value stands alone and none leaves the cell empty."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation}{unit}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def steps_to(
    level: float, curve: Iterable[tuple[int, float]], better: Callable[[float, float], bool] = operator.ge
) -> float | None:
    """Steps at which a curve first has a score, by its logarithm between two points; None where it never does."""
    before = None
    for steps, value in sorted(curve):
        if better(value, level):
            if before is None:
                return float(steps)
            share = (level - before[1]) / (value - before[1])
            return math.exp(math.log(before[0]) + share * (math.log(steps) - math.log(before[0])))
        before = (steps, value)
    return None
