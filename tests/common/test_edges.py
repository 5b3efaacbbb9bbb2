"""The edge of a command: unservable addresses, a disk that fails, an interruption, leftovers of killed processes."""

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from heirloom.common import config, paths, verbs
from heirloom.common.checkpoint.verify import guarded
from heirloom.common.cli import main
from heirloom.common.errors import InputError
from heirloom.common.files import staged
from heirloom.common.paths import all_local, local
from heirloom.common.train.loop import Run

ADDRESSES = {
    "a field that is no source": (
        ["train", "tinyclip/smoke", "--run", "run", "--tokenizer=memory://b/t"],
        "memory://b/t: heirloom train --tokenizer takes no",
    ),
    "a cache in a bucket": (
        ["train", "tinyclip/emoji", "--run", "run", "--teacher", "cache:gs://b/cache"],
        "cache:gs://b/cache: heirloom train --teacher takes no",
    ),
    "where a cache goes": (["cache", "tinyclip/emoji", "s3://b/c"], "s3://b/c: heirloom cache DEST takes no"),
    "where pictures go": (["sample", "m", "--out", "s3://b/x.png"], "s3://b/x.png: heirloom sample FILE|DIR takes no"),
    "a sampler setting": (["eval", "m", "--save", "gs://b/x.npz"], "gs://b/x.npz: heirloom eval --save takes no"),
    "pictures of a generator": (["generate", "m", "--dataset", "gs://b/x"], "gs://b/x: heirloom generate DIR takes no"),
    "runs of a comparison": (["compare", "c", "--run", "gs://b/x"], "gs://b/x: heirloom compare DIR takes no"),
    "TFDS in a bucket": (["eval", "m", "--data", "tfds:mnist@gs://b/d"], "tfds:mnist@gs://b/d: heirloom eval --data takes"),
    "a web address": (["inspect", "https://x.co/openai/clip"], "https://x.co/openai/clip: web addresses are not read"),
    "another scheme": (["inspect", "az://b/model"], "az://b/model: there is no way to read az: addresses; known are gs"),
    "no bucket": (["inspect", "memory://"], "memory://: give a bucket and names, such as memory://bucket/folder/name"),
    "a way out": (["inspect", "memory://b/../c"], "memory://b/../c: give a bucket and names"),
    "a file of another host": (["inspect", "file://host/model"], "file://host/model: write the path alone"),
}


@pytest.mark.parametrize("case", ADDRESSES)
def test_an_address_is_refused_at_once_by_the_name_of_the_verb(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, message = ADDRESSES[case]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"heirloom: {message}") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_library_of_a_scheme_is_named_before_anything_is_written(capsys, tmp_path, monkeypatch):
    def missing(scheme):
        raise ImportError(f"install a library for {scheme}")

    paths._library.cache_clear()
    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    monkeypatch.chdir(tmp_path)
    needed = "heirloom: s3:// addresses need another library: pip install 'heirloom-jax[s3]'\n"
    for command in (
        ["convert", "s3://b/model", "out"],
        ["convert", "embedded:emoji", "s3://b/out"],
        ["train", "tinyclip/smoke", "--run", "run", "--data.path=s3://b/{0..3}.tar"],
        ["eval", "embedded:emoji", "--data", "s3://b/data"],
        ["doctor", "--json", "s3://b/x.json"],
        ["report", "s3://b/run"],
    ):
        assert main(command) == 2
        assert capsys.readouterr().err == needed
    assert list(tmp_path.iterdir()) == []


def test_the_doors_of_the_library_refuse_them_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"gs://bucket/run: a run takes no address in a bucket \(gs:\)"):
        Run.open(Path("gs://bucket/run"), {})
    with pytest.raises(InputError, match=r"s3://bucket/out: this command takes"), staged(Path("s3://bucket/out")):
        raise AssertionError("never here")
    (tmp_path / "mine.py").write_text("from dataclasses import replace\nfrom heirloom.common import config\n"
                                      "def get_config():\n    cfg = config.load('tinyclip/smoke')\n"
                                      "    return replace(cfg, data=replace(cfg.data, split='gs://b/x.tar'))\n")  # fmt: skip
    with pytest.raises(InputError, match=r"gs://b/x\.tar: heirloom train --data\.split takes no address"):
        config.load("mine.py")
    assert [p.name for p in tmp_path.iterdir() if p.name != "__pycache__"] == ["mine.py"]


