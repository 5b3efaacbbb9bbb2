import io
import json

import pytest
from rich.console import Console

from heirloom.common.errors import InputError
from heirloom.common.train.metrics import (
    Clock,
    MetricsFile,
    ProgressLine,
    TensorBoard,
    WeightsAndBiases,
    Window,
    Work,
    describe,
)


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


def test_the_progress_line():
    timing = {"seconds": 9.0, "examples_per_second": 2000.0, "mfu": 0.4321, "data_wait": 0.02}
    line = {"step": 400, "loss": 2.31415, "grad_norm": 1.0, "eval/top1": 0.635, "timing": timing}
    expected = "loss 2.314  2,000 examples/s  MFU 43.2%  data wait 2%  ETA 0:00:06  eval/top1 0.635"
    assert describe(line, 600, Work(examples=60)) == expected
    unknown = {"step": 600, "loss": None, "timing": timing | {"mfu": None}}
    assert describe(unknown, 600, Work(examples=60)) == "loss -  2,000 examples/s  MFU -  data wait 2%  ETA 0:00:00"


@pytest.mark.parametrize(
    "writer, package", [(lambda d: TensorBoard(d), "tensorboardX"), (lambda d: WeightsAndBiases(d, {}), "wandb")]
)
def test_a_missing_package_says_what_to_install(writer, package, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(InputError, match=f"pip install {package}"):
        writer(tmp_path)


def test_devices_that_wait_for_data_are_told_of_once():
    out = io.StringIO()
    progress = ProgressLine(10, Work(4), Console(file=out, width=200))
    timing = {"seconds": 1.0, "examples_per_second": 4.0, "mfu": None, "data_wait": 0.9}
    for step in (1, 2):
        progress.show({"step": step, "loss": 1.0, "timing": timing})
    assert out.getvalue().count("devices are idle 90% of the time, waiting for data: raise pipeline.workers") == 1
    assert out.getvalue().count("data wait 90%") == 2


def test_time_in_which_the_loop_stands_still_for_a_save_is_counted_in_its_window_alone(monkeypatch):
    now = iter([0.0, 1.0, 1.0, 3.5, 3.5, 10.0, 12.0])  # start; save from 1.0 to 3.5 (two timers); two lines
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock(Work(examples=6))
    with clock.saving():
        pass
    clock.steps = 5
    first, second = clock.close(), clock.close()
    assert first == {"seconds": 10.0, "examples_per_second": 4.0, "mfu": None, "data_wait": 0.0, "save_stall": 2.5}
    assert second["save_stall"] == 0.0
