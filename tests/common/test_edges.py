"""The edge of a command: addresses it cannot serve, a disk that fails, an interruption, what killed processes left behind."""

import os
import socket
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from common import config, report
from common.checkpoint.hub import locate
from common.checkpoint.weights import staged
from common.cli import main
from common.data.sources import SourceConfig, open_source
from common.errors import InputError, Remark
from common.paths import all_local, local
from common.train.loop import Run

ADDRESSES = {
    "a source in a bucket": ["convert", "gs://bucket/model", "out"],
    "a destination in a bucket": ["convert", "embedded:emoji", "s3://bucket/out"],
    "a run in a bucket": ["train", "tinyclip/smoke", "--run", "gs://bucket/run"],
    "data in a bucket": ["eval", "embedded:emoji", "--data", "gs://bucket/data"],
    "a field of a recipe": ["train", "tinyclip/smoke", "--run", "run", "--data.path=s3://bucket/{0..3}.tar"],
    "JSON in a bucket": ["doctor", "--json", "memory://x.json"],
    "a web address": ["inspect", "https://huggingface.co/openai/clip-vit-base-patch32"],
    "a file address": ["inspect", "file:///tmp/model"],
    "a report of a run in a bucket": ["report", "gs://bucket/run"],
    "a cache in a bucket": ["train", "tinyclip/emoji", "--run", "run", "--teacher", "cache:gs://bucket/cache"],
}


@pytest.mark.parametrize("case", ADDRESSES)
def test_an_address_with_a_scheme_is_refused_at_once(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(ADDRESSES[case]) == 2
    said = capsys.readouterr().err
    assert said.startswith("heirloom: ") and said.count("\n") == 1 and "://" in said
    assert list(tmp_path.iterdir()) == []


def test_every_door_of_the_library_refuses_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"buckets \(gs:\) are neither read nor written"):
        locate("gs://bucket/model")
    with pytest.raises(InputError, match=r"buckets \(s3:\) are neither read nor written"):
        open_source(SourceConfig("s3://bucket/{0..3}.tar"))
    with pytest.raises(InputError, match=r"gs:/bucket/run: buckets"):
        Run.open(Path("gs://bucket/run"), {})
    with pytest.raises(InputError, match=r"s3:/bucket/out: buckets"), staged(Path("s3://bucket/out")):
        raise AssertionError("never here")
    (tmp_path / "mine.py").write_text("from dataclasses import replace\nfrom common import config\n"
                                      "def get_config():\n    cfg = config.load('tinyclip/smoke')\n"
                                      "    return replace(cfg, data=replace(cfg.data, path='gs://b/x.tar'))\n")  # fmt: skip
    with pytest.raises(InputError, match=r"gs://b/x\.tar"):
        config.load("mine.py")
    assert [p.name for p in tmp_path.iterdir() if p.name != "__pycache__"] == ["mine.py"]


@pytest.mark.parametrize("path", ["hf:org/name@v1", "embedded:emoji", "tfds:mnist@/data", "cache:/data/x", "emoji:noto", "C:/x", "x=y"])
def test_what_is_no_such_address_is_left_alone(path):
    local(path)


def test_configs_are_searched_at_any_depth():
    @dataclass(frozen=True)
    class Inner:
        paths: tuple[str, ...] = ("a", "s3://b")

    @dataclass(frozen=True)
    class Outer:
        steps: int = 1
        inner: Inner = field(default_factory=Inner)

    with pytest.raises(InputError, match="s3://b"):
        all_local(Outer())


def test_an_error_of_the_disk_is_one_line(capsys, monkeypatch):
    def fails(*_):
        raise OSError(28, "No space left on device", "runs/x/metrics.jsonl")

    monkeypatch.setattr("common.cli._doctor", fails)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "heirloom: runs/x/metrics.jsonl: No space left on device\n"


def test_an_interruption_is_one_line(capsys, monkeypatch):
    def stops(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("common.cli._doctor", stops)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_a_mistake_of_ours_stays_a_traceback(monkeypatch):
    def wrong(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("common.cli._doctor", wrong)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_a_reader_that_has_enough_ends_the_command_quietly():
    command = f"{sys.executable} -c 'from common.cli import main; import sys; sys.exit(main([\"inspect\", \"tinyclip/smoke\"]))'"
    done = subprocess.run(f"{command} | true", shell=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stderr == ""


@pytest.mark.parametrize("place", ["/proc/x/out", __file__ + "/out"])
def test_a_place_that_cannot_be_written_is_one_line(place, capsys):
    assert main(["doctor", "--json", place]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"heirloom: {place}: could not be written") and len(said) == 1


def dead() -> int:
    """The number of a process that is gone."""
    done = subprocess.Popen(["true"])
    done.wait()
    return done.pid


def test_what_killed_processes_left_is_removed_and_said(tmp_path):
    stale = tmp_path / f".out.partial-{socket.gethostname()}-{dead()}"
    stale.mkdir()
    (stale / "half").write_text("x")
    others = [tmp_path / f".out.partial-another-host-{dead()}", tmp_path / f".out.partial-{socket.gethostname()}-{os.getppid()}"]
    for other in others:
        other.mkdir()
    with pytest.warns(Remark, match=r"\.out\.partial-.*: removed, an interrupted command left it"), staged(tmp_path / "out") as part:
        part.write_text("new")
    assert (tmp_path / "out").read_text() == "new" and not stale.exists() and all(other.exists() for other in others)


def test_what_an_interrupted_replacement_moved_away_is_put_back(tmp_path):
    """Killed between the two renames of --force: the old one is all there is."""
    old = tmp_path / f".out.old-{socket.gethostname()}-{dead()}"
    old.mkdir()
    (old / "weights").write_text("old")
    with pytest.warns(Remark, match="put back"), pytest.raises(InputError, match="exists; give another name"), staged(tmp_path / "out"):
        raise AssertionError("never here")
    assert (tmp_path / "out" / "weights").read_text() == "old"


def test_a_replacement_whose_second_rename_fails_restores_the_first(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "weights").write_text("old")
    real = Path.rename

    def fails(self, target):
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(InputError, match="could not be written"), staged(out, force=True) as part:
        part.mkdir()
    assert (out / "weights").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text("old")
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("a file needs no second name"))
    with warnings.catch_warnings(), staged(tmp_path / "x.json", force=True) as part:
        warnings.simplefilter("error")
        part.write_text("new")
    assert (tmp_path / "x.json").read_text() == "new"


def test_names_of_samples_are_escaped_in_the_report(tmp_path):
    run = tmp_path / "<script>alert(1)<"
    (run / "samples").mkdir(parents=True)
    (run / "config.json").write_text('{"data": "<img src=x onerror=alert(1)>"}')
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "<b>bold": 1.0}\n')
    (run / "samples" / "<script>x<.png").write_bytes(b"")
    page = report.write(run).read_text()
    assert "<script>" not in page and "<b>" not in page and "<img src=x" not in page and "&lt;script&gt;x&lt;" in page


def test_a_damaged_config_of_a_run_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: cannot be read as JSON"):
        Run.open(tmp_path, {"a": 1})
