"""`heirloom report`: what its pages say, that they hold all they show, and that no name becomes markup."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from heirloom.common.cli import main
from heirloom.common.errors import InputError
from heirloom.common.report import curves, write
from heirloom.common.report.shown import flattened, open_runs
from heirloom.common.train import about

EVIL = '<script>alert(1)</script><img src=x onerror="alert(2)">&lt;b&gt;$\\frac{'
TAGS = {"html", "head", "meta", "title", "style", "body", "header", "section", "h1", "h2", "h3", "p", "pre", "dl", "dt"}
TAGS |= {"dd", "div", "figure", "figcaption", "img", "span", "i", "b", "details", "summary", "table", "thead", "tbody"}
TAGS |= {"tr", "th", "td", "ol", "li"}
TIMING = {"seconds": 10.0, "examples_per_second": 50.0, "mfu": None, "data_wait": 0.02, "save_stall": 0.0}
TIMING |= {"step_p50": 0.1, "step_p95": 0.2, "step_max": 0.3, "host_peak": 2**30}
LEAF = {"source": EVIL, "maps": EVIL, "fraction": 1}
ATTRIBUTES = {"class", "style", "src", "alt", "lang", "charset", "name", "content"}
START = {"time": "2026-11-29T10:00:00+00:00", "command": "heirloom train lit/smoke --run runs/a", "step": 0}
START |= {"python": "3.11.7", "versions": {"jax": "0.10.2"}, "backend": "tpu", "devices": {"TPU v5 lite": 4}}
START |= {"processes": 1}


class Page(HTMLParser):
    """The texts, tags and attributes of a page, as a browser's parser would see them."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.texts, self.tags, self.attributes = [], set(), []
        self.feed(text)
        self.text = " ".join(self.texts)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data.strip())

    def given(self, name):
        return [value for key, value in self.attributes if key == name]


@pytest.fixture
def run(tmp_path):
    """Makes a run's folder: run(name, lines, **files), where a file's name has __ for a dot."""

    def make(name, lines, **files):
        folder = tmp_path / name
        (folder / "samples").mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for file, value in ({"config": {}} | files).items():
            (folder / f"{file}.json").write_text(json.dumps(value))
        return folder

    return make


def picture(path, width=4):
    Image.fromarray(np.full((4, width, 3), 200, np.uint8)).save(path)


def test_no_name_becomes_markup_and_nothing_is_loaded_from_elsewhere(run, tmp_path):
    """Names of the run, metrics, classes, prompts, files, sources, scores and devices."""
    name = EVIL.replace("/", "")
    folder = run(
        name,
        [{"step": 1, "loss": 1.0, EVIL: 1.0, f"eval/{EVIL}": 0.5}, {"step": 2, "loss": 0.5, EVIL: 2.0}],
        config={"prompts": [EVIL], "data": {"path": EVIL}, "donor": EVIL, EVIL: EVIL},
        about={
            "starts": [START | {"command": EVIL, "devices": {EVIL: 1}, "versions": {EVIL: EVIL}}],
            "student": {"family": EVIL, "parameters": {EVIL: 1, "total": 1}, "macs": 0},
        },
        sources={EVIL: {"path": EVIL, "sha256": [EVIL]}},
        provenance={"fraction": 0.5, "source": EVIL, "parameters": {EVIL: LEAF}},
        eval={"rows": [{"dataset": EVIL, "metric": EVIL, "value": 1.0, "published": None, "n": 1}]},
    )
    (folder / "model").mkdir()
    (folder / "model" / "labels.json").write_text(json.dumps([EVIL, "plain"]))
    picture(folder / "samples" / f"{name}.png")
    for file in (write([folder]), write([folder, folder], tmp_path / "both.html")):
        text = file.read_text()
        page = Page(text)
        assert page.tags <= TAGS
        assert {key for key, _ in page.attributes} <= ATTRIBUTES
        assert all(re.match(r"data:image/(png|jpeg|svg\+xml);base64,", source) for source in page.given("src"))
        assert "url(" not in text and "@import" not in text
        assert page.text.count("<script>alert(1)") > 10
    labels = page.text.count(f"{EVIL}, plain")
    assert labels == 2  # in both columns


