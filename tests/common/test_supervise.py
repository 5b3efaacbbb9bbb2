import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from heirloom.common.cli import main
from heirloom.common.errors import InputError
from heirloom.common.supervise import last_state, run_folder, supervise


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


def test_the_newest_state_of_the_last_stage(tmp_path):
    for name in ("stage_1/checkpoints/900", "stage_2/checkpoints/20", "stage_2/checkpoints/100", "stage_2/saved/101"):
        (tmp_path / name).mkdir(parents=True)
    assert last_state(tmp_path) == "stage_2/checkpoints/100"
    assert last_state(tmp_path / "none") == last_state(None) == ""
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
