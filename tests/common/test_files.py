"""What happens to a destination when a process dies, and to what dead processes leave."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from heirloom.common import files
from heirloom.common.errors import InputError, Remark
from heirloom.common.files import staged


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    return tmp_path / "out"


@pytest.fixture(params=["swapped", "by two renames"])
def way(request, monkeypatch):
    if request.param == "by two renames":
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_replaced(out, way):
    with staged(out, force=True) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("y")
    assert names(out) == ["new"] and names(out.parent) == ["out"]


def test_a_file_is_replaced_and_a_folder_never_by_a_file(out, tmp_path):
    (tmp_path / "file").write_text("old")
    with staged(tmp_path / "file", force=True) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "file").read_text() == "new"
    with (
        pytest.raises(InputError, match="out is a folder; give the name of a file"),
        staged(out, force=True) as temporary,
    ):
        temporary.write_text("new")
    assert names(out) == ["old"] and names(tmp_path) == ["file", "out"]


def test_a_folder_that_holds_what_is_read_is_not_replaced(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for held in (out / "old", Path("out/old")):
        with pytest.raises(InputError, match=r"out holds .*old, which is read here"):
            staged(out, force=True, inputs=[held]).__enter__()
    with staged(out, force=True, inputs=[out, tmp_path, tmp_path / "out2" / "old"]) as temporary:
        temporary.mkdir()
    assert names(tmp_path) == ["out"] and not names(out)


@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_second_rename_that_fails_gives_the_old_folder_its_name_back(out, monkeypatch, failure):
    rename = Path.rename

    def fails(self, target):
        if ".partial-" in self.name:
            raise failure
        return rename(self, target)

    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises((InputError, KeyboardInterrupt)), staged(out, force=True) as temporary:
        temporary.mkdir()
    assert names(out) == ["old"] and names(out.parent) == ["out"]


def dead() -> int:
    """The number of a process that is gone."""
    done = subprocess.Popen(["true"])
    done.wait()
    return done.pid


def test_what_killed_processes_left_is_removed_and_said(tmp_path):
    stale = tmp_path / f".out.partial-{socket.gethostname()}-{dead()}"
    stale.mkdir()
    (stale / "half").write_text("x")
    others = [
        tmp_path / f".out.partial-another-host-{dead()}",
        tmp_path / f".out.partial-{socket.gethostname()}-{os.getppid()}",
    ]
    for other in others:
        other.mkdir()
    with (
        pytest.warns(Remark, match=r"\.out\.partial-.*: removed; an interrupted command left it"),
        staged(tmp_path / "out") as part,
    ):
        part.write_text("new")
    assert (tmp_path / "out").read_text() == "new" and not stale.exists() and all(other.exists() for other in others)


def test_what_an_interrupted_replacement_moved_away_is_put_back(tmp_path):
    """Killed between the two renames of --force: the old one is all there is."""
    old = tmp_path / f".out.old-{socket.gethostname()}-{dead()}"
    old.mkdir()
    (old / "weights").write_text("old")
    restored = pytest.warns(Remark, match="restored after an interrupted command")
    with restored, pytest.raises(InputError, match="exists; give another name"), staged(tmp_path / "out"):
        raise AssertionError("never here")
    assert (tmp_path / "out" / "weights").read_text() == "old"


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_no_name_is_no_destination(name):
    with pytest.raises(InputError, match="cannot be the name of a new file or folder"), staged(Path(name), force=True):
        pass
