"""heirloom and what people would use instead, on CPUs: torch, transformers, diffusers and webdataset.

    pip install webdataset                                        # for the row of the data pipeline
    python benchmarks/side_by_side.py --json benchmarks/results/side_by_side.json --page docs/speed.md    # 25 minutes
    python benchmarks/side_by_side.py --smoke --json smoke.json   # toy sizes, to see that every row runs
    python benchmarks/side_by_side.py --only softmax              # the rows that have this word, as a Markdown table

Run it on idle cores. A row is the median of calls that take turns, ours and theirs, in one process; rows of whole
commands start processes in turn. The first calls, in which programs are compiled, do not count. Both get the same
inputs in float32 and the same cores, and where results can be compared, the row has their largest relative difference.
A ratio is our time to theirs: below 1, heirloom is faster. Losing rows stay in. Rows that are done are kept in --rows,
so that the same command continues after an interruption.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import bench

ROOT = Path(__file__).parents[1]
PACKAGES = ("jax", "jaxlib", "torch", "transformers", "diffusers", "webdataset")
# The largest ratio that we want, by the first words of a row.
GOALS = {"train step": 1.1, "softmax": 1.0, "VAE": 1.0, "depthwise": 1.0, "load": 1.0}
PAUSE = 0.05  # seconds between calls, in which the threads of the last one stop spinning
BUDGET, LEAST, MOST = 15.0, 5, 40  # seconds of a row, and its rounds
BEGIN, END = "<!-- side_by_side.py writes from here -->", "<!-- to here -->"
BIN = Path(sys.executable).parent


def alternate(name: str, smoke: bool) -> dict[str, Any]:
    """Measures a pair of calls in this process."""
    from benchmarks.pairs import PAIRS

    pair = PAIRS[name](smoke)
    found: dict[str, Any] = {"difference": pair.difference()}
    runs = {"ours": pair.ours, "theirs": pair.theirs}
    first = {who: bench.timed(run, 2)[1] for who, run in runs.items()}  # compiled, and in its buffers
    rounds = 2 if smoke else max(LEAST, min(MOST, int(BUDGET / (sum(first.values()) + 2 * PAUSE))))
    found |= {who: [] for who in runs}
    for _ in range(rounds):
        for who, run in runs.items():
            time.sleep(PAUSE)
            found[who] += bench.timed(run, 1)
    return found


def process(command: list[str], **env: str) -> dict[str, float]:
    """Runs a command; returns its seconds and its largest resident memory, or the seconds that it prints as JSON."""
    with tempfile.TemporaryFile("w+") as out:
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | env, cwd=ROOT)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        said = out.read()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}:\n{said}")
    found = re.search(r'^\{"seconds".*\}$', said, re.MULTILINE)
    return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024} | (json.loads(found[0]) if found else {})


Run = Callable[[], dict[str, float]]


def in_turn(rounds: int, ours: Run, theirs: Run | None = None) -> dict[str, Any]:
    """Measures commands; the first round, which fills the caches of the disk, does not count."""
    runs = {"ours": ours} | ({"theirs": theirs} if theirs else {})
    found = [{who: run() for who, run in runs.items()} for _ in range(1 + rounds)][1:]
    result: dict[str, Any] = {who: [row[who]["seconds"] for row in found] for who in runs}
    return result | {f"{who}_peak_bytes": max(row[who]["peak_bytes"] for row in found) for who in runs}


def heirloom(*arguments: str) -> Run:
    return partial(process, [str(BIN / "heirloom"), *arguments])


def python(code: str) -> Run:
    return partial(process, [sys.executable, "-c", code])


def convert(folder: Path, smoke: bool) -> dict[str, Any]:
    """A folder of transformers' CLIP to ours, and through transformers to a new folder; neither compares outputs."""
    source, theirs = folder / "clip", folder / "theirs"
    write = "from benchmarks.pairs import *; c = shrunk(VIT_B_32) if {} else VIT_B_32; "
    process([sys.executable, "-c", write.format(smoke) + f"clip_of_transformers(c).save_pretrained({str(source)!r})"])
    load_and_save = f"CLIPModel.from_pretrained({str(source)!r}).save_pretrained({str(theirs)!r})"
    ours = heirloom("convert", str(source), str(folder / "ours"), "--no-verify", "--force")
    return in_turn(1 if smoke else 5, ours, python(f"from transformers import CLIPModel; {load_and_save}"))


def resume(folder: Path, smoke: bool) -> dict[str, Any]:
    """A process that resumes the emoji demo and takes its third step; theirs: without the kept programs."""
    run, copy = folder / "run", folder / "copy"
    flags = ["--steps", "3", "--optim.warmup", "0", "--save_every", "1", "--held_out.path", ""]
    heirloom("train", "tinyclip/emoji", "--run", str(run), *flags)()
    shutil.rmtree(run / "checkpoints" / "3")
    shutil.rmtree(run / "model")

    def again(flag: str) -> dict[str, float]:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        return heirloom("train", "tinyclip/emoji", "--run", str(copy), *flags, flag)()

    return in_turn(1 if smoke else 3, partial(again, "--keep-compiled"), partial(again, "--no-keep-compiled"))


