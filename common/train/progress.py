"""The progress of a run: a live line on a terminal, a bar in a notebook, plain lines in a log."""

import html
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import accumulate
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from heirloom.common.train.metrics import Work

BAR = 16  # columns of the bar
NOTEBOOK_SECONDS = 0.5  # between two updates of a notebook's bar
IDLE = 0.5  # share of the time waiting for data from which it is worth a sentence


class ProgressLine:
    """One live line on a terminal, one bar in a notebook; elsewhere a plain line per log interval. Silent in all
    processes but the first.

    Says once, when devices wait for data most of the time, what to do about it.
    """

    def __init__(self, total: int, work: Work, console: Console) -> None:
        self.total, self.work, self.console = total, work, console
        steps = TextColumn("step {task.completed:,.0f}/{task.total:,.0f}")
        self._bar = Progress(steps, BarColumn(BAR), TextColumn("{task.description}", markup=False), console=console)
        self._task: TaskID = self._bar.add_task("", total=total)
        self._told = False
        self._live: Live | None = Live() if console.is_jupyter and not console.quiet else None
        self._text = self._scores = ""
        self._updated = 0.0

    def __enter__(self) -> "ProgressLine":
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._bar.stop()

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)
        if self._live and time.perf_counter() - self._updated > NOTEBOOK_SECONDS:
            self._show_bar(self._live, step)

    def show(self, line: Mapping[str, Any]) -> None:
        parts, scores = describe(line, self.total, self.work), describe_scores(line)
        left = self.console.width - len(f"step {self.total:,}/{self.total:,}") - BAR - 2  # a blank between columns
        self._bar.update(self._task, completed=line["step"], description=fitting([*parts, *scores], left))
        if self._live:
            self._text = "  ".join(parts)
            self._scores = f"at step {line['step']:,}: {'  '.join(scores)}" if scores else self._scores
            self._show_bar(self._live, line["step"])
        elif not self.console.is_terminal:
            text = "  ".join((f"step {line['step']:,}/{self.total:,}", *parts, *scores))
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        if line["timing"]["data_wait"] > IDLE and not self._told:
            self._told = True
            share = f"{line['timing']['data_wait']:.0%}"
            idle = f"devices are idle {share} of the time, waiting for data"
            self.console.print(f"{idle}: raise pipeline.workers", soft_wrap=True)

    def _show_bar(self, live: "Live", step: int) -> None:
        """Replaces the bar of a notebook: the step, the last metrics, and the last scores with their step."""
        self._updated = time.perf_counter()
        parts = (f"step {step:,}/{self.total:,}", self._text, self._scores)
        live.show(step, self.total, "  ".join(filter(None, parts)))


class Live:
    """A progress bar with a line of text that is replaced in place, in Jupyter and Colab, without widgets."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, done: int, total: int, text: str) -> None:
        """Shows `text` next to a bar of `done` of `total`."""
        from IPython.display import display

        bar = f'<progress value="{done}" max="{total}" style="width:12em;vertical-align:middle"></progress>'
        shown = {"text/plain": text, "text/html": f"{bar} <code>{html.escape(text)}</code>"}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)


def describe(line: Mapping[str, Any], total: int, work: Work) -> list[str]:
    """Returns `loss 2.314`, `ETA 1:02:03`, `1,234 examples/s`, `MFU 43.1%` (where known), and `data wait 2%`.

    After the loss `bad 3` when examples of the window replace bad records.
    """
    timing = line["timing"]
    rate = timing["examples_per_second"]
    left = timedelta(seconds=round((total - line["step"]) * work.examples / rate)) if rate else "-"
    return [
        f"loss {_show(line['loss'])}",
        *([f"bad {line['bad']:,}"] if line.get("bad") else []),
        f"ETA {left}",
        f"{rate:,.0f} examples/s",
        *([f"MFU {timing['mfu']:.1%}"] if timing["mfu"] is not None else []),
        f"data wait {timing['data_wait']:.0%}",
    ]


def describe_scores(line: Mapping[str, Any]) -> list[str]:
    """Returns `eval/r1 0.0591`, `eval/r5 0.18`; nothing for a line without an evaluation."""
    return [f"{name} {_show(value)}" for name, value in line.items() if name.startswith("eval/")]


def fitting(parts: Sequence[str], width: int) -> str:
    """Returns the first parts that fit into `width` columns, two blanks apart."""
    ends = accumulate(len(part) + 2 for part in parts)
    return "  ".join(part for part, end in zip(parts, ends, strict=True) if end - 2 <= width)


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
