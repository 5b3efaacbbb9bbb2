"""The edge of a command: unservable addresses, a disk that fails, an interruption, leftovers of killed processes."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from heirloom.common import config, report
from heirloom.common.checkpoint.hub import locate
from heirloom.common.checkpoint.staging import staged
from heirloom.common.cli import main
from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.errors import InputError
from heirloom.common.paths import all_local, local
from heirloom.common.train.loop import Run

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
    (tmp_path / "mine.py").write_text("from dataclasses import replace\nfrom heirloom.common import config\n"
                                      "def get_config():\n    cfg = config.load('tinyclip/smoke')\n"
                                      "    return replace(cfg, data=replace(cfg.data, path='gs://b/x.tar'))\n")  # fmt: skip
    with pytest.raises(InputError, match=r"gs://b/x\.tar"):
        config.load("mine.py")
    assert [p.name for p in tmp_path.iterdir() if p.name != "__pycache__"] == ["mine.py"]


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

    with pytest.raises(InputError, match="s3://b"):
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


@pytest.mark.parametrize("place", ["/proc/x/out", __file__ + "/out"])
def test_a_place_that_cannot_be_written_is_one_line(place, capsys):
    assert main(["doctor", "--json", place]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"heirloom: {place}: could not be written") and len(said) == 1


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