def test_file_addresses_are_paths(tmp_path, capsys):
    assert main(["inspect", f"file://{tmp_path}/model"]) == 2
    assert capsys.readouterr().err.startswith(f"heirloom: {tmp_path}/model: no such file or folder")
    assert main(["doctor", f"--json=file://{tmp_path}/x.json"]) == 0
    assert (tmp_path / "x.json").is_file()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "tinyclip/smoke", "--run="], "argument --run: the path is empty"),
        (["rank", "m", "--unfreeze", ""], "argument --unfreeze: the path is empty"),
        (["convert", "embedded:emoji", "hf:me/x"], "hf:me/x: write a local folder, then heirloom push FOLDER hf:me/x"),
        (["explore", "m", "--select=a", "--test=b", "--out=hf:me/x"], "hf:me/x: write a local folder, then heirloom push"),
        (["train", "tinyclip/smoke", "--run", "gs:/b/x"], "gs:/b/x: write gs://b/x, with two slashes"),
        (["inspect", "file:/model"], "file:/model: write the path alone, without file:"),
    ],
)  # fmt: skip
def test_what_is_no_place_is_refused_before_anything_is_written(command, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    assert capsys.readouterr().err.startswith(f"heirloom: {message}") and list(tmp_path.iterdir()) == []


def test_data_and_sources_of_a_recipe_may_be_addresses():
    cfg = config.load("tinyclip/smoke", ["--data.path", "memory://b/{0..3}.tar", "--teacher", "memory://b/model"])
    assert (cfg.data.path, cfg.teacher) == ("memory://b/{0..3}.tar", "memory://b/model")


@pytest.mark.parametrize(
    "path", ["hf:org/name@v1", "embedded:emoji", "tfds:mnist@/data", "cache:/data/x", "emoji:noto", "C:/x", "x=y"]
)
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

    with pytest.raises(InputError, match=r"s3://b: this recipe --inner\.paths takes no address"):
        all_local(Outer())


def test_an_error_of_the_disk_is_one_line(capsys, monkeypatch):
    def fails(*_):
        raise OSError(28, "No space left on device", "runs/x/metrics.jsonl")

    monkeypatch.setattr("heirloom.common.verbs.doctor", fails)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "heirloom: runs/x/metrics.jsonl: No space left on device\n"


def test_an_interruption_is_one_line(capsys, monkeypatch):
    def stops(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("heirloom.common.verbs.doctor", stops)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_a_mistake_of_ours_stays_a_traceback(monkeypatch):
    def wrong(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("heirloom.common.verbs.doctor", wrong)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_a_reader_that_has_enough_ends_the_command_quietly():
    command = (
        f'{sys.executable} -c \'from heirloom.common.cli import main; import sys; sys.exit(main(["inspect",'
        ' "tinyclip/smoke"]))\''
    )
    done = subprocess.run(
        f"{command} | true", shell=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.stderr == ""


def lost():
    with contextlib.suppress(BaseException):  # as Python does in callbacks of gc
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("work", [lost, lambda: guarded(lambda: os.kill(os.getpid(), signal.SIGTERM))])
def test_nobody_swallows_sigterm(work, tmp_path, monkeypatch, capsys):
    def write(args):
        with staged(tmp_path / "out") as file:
            file.write_text("x")
            work()

    for verb in (write, lambda args: work()):
        monkeypatch.setattr(verbs, "recipes", verb)
        assert main(["recipes"]) == 75 and list(tmp_path.iterdir()) == []
        assert capsys.readouterr().out.startswith("stopped by SIGTERM; incomplete results were removed")


@pytest.mark.parametrize("place", ["/proc/x/out", __file__ + "/out"])
def test_a_place_that_cannot_be_written_is_one_line(place, capsys):
    assert main(["doctor", "--json", place]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"heirloom: {place}: could not be written") and len(said) == 1


def test_a_damaged_config_of_a_run_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: cannot be read as JSON"):
        Run.open(tmp_path, {"a": 1})
