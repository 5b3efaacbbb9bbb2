"""The page of several runs: scores side by side, differences of config, curves together, last samples."""

from collections.abc import Sequence

from heirloom.common.report.curves import compared, number, shown
from heirloom.common.report.html import Html, document, picture, table, tag
from heirloom.common.report.shown import Shown, flattened
from heirloom.common.report.single import SHARES, facts, step


def page(runs: Sequence[Shown]) -> str:
    """Returns the page that compares runs."""
    title = " / ".join(run.name for run in runs)
    lines = {run.name: run.lines for run in runs}
    return document(
        title,
        tag("h1", title),
        tag("p", f"{len(runs)} runs compared", class_="lead"),
        _facts(runs),
        _scores(runs),
        _differences(runs),
        *(part for title, charts in compared(lines) for part in (tag("h2", title), shown(charts))),
        _samples(runs),
    )


def _facts(runs: Sequence[Shown]) -> Html:
    found = [facts(run) for run in runs]
    commands = [run.starts[-1]["command"] if run.starts else "" for run in runs]
    found = [({"command": command} if command else {}) | one for command, one in zip(commands, found, strict=True)]
    rows = [(name, *(one.get(name, "") for one in found)) for name in dict.fromkeys(n for one in found for n in one)]
    return table(("", *(run.name for run in runs)), rows)


def _scores(runs: Sequence[Shown]) -> Html:
    """Scores by data and metric; each run's step is in the table above."""
    found = [{(_data(row.data), row.metric): row for row in run.scores()} for run in runs]
    keys = list(dict.fromkeys(key for rows in found for key in rows))
    if not keys:
        return Html("")
    names = [run.name for run in runs]
    body: list[tuple[str, ...]] = []
    for key in keys:
        rows = [one.get(key) for one in found]
        values = ["" if row is None else number(row.value) for row in rows]
        known = [row.published for row in rows if row and row.published is not None]
        body.append((*key, *values, *([number(known[0])] if known else [""])))
    headers = ["data", "metric", *names, "published"]
    if not any(row[-1] for row in body):
        headers, body = headers[:-1], [row[:-1] for row in body]
    return tag("section", tag("h2", "Scores"), table(headers, body, headers[2:]), tag("p", SHARES, class_="lead"))


def _data(name: str) -> str:
    return name.rpartition(", step ")[0] or name


def _differences(runs: Sequence[Shown]) -> Html:
    configs = [dict(flattened(run.config)) for run in runs]
    fields = dict.fromkeys(name for one in configs for name in one)
    rows = [(name, *(one.get(name, "absent") for one in configs)) for name in fields]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    body = table(("field", *(run.name for run in runs)), rows) if rows else tag("p", "none")
    return tag("section", tag("h2", "Differences of config"), body)


def _samples(runs: Sequence[Shown]) -> Html:
    last = [picture(run.samples[-1], f"{run.name}, {step(run.samples[-1].stem)}") for run in runs if run.samples]
    return tag("section", tag("h2", "Last samples"), tag("div", last, class_="grid pictures")) if last else Html("")
