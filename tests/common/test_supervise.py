import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from heirloom.common.cli import main
from heirloom.common.errors import InputError
from heirloom.common.supervise import run_folder, states, supervise


def script(tmp_path: Path, codes: list[int], save: str = "") -> list[str]:
    """A command that exits with the next of `codes` each time; save: Python that runs first."""
    code = f"""
import pathlib, sys
run, count = pathlib.Path(sys.argv[2]), pathlib.Path({str(tmp_path / "count")!r})
n = int(count.read_text()) if count.exists() else 0
count.write_text(str(n + 1))
{save}
sys.exit({codes}[n])
"""
    (tmp_path / "command.py").write_text(code)
    return [sys.executable, str(tmp_path / "command.py"), "--run", str(tmp_path / "run")]


def runs(tmp_path):
    return int((tmp_path / "count").read_text())


def test_a_graceful_stop_is_continued_at_once(tmp_path):
    waits = []
    ended = supervise(script(tmp_path, [75, 75, 75, 0]), 2, 1.0, waits.append)
    assert (ended.code, ended.why, waits, runs(tmp_path)) == (0, "finished", [], 4)


def test_bad_input_is_not_tried_again(tmp_path):
    ended = supervise(script(tmp_path, [2, 0]), 5, 1.0, pytest.fail)
    assert ended.code == 2 and runs(tmp_path) == 1


def test_crashes_at_one_state_are_limited_and_the_waits_double(tmp_path):
    waits = []
    ended = supervise(script(tmp_path, [1, 139, 1, 1, 0]), 4, 1.5, waits.append)
    assert ended.code == 1 and runs(tmp_path) == 4 and waits == [1.5, 3.0, 6.0]
    assert ended.why == "4 crashes before the first state, the last with exit code 1: see its output above"


def test_a_new_state_begins_the_count_again(tmp_path):
    save = '(run / "checkpoints" / str(10 * n)).mkdir(parents=True)'
    waits = []
    ended = supervise(script(tmp_path, [1, 1, 1, 1, 0], save), 2, 1.0, waits.append)
    assert ended.code == 0 and runs(tmp_path) == 5 and waits == [1.0] * 4


def test_a_signal_counts_as_128_and_its_number(tmp_path):
    save = "import os; os.kill(os.getpid(), 9)"
    ended = supervise(script(tmp_path, [0], save), 1, 1.0, pytest.fail)
    assert ended.code == 137


def test_a_state_of_any_part_of_a_run_begins_the_count_again(tmp_path):
    """Parts are trained in an order that is not that of their names: stage_10 after stage_9, gene-sws after teacher."""
    parts = ["teacher", "gene-sws", "stage_9", "stage_10"]
    save = f'(run / {parts} [n] / "checkpoints" / "10").mkdir(parents=True)'
    waits = []
    ended = supervise(script(tmp_path, [1, 1, 1, 0], save), 2, 1.0, waits.append)
    assert ended.code == 0 and waits == [1.0] * 3


def test_the_newest_state_is_the_one_written_last(tmp_path):
    names = ("stage_9/checkpoints/900", "stage_9/saved/901", "stage_10/checkpoints/20", "stage_10/checkpoints/100")
    for time_, name in enumerate(names):
        (tmp_path / name).mkdir(parents=True)
        os.utime(tmp_path / name, (time_, time_))
    assert states(tmp_path) == [names[0], *names[2:]]
    assert states(tmp_path / "none") == states(None) == []
    assert run_folder(["train", "--run=a/b"]) == run_folder(["--run", "a/b"]) == Path("a/b")
    assert run_folder(["train", "--run"]) is None


def test_sigterm_is_passed_on_and_ends_the_supervision(tmp_path):
    child = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75))"
    child += "; print('up', flush=True); time.sleep(60)"
    command = [sys.executable, "-m", "heirloom.common.cli", "supervise", "--", sys.executable, "-c", child]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said = process.stdout.read()
    assert process.returncode == 75
    assert "stopped on request, exit code 75; the same command continues" in said


def test_the_verb(tmp_path, capfd):
    assert main(["supervise", "--", *script(tmp_path, [75, 0])]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "heirloom supervise: finished"
    assert main(["supervise"]) == 2
    assert "give the command after --" in capfd.readouterr().err
    assert main(["supervise", "--", "no-such-command"]) == 2
    with pytest.raises(InputError, match="cannot be run"):
        supervise(["no-such-command"], 1, 1.0)
