"""The curves of runs: which belong into one chart, and their drawing."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from heirloom.common.evaluate.scored import printed
from heirloom.common.report.html import Html, drawing, tag

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#6a3d9a", "#444444")
DASHES = ("-", "--", ":", "-.")
POINTS = 1000  # of a curve that are drawn
ALIKE = 50.0  # times: curves whose medians differ by more get charts of their own
STEEP = 10.0  # times: a curve that falls by more from its first value to its last has a logarithmic axis
OPTIMIZER = ("lr", "grad_norm", "skipped", "bad")
HEADINGS = ("Curves by step", "Optimizer", "Speed and memory")
TIMED = "timing/"


@dataclass(frozen=True)
class Timing:
    """How a number of `timing` is drawn: title of the chart, label of the curve, and its unit."""

    title: str
    label: str
    unit: float = 1.0


TIMING = {
    "examples_per_second": Timing("examples/s", "examples/s"),
    "mfu": Timing("MFU, %", "MFU", 0.01),
    "data_wait": Timing("share of time waiting for data, %", "data wait", 0.01),
    "step_p50": Timing("seconds of a step", "median"),
    "step_p95": Timing("seconds of a step", "95th percentile"),
    "step_max": Timing("seconds of a step", "longest"),
    "save_stall": Timing("seconds standing still for saves", "save stall"),
    "host_peak": Timing("peak memory of the host, GiB", "peak memory", 2.0**30),
}


@dataclass
class Curve:
    """Values by step; NaN, where nothing finite was counted, is a gap. colour: its number."""

    label: str
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    colour: int = 0

    def add(self, step: int, value: float | None) -> None:
        self.steps.append(step)
        self.values.append(math.nan if value is None else float(value))

    @property
    def finite(self) -> list[float]:
        return [value for value in self.values if not math.isnan(value)]

    def named(self, label: str, colour: int = 0, scale: float = 1.0) -> "Curve":
        """Returns the curve with another label, its values times `scale`."""
        return Curve(label, self.steps, [scale * value for value in self.values], colour)

    def same(self, other: "Curve") -> bool:
        return self.steps == other.steps and self.finite == other.finite


@dataclass(frozen=True)
class Chart:
    """Curves that are drawn together. keyed: the key names them. steep: the axis may be logarithmic."""

    title: str
    curves: Sequence[Curve]
    keyed: bool = True
    steep: bool = True


Section = tuple[str, list[Chart]]


def numbers(lines: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Returns the curve of each number in the lines, loss first; those of `timing` under `timing/NAME`.

    Left out are curves without a finite value, and counts that are zero throughout.
    """
    curves = {"loss": Curve("loss")}
    for line in lines:
        timing = line.get("timing")
        timed = {f"{TIMED}{name}": value for name, value in timing.items()} if isinstance(timing, dict) else {}
        for name, value in {**line, **timed}.items():
            if name != "step" and (value is None or isinstance(value, int | float)):
                curves.setdefault(name, Curve(name)).add(line["step"], value)
    idle = ("skipped", "bad", f"{TIMED}save_stall")
    return {name: c for name, c in curves.items() if c.finite and (name not in idle or any(c.finite))}


