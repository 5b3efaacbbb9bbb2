"""Objects that show themselves: at most six lines in a terminal, a small table in a notebook."""

import html
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = 6  # of a repr
WIDTH = 100  # characters of a line of a repr


class Shown:
    """Base of objects that a notebook shows. A subclass defines `_facts`."""

    def _facts(self) -> tuple[str, dict[str, str]]:
        """Returns a title, and up to five facts: {name: text}."""
        raise NotImplementedError

    def __repr__(self) -> str:
        title, facts = self._facts()
        lines = [title, *(f"  {name}: {text}" for name, text in facts.items())]
        return "\n".join(line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ..." for line in lines[:LINES])

    def _repr_html_(self) -> str:
        title, facts = self._facts()
        cell = 'style="text-align:left"'
        rows = (
            f"<tr><td>{html.escape(name)}</td><td {cell}>{html.escape(text)}</td></tr>" for name, text in facts.items()
        )
        return f"<b>{html.escape(title)}</b><table>{''.join(rows)}</table>"


def figure_of(shown: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> "Figure":
    """Draws curves, steps and values by name, up to three in a row; returns a matplotlib figure."""
    from matplotlib.figure import Figure

    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(5 if columns == 1 else 4 * columns, 3 * rows), layout="constrained")
    cells = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, (steps, values)) in zip(cells, shown.items(), strict=False):
        axes.plot(steps, values, color="#1f6f8b", marker="o" if len(steps) < 3 else None)
        axes.set(xlabel="step", title=name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    for axes in cells[len(shown) :]:
        axes.set_visible(False)
    return figure


def picture_of(figure: "Figure") -> Image.Image:
    """Draws a matplotlib figure as a PIL image, which every notebook shows and which has `save`."""
    out = io.BytesIO()
    figure.savefig(out, dpi=100, format="png")
    return Image.open(io.BytesIO(out.getvalue()))


def short(number: float) -> str:
    """Writes a count with three digits: 3.44 M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"
