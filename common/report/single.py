"""The page of one run: what it is, its scores, curves, pictures, provenance and config."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from heirloom.common import config
from heirloom.common.report.curves import number, sections, shown
from heirloom.common.report.html import Html, document, folded, picture, table, tag
from heirloom.common.report.shown import Shown, duration
from heirloom.common.surgery.report import totals

CLASSES = 20  # class names in the header


def page(run: Shown) -> str:
    """Returns the page of a run."""
    about = config.summaries().get(run.recipe, "")
    return document(
        run.name,
        tag("h1", run.name),
        tag("p", about, class_="lead") if about else "",
        _facts(run),
        _scores(run),
        *(part for title, charts in sections(run.lines) for part in (tag("h2", title), shown(charts))),
        _pictures(run),
        _provenance(run),
        tag("h2", "Config"),
        folded("every field", tag("pre", json.dumps(run.config, indent=2, ensure_ascii=False))),
    )


def facts(run: Shown) -> dict[str, str]:
    """Returns what a header says of a run, as {name: text}; what its folder does not tell is left out."""
    total, start = run.config.get("steps"), run.starts[-1] if run.starts else {}
    done = f"{run.step:,} of {total:,}" if isinstance(total, int) else f"{run.step:,}"
    found = {"recipe": run.recipe, "steps": done, "loss": number(run.lines[-1]["loss"])}
    found["duration"] = duration(run.seconds)
    if start:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in start["devices"].items())
        processes = f", {start['processes']} processes" if start["processes"] > 1 else ""
        backend = f" ({start['backend']})" if start["backend"] not in start["devices"] else ""
        found["device"] = f"{kinds}{backend}{processes}"
        began = run.starts[0]["time"].replace("T", " ").replace("+00:00", " UTC")
        found["started"] = f"{began}, {len(run.starts)} starts" if len(run.starts) > 1 else began
    for name, field in (("data", "data"), ("held out", "held_out")):
        source = run.config.get(field)
        if isinstance(source, Mapping) and source.get("path"):
            found[name] = " ".join(filter(None, (str(source["path"]), str(source.get("split") or ""))))
    found |= {name: str(run.config[name]) for name in ("donor", "teacher") if run.config.get(name)}
    if student := run.about.get("student"):
        found["student"] = totals(student["parameters"], student["macs"])
    if run.labels:
        more = f", ... ({len(run.labels):,} in all)" if len(run.labels) > CLASSES else ""
        found["classes"] = ", ".join(run.labels[:CLASSES]) + more
    if start:
        found["versions"] = f"python {start['python']}, " + ", ".join(f"{k} {v}" for k, v in start["versions"].items())
    return {name: text for name, text in found.items() if text}


def _facts(run: Shown) -> Html:
    wide = ("student", "versions", "classes")
    found = [
        tag("div", tag("dt", name), tag("dd", text), class_="all" if name in wide else "")
        for name, text in facts(run).items()
    ]
    command = run.starts[-1]["command"] if run.starts else ""
    return tag("header", tag("pre", command, class_="command") if command else "", tag("dl", found))


def _scores(run: Shown) -> Html:
    rows = run.scores()
    if not rows:
        return Html("")
    columns = {"data": [row.data for row in rows], "metric": [row.metric for row in rows]}
    columns["this run"] = [number(row.value) for row in rows]
    # The others appear where a row has them.
    others = {"donor or teacher": [row.donor for row in rows], "published": [row.published for row in rows]}
    for name, values in others.items():
        if any(value is not None for value in values):
            columns[name] = ["" if value is None else number(value) for value in values]
    if any(row.n is not None for row in rows):
        columns["examples"] = ["" if row.n is None else f"{row.n:,}" for row in rows]
    headers, body = list(columns), zip(*columns.values(), strict=True)
    return tag("section", tag("h2", "Scores"), table(headers, body, headers[2:]), tag("p", SHARES, class_="lead"))


SHARES = "Shares are in percent. Loss, mse and psnr are as they are."


def _pictures(run: Shown) -> Html:
    parts: list[Html] = []
    if run.samples:
        grids = [picture(file, step(file.stem)) for file in run.samples]
        parts += [tag("h2", "Samples"), tag("div", grids, class_="grid pictures")]
        if prompts := run.config.get("prompts"):
            parts.append(folded("prompts, row by row", tag("ol", [tag("li", str(prompt)) for prompt in prompts])))
    if run.first_batch:
        parts += [tag("h2", "First batch"), picture(run.first_batch, "the first pictures, as the model sees them")]
    return tag("section", parts)


def step(stem: str) -> str:
    """Returns the caption of a grid of samples, from the name of its file."""
    return f"step {int(stem):,}" if stem.isdecimal() else stem


def _provenance(run: Shown) -> Html:
    if not (run.sources or run.inherited):
        return Html("")
    parts: list[Html] = [tag("h2", "Provenance")]
    if run.inherited:
        said = f"{run.inherited['fraction']:.1%} of the student's first weights come from {run.inherited['source']}."
        parts.append(tag("p", said))
    if run.sources:
        rows = [(role, source["path"], " ".join(source["sha256"])) for role, source in run.sources.items()]
        parts.append(table(("role", "source", "SHA-256 of its files"), rows))
    if run.inherited:
        lines = run.inherited["parameters"]
        body = [(path, f"{x['fraction']:.0%}", x["maps"], _origin(x["source"])) for path, x in lines.items()]
        headers = ("parameter", "inherited", "maps", "source")
        parts.append(folded(f"where each of {len(body)} tensors comes from", table(headers, body, ("inherited",))))
    return tag("section", parts)


def _origin(source: Any) -> str:
    if isinstance(source, Sequence) and not isinstance(source, str):
        return ", ".join(map(str, source))
    return str(source or "fresh")