def load(folder: Path, smoke: bool) -> dict[str, Any]:
    """64 pictures a batch from tar shards; theirs: webdataset in torch's DataLoader."""
    from benchmarks.loading import write_shards

    write_shards(folder / "shards", *((4, 64) if smoke else (4, 512)))
    command = [sys.executable, str(ROOT / "benchmarks/loading.py")]
    of = lambda who: partial(process, [*command, who, str(folder / "shards"), "2" if smoke else "24"])  # noqa: E731
    return in_turn(1 if smoke else 5, of("ours"), of("webdataset"))


def start(ours: Run, theirs: Run | None, folder: Path, smoke: bool) -> dict[str, Any]:
    return in_turn(1 if smoke else 7, ours, theirs)


COMMANDS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "convert CLIP B/32; transformers: load and save": convert,
    "`heirloom --help`; `transformers --help`": partial(
        start, heirloom("--help"), partial(process, [str(BIN / "transformers"), "--help"])
    ),
    "`heirloom recipes`": partial(start, heirloom("recipes"), None),
    "`import tinyclip_jax`; `import transformers`": partial(
        start, python("import tinyclip_jax"), python("import transformers")
    ),
    "`from tinyclip_jax import load`; `from transformers import CLIPModel`": partial(
        start, python("from tinyclip_jax import load"), python("from transformers import CLIPModel")
    ),
    "resume and take a step; without the kept programs": resume,
    "load 1,536 pictures from tar shards; webdataset": load,
}


def measure(name: str, smoke: bool) -> dict[str, Any]:
    """Measures a row; a pair of calls in a process of its own, since memory that one frees may stay with it."""
    print(f"{name} ...", flush=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if name in COMMANDS:
            found = COMMANDS[name](Path(folder), smoke)
        else:
            file = Path(folder, "row.json")
            command = [sys.executable, __file__, "--row", name, str(file), *(["--smoke"] if smoke else [])]
            subprocess.run(command, check=True)
            found = json.loads(file.read_text())
    row = {"what": name, "date": date.today().isoformat()} | summary(name, found) | found
    return row | {"took": time.perf_counter() - started}


def summary(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Medians, and the median ratio of the rounds."""
    medians = {f"{who}_seconds": statistics.median(found[who]) for who in ("ours", "theirs") if who in found}
    ratios = [a / b for a, b in zip(found["ours"], found.get("theirs", []), strict=False)]
    goal = next((goal for words, goal in GOALS.items() if name.startswith(words)), None)
    return medians | {"ratio": statistics.median(ratios) if ratios else None, "goal": goal}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows in Markdown."""

    def cell(row: dict[str, Any], who: str) -> str:
        if f"{who}_seconds" not in row:
            return ""
        seconds = row[f"{who}_seconds"]
        memory = f", {row[f'{who}_peak_bytes'] / 1e9:.2f} GB" if row["what"].startswith("convert") else ""
        return (f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.2f} s") + memory

    def line(row: dict[str, Any]) -> list[str]:
        ratio, goal = row["ratio"], row["goal"]
        verdict = "" if goal is None else f"{goal}, {'met' if ratio <= goal else 'missed'}"
        return [row["what"], cell(row, "ours"), cell(row, "theirs"), "" if ratio is None else f"{ratio:.2f}", verdict]

    return bench.markdown(("what", "heirloom", "instead", "ratio", "goal"), map(line, rows))


def write_page(page: Path, result: dict[str, Any]) -> None:
    """Writes date, versions and table between the markers of the page."""
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{page}: it needs the lines {BEGIN} and {END}, once each")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    days = " and ".join(sorted({row["date"] for row in result["rows"]}))
    head = f"{days}, {result['device']}, {result['cores']} cores; {versions}; "
    head += f"huge pages for malloc were {'on' if result['huge_pages'] else 'off'} for both sides:"
    new = "\n".join([BEGIN, "", head, "", *table(result["rows"]), "", END])
    page.write_text(text[: text.index(BEGIN)] + new + text[text.index(END) + len(END) :])


def names() -> list[str]:
    """All rows. Their names are read in another process, which imports torch and jax, and frees their memory."""
    code = "import json; from benchmarks.pairs import PAIRS; print(json.dumps(list(PAIRS)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [*json.loads(out.splitlines()[-1]), *COMMANDS]


def main() -> None:
    parser = bench.parser(__doc__)
    parser.add_argument("--page", type=Path, help="a Markdown page that gets the table, between its markers")
    parser.add_argument("--only", default="", help="measure the rows whose names have this")
    parser.add_argument("--rows", type=Path, default=Path(tempfile.gettempdir(), "side_by_side"), help="finished rows")
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    parser.add_argument("--row", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        return bench.write(Path(args.row[1]), alternate(args.row[0], args.smoke))
    if args.page and (args.smoke or args.only):
        parser.error("--page is for a whole run: leave out --smoke and --only")
    folder = args.rows / ("smoke" if args.smoke else "full")
    folder.mkdir(parents=True, exist_ok=True)
    huge = "glibc.malloc.hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "")
    head = bench.header(PACKAGES, device=bench.CPU, cores=len(os.sched_getaffinity(0)))
    result: dict[str, Any] = head | {"huge_pages": huge, "smoke": args.smoke, "rows": []}
    for name in names():
        if args.only in name:
            file = folder / (re.sub(r"\W+", "_", name) + ("_huge" if huge else "") + ".json")
            result["rows"].append(bench.once(file, partial(measure, name, args.smoke)))
            bench.write(args.json, result)
    print("\n".join(table(result["rows"])))
    if args.page:
        write_page(args.page, result)


if __name__ == "__main__":
    main()