def test_the_header_says_what_ran_where(run):
    times = {5: 60.0, 9: 100.0, 12: 8.0}
    lines = [{"step": step, "loss": 1.0, "timing": TIMING | {"seconds": s}} for step, s in times.items()]
    starts = [START, START | {"step": 9, "command": "heirloom train lit/smoke --run runs/a --steps 12"}]
    student = {"family": "lit", "parameters": {"total": 1234}, "macs": 5_000_000}
    folder = run("a", lines, config={"steps": 12, "teacher": "hf:a/b"}, about={"starts": starts, "student": student})
    page = Page(write([folder]).read_text())
    for said in (
        "heirloom train lit/smoke --run runs/a --steps 12",
        "A tiny LiT from scratch on the embedded emoji, pixels of 16 x 16; a minute on a laptop.",
        "steps 12 of 12",
        "duration 0:01:48",  # of both starts
        "student 1,234 parameters, 0.01 GMACs",
        "device 4 x TPU v5 lite (tpu)",
        "started 2026-11-29 10:00:00 UTC, 2 starts",
        "teacher hf:a/b",
        "versions python 3.11.7, jax 0.10.2",
    ):
        assert said in page.text


def test_scores_have_the_columns_that_are_known(run):
    lines = [{"step": 4, "loss": 1.0, "eval/r1": 0.0563, "eval/loss": 2.5}, {"step": 5, "loss": 1.0}]
    config = {"held_out": {"path": "emoji", "split": "test"}}
    row = {"dataset": "cifar", "metric": "top1", "value": 40.0, "published": 62.4, "n": 900}
    donor = [row | {"value": 60.0}, row | {"dataset": "emoji/test", "metric": "r1", "value": 7.67}]
    folder = run("a", lines, config=config)
    assert table(folder, "Scores") == [
        ["data", "metric", "this run"],
        ["emoji/test, step 4", "r1", "5.63"],  # shares in percent
        ["emoji/test, step 4", "loss", "2.5"],
    ]
    (folder / "eval.json").write_text(json.dumps({"rows": [row]}))
    (folder / "eval_donor.json").write_text(json.dumps({"rows": donor}))
    assert table(folder, "Scores") == [
        ["data", "metric", "this run", "donor or teacher", "published", "examples"],
        ["emoji/test, step 4", "r1", "5.63", "7.67", "", ""],
        ["emoji/test, step 4", "loss", "2.5", "", "", ""],
        ["cifar", "top1", "40", "60", "62.4", "900"],
    ]
    (folder / "eval.json").write_text('{"rows": [{"dataset": "x"}]}')
    with pytest.raises(InputError, match=r"eval\.json is not what heirloom eval --json writes"):
        write([folder])


def table(folder, heading):
    """The cells of the table under a heading."""
    return cells(write([folder]).read_text().partition(f"<h2>{heading}</h2>")[2].partition("</table>")[0])


def cells(text):
    """The cells of every row."""
    rows = text.split("</tr>")[:-1]
    return [[Page(cell).text for cell in re.findall(r"<t[hd] .*?>(.*?)</t[hd]>", row)] for row in rows]


def test_related_curves_share_a_chart():
    lines = [
        {
            **{"step": step, "loss": 2.0 / step, "mse": 1.0 / step, "part": 2.0 / step, "lr": 0.1, "skipped": 0.0},
            **{"eval/mse": 0.9 / step, "eval/mse_swapped": 1.0, "eval/r1": 0.1, "eval/r10": 0.4, "tiny": 1e-9 * step},
            "timing": TIMING,
        }
        for step in (1, 2, 3)
    ]
    found = dict(curves.sections(lines))
    assert {heading: [(c.title, [curve.label for curve in c.curves]) for c in found[heading]] for heading in found} == {
        "Curves by step": [
            ("loss", ["loss, training"]),
            ("mse, mse_swapped", ["mse, training", "mse, held out", "mse_swapped, held out"]),
            ("part", ["part, training"]),
            ("r1, r10", ["r1, held out, %", "r10, held out, %"]),
            ("tiny", ["tiny, training"]),
        ],
        "Optimizer": [("lr", ["lr"])],  # no step was skipped
        "Speed and memory": [
            ("examples/s", ["examples/s"]),
            ("share of time waiting for data, %", ["data wait"]),
            ("seconds of a step", ["median", "95th percentile", "longest"]),
            ("peak memory of the host, GiB", ["peak memory"]),
        ],
    }
    assert found["Curves by step"][3].curves[1].values == [40.0] * 3
    page = Page(curves.shown(found["Curves by step"]))
    assert "part is the same as loss, training." in page.text
    assert page.given("alt") == ["loss by step", "mse, mse_swapped by step", "r1, r10 by step", "tiny by step"]
    assert "lr is 0.1 throughout." in Page(curves.shown(found["Optimizer"])).text


def test_curves_of_different_sizes_do_not_share_a_chart():
    lines = [{"step": 1, "loss": 1.0, "eval/mse": 0.001, "eval/mse_swapped": 1.0}]
    assert [chart.title for chart in curves.sections(lines)[0][1]] == ["loss", "mse, held out", "mse_swapped, held out"]