def sections(lines: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Returns the charts of one run under headings: curves, optimizer, speed and memory.

    A held-out score and the training's metric of the same name share a chart, as do scores that differ in their last
    number (r1, r5) and those whose name begins with that of another (mse, mse_swapped).
    """
    found = numbers(lines)
    timed = {name: found.pop(name) for name in list(found) if name.startswith(TIMED)}
    optimizer = [Chart(name, [found.pop(name)], keyed=False) for name in OPTIMIZER if name in found]
    names = list(dict.fromkeys(name.removeprefix("eval/") for name in found))
    charts = [chart for members in _families(names) for chart in _alike(_held_out(members, found))]
    speed: dict[str, list[Curve]] = {}
    for name, curve in timed.items():
        if timing := TIMING.get(name.removeprefix(TIMED)):
            curves = speed.setdefault(timing.title, [])
            curves.append(curve.named(timing.label, len(curves), 1 / timing.unit))
    last = [Chart(title, curves, keyed=len(curves) > 1, steep=len(curves) > 1) for title, curves in speed.items()]
    return [(title, made) for title, made in zip(HEADINGS, (charts, optimizer, last), strict=True) if made]


def compared(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Section]:
    """Returns a chart for each number, with a curve for each run that has it. runs: lines by the name of the run."""
    found = {run: numbers(lines) for run, lines in runs.items()}
    groups: dict[str, list[Chart]] = {heading: [] for heading in HEADINGS}
    for name in dict.fromkeys(name for curves in found.values() for name in curves):
        timing, metric = TIMING.get(name.removeprefix(TIMED)), name.removeprefix("eval/")
        heading, title, scale, steep = HEADINGS[1 if name in OPTIMIZER else 0], name, 1.0, True
        if name.startswith("eval/"):
            scale = printed(metric, 1.0)
            title = f"{metric}, held out" + (", %" if scale != 1 else "")
        elif name.startswith(TIMED):
            if not timing:
                continue
            several = sum(other.title == timing.title for other in TIMING.values()) > 1
            title = f"{timing.title}, {timing.label}" if several else timing.title
            heading, scale, steep = HEADINGS[2], 1 / timing.unit, several
        curves = [c[name].named(run, i, scale) for i, (run, c) in enumerate(found.items()) if name in c]
        groups[heading].append(Chart(title, curves, steep=steep))
    return [(heading, charts) for heading, charts in groups.items() if charts]


def _held_out(members: Sequence[str], found: Mapping[str, Curve]) -> list[Curve]:
    """Returns the curves of metrics, training and held out; shares that were scored on held-out data in percent."""
    curves: list[Curve] = []
    for name in members:
        scale = printed(name, 1.0) if f"eval/{name}" in found else 1.0
        for key, where in ((name, ", training"), (f"eval/{name}", ", held out")):
            if key in found:
                unit = ", %" if scale != 1 else ""
                curves.append(found[key].named(f"{name}{where}{unit}", len(curves), scale))
    return curves


def _families(names: Sequence[str]) -> list[list[str]]:
    """Groups metrics, in order: r1 with r5, mse with mse_swapped."""
    families: dict[str, list[str]] = {}
    for name in names:
        stem = re.sub(r"\d+$", "", name) or name
        longer = next((other for other in names if other != name and name.startswith(f"{other}_")), stem)
        families.setdefault(longer, []).append(name)
    return list(families.values())


def _alike(curves: list[Curve]) -> list[Chart]:
    """Returns one chart, or one for each curve where their sizes differ too much to be read together."""
    sizes = [median(map(abs, curve.finite)) for curve in curves]
    if len(curves) == 1 or min(sizes) * ALIKE < max(sizes):
        alone = [(curve.label.removesuffix(", training"), curve.named(curve.label)) for curve in curves]
        return [Chart(label, [curve], keyed=False) for label, curve in alone]
    names = dict.fromkeys(curve.label.partition(", ")[0] for curve in curves)
    return [Chart(", ".join(names), curves)]


def shown(charts: Sequence[Chart]) -> Html:
    """Returns charts as a grid that has as many columns as the page has room for.

    A curve that equals one before it, and one that is constant, is a line of text below.
    """
    drawn: list[Chart] = []
    told = []
    for chart in charts:
        first = chart.curves[0]
        twin = next((other for other in drawn if len(chart.curves) == 1 and other.curves[0].same(first)), None)
        if twin and not chart.keyed:
            told.append(f"{chart.title} is the same as {twin.curves[0].label}.")
        elif not chart.keyed and len(first.finite) > 1 and len(set(first.finite)) == 1:
            told.append(f"{chart.title} is {number(first.finite[0])} throughout.")
        else:
            drawn.append(chart)
    grid = tag("div", [_shown(chart) for chart in drawn], class_="grid")
    return tag("div", grid, [tag("p", text, class_="lead") for text in told])


def _shown(chart: Chart) -> Html:
    """Returns title, a key with the last value of each curve, and the drawing. Names are in the HTML alone."""
    keys = [
        tag("span", tag("i", style=f"background:{_colour(c)}"), f"{c.label} ", tag("b", number(c.finite[-1])))
        for c in chart.curves
    ]
    keys = keys if chart.keyed else [tag("span", "last ", tag("b", number(chart.curves[0].finite[-1])))]
    image = drawing(_draw(chart), f"{chart.title} by step")
    return tag("figure", tag("h3", chart.title), tag("div", keys, class_="keys"), image, class_="chart")


def number(value: float | None) -> str:
    """Returns a value with four digits."""
    if value is None or math.isnan(value):
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def _colour(curve: Curve) -> str:
    return COLOURS[curve.colour % len(COLOURS)]


def _draw(chart: Chart) -> bytes:
    """Draws a chart as SVG, without text but the numbers of the axes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(4.8, 2.6), layout="constrained")
    axes = figure.subplots()
    for curve in chart.curves:
        every = -(-len(curve.steps) // POINTS)
        steps, values = ([*column[::-1][::every][::-1]] for column in (curve.steps, curve.values))  # with the last one
        dash, marker = DASHES[curve.colour // len(COLOURS) % len(DASHES)], "o" if len(curve.finite) < 12 else None
        axes.plot(steps, values, color=_colour(curve), linewidth=1.6, linestyle=dash, marker=marker, markersize=3)
    finite = [curve.finite for curve in chart.curves]
    if chart.steep and all(min(v) > 0 for v in finite) and any(v[0] > STEEP * v[-1] for v in finite):
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(which="both", labelsize=9, length=3, colors="#57606a")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color("#d0d7de")
    axes.grid(alpha=0.3)
    out = io.BytesIO()
    with rc_context({"svg.hashsalt": "heirloom"}):  # the same run, the same page
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
