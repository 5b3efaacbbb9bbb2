import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from heirloom.common.errors import Exit
from heirloom.common.train import watch
from heirloom.common.train.watch import Profile, Watchdog, keep_compiled

STANDS_STILL = """
import sys, threading, time
from pathlib import Path
from heirloom.common.train.watch import Watchdog

def stands_still():
    time.sleep(60)

with Watchdog(0.3, Path(sys.argv[1])) as dog:
    for _ in range(4):
        dog.step()
        time.sleep(0.001)
    stands_still()
"""


def test_a_loop_that_stands_still_ends_and_says_where(tmp_path):
    began = time.monotonic()
    run = [sys.executable, "-c", STANDS_STILL, str(tmp_path / "stacks.txt")]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=50)
    assert ended.returncode == Exit.LOST and time.monotonic() - began < 40
    assert ended.stderr.startswith("heirloom: no step for ") and "Traceback" not in ended.stderr
    assert str(tmp_path / "stacks.txt") in ended.stderr
    assert "stands_still" in (tmp_path / "stacks.txt").read_text()


STEP_BY_STEP = """
import sys
from pathlib import Path
from heirloom.common.train.watch import Watchdog

with Watchdog(2, Path(sys.argv[1])) as dog:
    for line in sys.stdin:
        dog.step()
        print(line, end="", flush=True)
"""


def test_a_process_that_was_suspended_goes_on(tmp_path):
    run = [sys.executable, "-c", STEP_BY_STEP, str(tmp_path / "stacks.txt")]
    with subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        process.stdin.write("1\n2\n")
        assert [process.stdout.readline() for _ in range(2)] == ["1\n", "2\n"]
        process.send_signal(signal.SIGSTOP)  # as Ctrl-Z
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.6)  # some waits of the watchdog
        assert process.communicate("3\n", timeout=50)[0] == "3\n"
    assert process.returncode == 0 and not (tmp_path / "stacks.txt").exists()


def test_neither_the_first_step_nor_a_pause_nor_a_slow_loop_ends(tmp_path):
    ends = []
    with Watchdog(0.1, tmp_path / "stacks.txt", ends.append) as dog:
        time.sleep(0.3)  # compiles
        for _ in range(4):
            dog.step()
            time.sleep(0.06)
        with dog.paused():
            time.sleep(0.9)
        assert dog.limit() > 0.5  # ten medians
        time.sleep(0.2)
        dog.step()
    assert not ends and not (tmp_path / "stacks.txt").exists()


def test_no_seconds_watch_nothing(tmp_path):
    with Watchdog(0, tmp_path / "stacks.txt") as dog:
        assert not dog._thread.is_alive()


@pytest.mark.parametrize("steps, total, recorded", [(3, 30, (10, 13)), (3, 11, (10, 11)), (0, 30, None)])
def test_the_steps_of_a_profile(steps, total, recorded, tmp_path, monkeypatch):
    at, seen = 0, []
    profiler = SimpleNamespace(
        start_trace=lambda folder: seen.append((at, os.path.basename(folder))), stop_trace=lambda: seen.append((at, ""))
    )
    monkeypatch.setattr(watch.jax, "profiler", profiler)
    with Profile(steps, tmp_path / "profile") as profile:
        for at in range(1, total + 1):  # noqa: B007
            profile.step()
    assert seen == ([(recorded[0], "profile"), (recorded[1], "")] if recorded else [])


@pytest.fixture
def cached(monkeypatch):
    """`cached(factor)`: compiles a program; the caches of this process are as before, afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setattr(watch, "_kept", "")
    jax.config.update(names[0], None)
    jax.config.update(names[1], 0)
    yield lambda factor: jax.jit(lambda x: factor * x)(1.0)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_each_run_keeps_its_own_programs(tmp_path, cached):
    for factor, name in ((3.5, "one"), (4.5, "two")):
        keep_compiled(tmp_path / name)
        cached(factor)
    assert all(list((tmp_path / name).iterdir()) for name in ("one", "two"))


def test_programs_stay_in_the_cache_that_somebody_has_set(tmp_path, cached):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "shared"))
    compilation_cache.reset_cache()
    keep_compiled(tmp_path / "run")
    cached(5.5)
    assert list((tmp_path / "shared").iterdir()) and not (tmp_path / "run").exists()
