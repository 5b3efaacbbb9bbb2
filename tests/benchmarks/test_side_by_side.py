"""The parts of the side-by-side benchmark that decide what its page says."""

import sys
from pathlib import Path

import pytest

from benchmarks import side_by_side

ROOT = Path(__file__).parents[2]


def row(name, date="2026-01-30", **found):
    return {"what": name, "date": date} | side_by_side.summary(name, found) | found


def test_the_ratio_is_the_median_of_the_rounds():
    found = row("train step, X", ours=[1.0, 2.0, 9.0], theirs=[1.0, 1.0, 10.0])
    assert (found["ours_seconds"], found["theirs_seconds"], found["ratio"], found["goal"]) == (2.0, 1.0, 1.0, 1.1)


def test_the_page_gets_the_table_between_its_markers(tmp_path):
    rows = [
        row("softmax attention, X", ours=[0.5], theirs=[0.25]),
        row("`heirloom recipes`", date="2026-01-31", ours=[1.25]),
        row("convert X", ours=[1.0], theirs=[4.0], ours_peak_bytes=3e8, theirs_peak_bytes=2e9),
    ]
    head = {"device": "CPU, x86_64", "cores": 2, "versions": {"jax": "0.10.2"}}
    page = tmp_path / "speed.md"
    page.write_text(f"# Speed\n\n{side_by_side.BEGIN}\nold\n{side_by_side.END}\n\nThe end.\n")
    for _ in range(2):  # again: the markers stay
        side_by_side.write_page(page, head | {"huge_pages": False, "rows": rows})
    assert page.read_text().splitlines() == [
        "# Speed",
        "",
        side_by_side.BEGIN,
        "",
        "2026-01-30 and 2026-01-31, CPU, x86_64, 2 cores; jax 0.10.2; huge pages for malloc were off for both sides:",
        "",
        "| what | heirloom | instead | ratio | goal |",
        "|---|---|---|---|---|",
        "| softmax attention, X | 500 ms | 250 ms | 2.00 | 1.0, missed |",
        "| `heirloom recipes` | 1.25 s |  |  |  |",
        "| convert X | 1.00 s, 0.30 GB | 4.00 s, 2.00 GB | 0.25 |  |",
        "",
        side_by_side.END,
        "",
        "The end.",
    ]


def test_the_committed_page_has_the_markers():
    text = (ROOT / "docs/speed.md").read_text()
    assert text.count(side_by_side.BEGIN) == text.count(side_by_side.END) == 1


def test_a_command_that_fails_ends_the_run_with_its_words():
    with pytest.raises(SystemExit, match="ended with 3:\nno such thing"):
        side_by_side.process([sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"])
    found = side_by_side.process([sys.executable, "-c", """print('note'); print('{"seconds": 0.5}')"""])
    assert found["seconds"] == 0.5 and found["peak_bytes"] > 1e6
