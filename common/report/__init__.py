"""`heirloom report RUN`: a run as one self-contained HTML page; of several runs, a comparison."""

from collections.abc import Sequence

from heirloom.common.files import staged
from heirloom.common.paths import AnyPath
from heirloom.common.report import compare, single
from heirloom.common.report.shown import open_runs

__all__ = ["write"]


def write(places: Sequence[AnyPath], out: AnyPath | None = None) -> AnyPath:
    """Writes the page and returns its path: `RUN/report.html`, of several runs `comparison.html` in the first.

    places: run folders, or their addresses in buckets. out: another file. Raises InputError unless each is a run.
    """
    runs = open_runs(places)
    text = single.page(runs[0]) if len(runs) == 1 else compare.page(runs)
    out = out or places[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    with staged(out, force=True) as file:
        file.write_text(text, encoding="utf-8")
    return out