def test_values_that_are_not_finite_are_gaps(run):
    folder = run("a", [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None, "mse": None}, {"step": 3, "loss": 2.0}])
    assert [curve.finite for curve in curves.numbers(open_runs([folder])[0].lines).values()] == [[2.5, 2.0]]
    assert Page(write([folder]).read_text()).given("alt") == ["loss by step"]


def test_samples_are_spread_over_the_run(run):
    folder = run("a", [{"step": 1, "loss": 1.0}], config={"prompts": ["a red apple"]})
    for step in range(0, 2000, 100):
        picture(folder / "samples" / f"{step:07d}.png")
    (folder / "samples" / "0000000.png").write_bytes(b"cut")
    page = Page(write([folder]).read_text())
    steps = re.findall(r"step ([\d,]+)", page.text)
    assert len(steps) == 8 and steps[0] == "0" and steps[-1] == "1,900"
    assert "this picture cannot be read step 0" in page.text and "a red apple" in page.text
    assert page.given("style").count("width:320px;image-rendering:pixelated") == 7


def test_large_pictures_are_made_small(run):
    folder = run("a", [{"step": 1, "loss": 1.0}])
    noise = np.random.default_rng(0).integers(0, 255, (1600, 1600, 3), np.uint8)
    Image.fromarray(noise).save(folder / "first_batch.png")
    text = write([folder]).read_text()
    assert "data:image/jpeg;base64," in text and len(text) < 2_500_000 < (folder / "first_batch.png").stat().st_size


def test_several_runs_are_compared(run, tmp_path, capsys):
    one = run("one", [{"step": 2, "loss": 1.0, "eval/r1": 0.05}], config={"steps": 2, "optim": {"lr": 0.1, "b1": 0.9}})
    two = run("two", [{"step": 9, "loss": 0.5, "eval/r1": 0.06, "mse": 1.0}], config={"steps": 9, "optim": {"lr": 0.1}})
    assert main(["report", str(one), str(two)]) == 0
    assert capsys.readouterr().out == f"{one}/comparison.html\n"
    text = (one / "comparison.html").read_text()
    rows = cells(text)
    assert ["held out", "r1", "5", "6"] in rows
    assert ["steps", "2", "9"] in rows and ["optim.b1", "0.9", "absent"] in rows
    assert not any(row and row[0] == "optim.lr" for row in rows)
    found = dict(curves.compared({shown.name: shown.lines for shown in open_runs([one, two])}))
    charts = {chart.title: {curve.label: curve.colour for curve in chart.curves} for chart in found["Curves by step"]}
    assert charts == {"loss": {"one": 0, "two": 1}, "r1, held out, %": {"one": 0, "two": 1}, "mse": {"two": 1}}
    assert main(["report", str(one), str(two), "--out", str(tmp_path / "c.html")]) == 0
    assert (tmp_path / "c.html").read_text() == text


def test_runs_of_one_name_are_told_apart(run):
    places = [run("a/stage_1", [{"step": 1, "loss": 1.0}]), run("b/stage_1", [{"step": 1, "loss": 2.0}])]
    assert [shown.name for shown in open_runs(places)] == [str(place) for place in places]


def test_a_run_of_stages_names_them(run, capsys):
    stage = run("a/stage_1", [{"step": 1, "loss": 1.0}])
    assert main(["report", str(stage.parent)]) == 2
    assert f"its stages are runs: heirloom report {stage})" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("about", {"starts": [{"time": "now"}]}),
        ("about", {"starts": 3}),
        ("about", {"student": {"parameters": {}, "macs": 1}}),
        ("sources", {"donor": {"path": "x"}}),
        ("provenance", {"fraction": 1.0, "source": "x", "parameters": {"a": {"fraction": None, "maps": ""}}}),
        ("eval", {"rows": [1]}),
        ("config", [1]),
    ],
)
def test_a_damaged_file_of_a_run_is_one_line(run, capsys, file, damage):
    folder = run("a", [{"step": 1, "loss": 1.0}], **{file: damage})
    assert main(["report", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"heirloom: {folder / file}.json") and said.count("\n") == 1


def test_fields_of_a_config_have_dots():
    assert list(flattened({"a": {"b": 1, "c": {}}, "d": [1]})) == [("a.b", "1"), ("a.c", "{}"), ("d", "[1]")]


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["/venv/bin/heirloom", "train", "lit/smoke", "--run", "my run"], "heirloom train lit/smoke --run 'my run'"),
        (["/x/heirloom/common/cli.py", "train"], "heirloom train"),
        (["mine.py", "3"], "python mine.py 3"),
        (["/x/ipykernel_launcher.py", "-f", "k.json"], ""),
        (["-c"], ""),
    ],
)
def test_the_command_of_a_process(argv, shown):
    assert about.command(argv) == shown
