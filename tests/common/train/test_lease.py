"""One job writes a run: who holds `RUN/lease.json`, who may take it, and when."""

import gc
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace

import pytest

from heirloom.common.errors import InputError, Remark
from heirloom.common.train.lease import FILE, SIZE, Holder, Lease
from heirloom.common.train.loop import Run

OTHER = Holder("far", 4242, "2026-01-02 03:04:05 UTC", "0badcafe-4242", place="another kernel", born="77")
LOCAL = Holder.here()


def held_by(folder, holder):
    (folder / FILE).write_bytes(holder.bytes())
    return folder


def holder(folder):
    return json.loads((folder / FILE).read_text())


class Clock:
    """Stands in for `time.sleep`: counts the seconds; `at` runs when they reach a number."""

    def __init__(self, at=None, then=lambda: None):
        self.now, self.at, self.then = 0.0, at, then

    def __call__(self, seconds):
        self.now += seconds
        if self.at is not None and self.now >= self.at:
            self.at = None
            self.then()


def test_a_run_is_held_while_it_is_used_and_released_after(tmp_path):
    run = Run.open(tmp_path, {})
    assert holder(tmp_path) == asdict(run.lease.holder) and holder(tmp_path)["pid"] == os.getpid()
    assert (tmp_path / FILE).stat().st_size == SIZE
    again = Run.open(tmp_path, {})  # the same process: it shares the lease
    assert again.lease is run.lease
    del run
    gc.collect()
    assert (tmp_path / FILE).exists()
    del again
    gc.collect()
    assert not (tmp_path / FILE).exists()


def test_a_live_process_of_this_machine_is_refused_at_once(tmp_path):
    parent = os.getppid()
    held_by(tmp_path, replace(LOCAL, pid=parent, born=born(parent), token="another"))
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(InputError) as refused:
        Run.open(tmp_path, {})
    assert str(refused.value) == (
        f"{tmp_path} is being written by host {LOCAL.host}, pid {parent} since {LOCAL.since}; "
        "stop it, or choose another --run"
    )
    assert (tmp_path / FILE).read_bytes() == before and not (tmp_path / "config.json").exists()


def born(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[19]


def test_the_lease_of_a_killed_process_is_taken_at_once(tmp_path):
    code = """if True:
        import os, signal, sys
        from pathlib import Path
        from heirloom.common.train.lease import Lease
        lease = Lease.take(Path(sys.argv[1]))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    assert holder(tmp_path)["pid"] != os.getpid()
    clock = Clock()
    lease = Lease.take(tmp_path, sleep=clock)
    assert holder(tmp_path) == asdict(lease.holder) and clock.now < 1


@pytest.mark.parametrize("change", [{"born": "1"}, {"pid": 2**22 + 1}])
def test_an_equal_id_of_a_later_process_is_not_the_holder(tmp_path, change):
    held_by(tmp_path, replace(LOCAL, token="another", **change))  # pid 1 after a restart of a container, for example
    lease = Lease.take(tmp_path, sleep=Clock())
    assert holder(tmp_path)["token"] == lease.holder.token == LOCAL.token


def test_the_token_decides_where_host_and_id_are_equal(tmp_path):
    held_by(tmp_path, replace(LOCAL, token="another", place="the same image in another container"))
    clock = Clock(at=10, then=lambda: held_by(tmp_path, replace(LOCAL, token="another", place="container", beat=1)))
    with (
        pytest.warns(Remark, match="waiting 60 s to see whether it still does"),
        pytest.raises(InputError, match=f"is being written by host {LOCAL.host}, pid {os.getpid()} since"),
    ):
        Lease.take(tmp_path, sleep=clock)
    assert 10 <= clock.now < 12


def test_a_holder_elsewhere_is_judged_by_its_beat_not_by_its_clock(tmp_path):
    held_by(tmp_path, replace(OTHER, since="2099-01-01 00:00:00 UTC"))  # a clock that is wrong
    clock = Clock()
    with pytest.warns(Remark) as said:
        lease = Lease.take(tmp_path, sleep=clock)
    assert 60 <= clock.now < 62 and holder(tmp_path) == asdict(lease.holder)
    assert [str(one.message) for one in said] == [
        f"{tmp_path} was last written by host far, pid 4242; waiting 60 s to see whether it still does",
        f"{tmp_path}: its writer was silent for 60 s and is taken to have ended",
    ]


def test_a_lease_that_is_released_meanwhile_is_free(tmp_path):
    held_by(tmp_path, OTHER)
    clock = Clock(at=5, then=(tmp_path / FILE).unlink)
    with pytest.warns(Remark, match="waiting"):
        lease = Lease.take(tmp_path, sleep=clock)
    assert clock.now < 7 and holder(tmp_path) == asdict(lease.holder)


def test_of_two_that_take_a_stale_lease_the_last_has_it(tmp_path):
    held_by(tmp_path, OTHER)
    clock = Clock(at=60.05, then=lambda: held_by(tmp_path, replace(OTHER, host="near", token="faster")))
    with pytest.warns(Remark, match="silent"), pytest.raises(InputError, match="just taken by host near, pid 4242"):
        Lease.take(tmp_path, sleep=clock)
    assert holder(tmp_path)["token"] == "faster"


@pytest.mark.parametrize("damage", [b"", b'{"host": 3, "pi' + b"x" * 2000, OTHER.bytes().replace(b"4242,", b"null,")])
def test_a_damaged_lease_is_waited_for_like_any_other(tmp_path, damage):
    (tmp_path / FILE).write_bytes(damage)
    clock = Clock()
    with pytest.warns(Remark, match="last written by an unknown process"):
        lease = Lease.take(tmp_path, sleep=clock)
    assert clock.now >= 60 and holder(tmp_path) == asdict(lease.holder)


def until(reached):
    """Waits for the thread that keeps a lease; it beats every millisecond here."""
    pause = threading.Event()
    for _ in range(10_000):
        if reached():
            return
        pause.wait(0.001)
    raise AssertionError("not in ten seconds")


def test_the_beat_changes_while_the_lease_is_held(tmp_path):
    lease = Lease.take(tmp_path, beat=0.001)
    until(lambda: (Holder.read(lease.file) or lease.holder).beat > 1)
    assert not lease.lost
    lease.check()


def test_a_job_that_lost_its_run_stops(tmp_path):
    lease = Lease.take(tmp_path, beat=0.001)
    lost = lease.lost
    # Taken while this process was suspended; written again if a beat came between.
    until(lambda: lost or not held_by(tmp_path, OTHER))
    with pytest.raises(InputError) as stopped:
        lease.check()
    assert str(stopped.value) == (
        f"{tmp_path}: host far, pid 4242 took over the run at 2026-01-02 03:04:05 UTC; this job stops, so that only "
        "one writes the run"
    )
    del lease
    gc.collect()
    assert holder(tmp_path)["host"] == "far"  # it is not ours to release
