import io
import json
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from heirloom.common.errors import InputError
from heirloom.common.train.metrics import Clock, MetricsFile, Window, Work
from heirloom.common.train.progress import ProgressLine, describe, describe_scores, fitting


def test_truncation_keeps_the_lines_up_to_the_step(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (10, 20, 30, 40):
        file.append({"step": step, "loss": 1 / step, "timing": {"seconds": 0.1}})
    with file.path.open("a") as torn:
        torn.write('{"step": 50, "lo')  # what a kill leaves
    whole = file.path.read_bytes()
    file.truncate(30)
    assert file.path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncating_nothing_makes_an_empty_file(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl").truncate(0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_file_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    with pytest.raises(InputError, match=r"nowhere/metrics.jsonl: cannot be written \(No such file or directory\)"):
        MetricsFile(tmp_path / "nowhere" / "metrics.jsonl").append({"step": 1, "loss": 0.0})


def test_a_window_survives_json_to_the_last_bit():
    steps = [{"loss": (0.1 * n, 1), "top1": (n, 3)} for n in range(7)]
    whole, first = Window(), Window()
    for metrics in steps:
        whole.add(metrics)
    for metrics in steps[:4]:
        first.add(metrics)
    second = Window(json.loads(json.dumps(first.totals)))
    for metrics in steps[4:]:
        second.add(metrics)
    means = whole.close()
    assert second.close() == means
    assert means["top1"] == 1.0 and means["loss"] == pytest.approx(0.3)
    assert whole.totals == {}


def test_a_mean_of_nothing_is_none():
    window = Window()
    window.add({"loss": (0, 0)})
    assert window.close() == {"loss": None}


TIMING = {"seconds": 9.0, "examples_per_second": 2000.0, "mfu": 0.4321, "data_wait": 0.02}
LINE = {"step": 400, "loss": 2.31415, "grad_norm": 1.0, "eval/top1": 0.635, "timing": TIMING}


def test_what_the_progress_line_says():
    parts = describe(LINE, 600, Work(examples=60))
    assert parts == ["loss 2.314", "ETA 0:00:06", "2,000 examples/s", "MFU 43.2%", "data wait 2%"]
    assert describe_scores(LINE) == ["eval/top1 0.635"]
    out = io.StringIO()
    ProgressLine(600, Work(examples=60), Console(file=out, width=200)).show(LINE)
    assert out.getvalue() == "  ".join(["step 400/600", *parts, "eval/top1 0.635\n"])
    unknown = {"step": 600, "loss": None, "bad": 3, "timing": TIMING | {"mfu": None}}
    parts = describe(unknown, 600, Work(examples=60))
    assert parts == ["loss -", "bad 3", "ETA 0:00:00", "2,000 examples/s", "data wait 2%"]
    found = [fitting(["ab", "cdef", "g"], width) for width in (1, 2, 7, 8, 11)]
    assert found == ["", "ab", "ab", "ab  cdef", "ab  cdef  g"]


@pytest.mark.parametrize(
    ("width", "end"),
    [(80, "loss 2.314  ETA 2:13:20  2,000 examples/s"), (110, "2,000 examples/s  MFU 43.2%  data wait 2%")],
)
def test_the_live_line_keeps_step_bar_and_eta(width, end):
    """On a terminal of 80 columns whole parts are left out at the end; nothing is cut in the middle."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    with ProgressLine(400_000, Work(80), console) as progress:
        progress.show(LINE | {"step": 199_999})
        progress.show(LINE | {"step": 200_000})
    last = out.getvalue().rstrip("\n").replace("\x1b[?25h", "").rpartition("\x1b[2K")[2].rstrip()
    assert last.startswith("step 200,000/400,000 \u2501") and last.endswith(end) and len(last) <= width


def test_devices_that_wait_for_data_are_told_of_once():
    out = io.StringIO()
    progress = ProgressLine(10, Work(4), Console(file=out, width=200))
    timing = {"seconds": 1.0, "examples_per_second": 4.0, "mfu": None, "data_wait": 0.9}
    for step in (1, 2):
        progress.show({"step": step, "loss": 1.0, "timing": timing})
    assert out.getvalue().count("devices are idle 90% of the time, waiting for data: raise pipeline.workers") == 1
    assert out.getvalue().count("data wait 90%") == 2


def test_a_notebook_has_one_bar_that_is_replaced_in_place(monkeypatch):
    shown = []
    handle = SimpleNamespace(update=lambda data, raw: shown.append(data))
    display = SimpleNamespace(display=lambda data, raw, display_id: shown.append(data) or handle)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    progress = ProgressLine(10, Work(4), Console(file=io.StringIO(), force_jupyter=True, width=200))
    timing = {"seconds": 1.0, "examples_per_second": 4.0, "mfu": None, "data_wait": 0.0}
    progress.show({"step": 5, "loss": 1.0, "eval/top1": 0.25, "timing": timing})
    progress.show({"step": 6, "loss": 0.5, "timing": timing})
    assert [data["text/plain"][:9] for data in shown] == ["step 5/10", "step 6/10"]
    assert "loss 0.5 " in shown[1]["text/plain"] and shown[1]["text/plain"].endswith("at step 5: eval/top1 0.25")
    assert '<progress value="6" max="10"' in shown[1]["text/html"]


def test_time_in_which_the_loop_stands_still_for_a_save_is_counted_in_its_window_alone(monkeypatch):
    # start; a step; save from 2.0 to 4.5 (two timers); two steps; the lines
    now = iter([0.0, 1.0, 2.0, 2.0, 4.5, 4.5, 5.0, 9.0, 10.0, 12.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock(Work(examples=10))
    clock.step()
    with clock.saving():
        pass
    clock.step()
    clock.step()
    first, second = clock.close(), clock.close()
    assert first.pop("host_peak") > 10e6  # bytes: an interpreter with jax
    assert first == {
        **{"seconds": 10.0, "examples_per_second": 4.0, "mfu": None, "data_wait": 0.0, "save_stall": 2.5},
        **{"step_p50": 1.5, "step_p95": pytest.approx(3.75), "step_max": 4.0},  # of 1, 1.5 and 4 seconds
    }
    assert second["save_stall"] == 0.0 and second["step_max"] is None
