"""Weights in buckets: downloaded once, continued, never stale; conversions are uploaded with the index last."""

import json
from pathlib import Path

import numpy as np
import pytest

from heirloom.common import fetch as fetching
from heirloom.common import files
from heirloom.common.checkpoint.hub import locate
from heirloom.common.cli import main
from heirloom.common.errors import InputError, Remark
from heirloom.common.fetch import copy_of, fetch, origin
from heirloom.common.files import staged
from heirloom.common.methods import open_any
from heirloom.common.paths import Address

GOLDEN = Path(__file__).parents[2] / "golden" / "clip" / "hf_quick_gelu"


@pytest.fixture
def reads(monkeypatch) -> list[tuple[str, int]]:
    """Collects the ranged requests: name of the object, first byte."""
    found, whole = [], Address.read_range

    def read(self, start, size):
        found.append((self.name, start))
        return whole(self, start, size)

    monkeypatch.setattr(Address, "read_range", read)
    return found


def test_a_model_there_and_back(bucket, tmp_path, put, capsys, reads):
    put(GOLDEN, bucket.child("hf"))
    assert main(["convert", f"{bucket}/hf", f"{bucket}/ours", "--no-verify", "--json", f"{bucket}/check.json"]) == 0
    assert main(["convert", str(GOLDEN), str(tmp_path / "ours"), "--no-verify"]) == 0
    there = bucket.child("ours")
    assert sorted(there.files()) == sorted(file.name for file in (tmp_path / "ours").iterdir())
    assert there.child("model.safetensors").read_bytes() == (tmp_path / "ours" / "model.safetensors").read_bytes()
    assert json.loads(there.child("provenance.json").read_bytes())["source"] == f"{bucket}/hf"
    assert json.loads(bucket.child("check.json").read_bytes())["passed"] is True
    one, other = open_any(f"{there}"), open_any(str(tmp_path / "ours"))
    assert one.cfg == other.cfg
    assert all(np.array_equal(np.asarray(v), np.asarray(other.source.values[k])) for k, v in one.source.values.items())
    reads.clear()
    assert main(["inspect", f"{there}"]) == 0
    assert reads == []  # the copy is used again
    assert main(["convert", f"{bucket}/hf", f"{bucket}/ours", "--no-verify"]) == 2
    assert capsys.readouterr().err == f"heirloom: {there} exists; give another name, or --force to replace it\n"


def test_a_file_comes_with_its_sidecar_files(bucket, put):
    put(GOLDEN, bucket)
    bucket.child("other.safetensors").write_bytes(b"not wanted")
    found = locate(f"{bucket}/model.safetensors")
    assert found.read_bytes() == (GOLDEN / "model.safetensors").read_bytes()
    assert (found.parent / "config.json").is_file() and not (found.parent / "other.safetensors").exists()
    assert open_any(f"{bucket}/model.safetensors").cfg == open_any(str(GOLDEN / "model.safetensors")).cfg


def test_a_changed_object_is_downloaded_again_and_one_that_is_gone_is_no_longer_used(bucket):
    for name in ("a.json", "b.json"):
        bucket.child(name).write_bytes(b"1")
    folder = locate(str(bucket))
    bucket.child("a.json").write_bytes(b"2")
    bucket.child("b.json").unlink()
    assert locate(str(bucket)) == folder and [file.name for file in folder.iterdir()] == ["a.json"]
    assert (folder / "a.json").read_bytes() == b"2"


def test_of_a_run_everything_but_the_states(memory):
    names = ("metrics.jsonl", "config.json", "model/config.json", "checkpoints/10/state/d/0")
    for name in names:
        memory.child(name).write_bytes(b"{}")
    folder = locate(str(memory))
    found = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    assert found == ["config.json", "metrics.jsonl", "model/config.json"]


def test_shards_come_with_their_index_and_a_missing_one_is_named(memory):
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    memory.child("model.safetensors.index.json").write_bytes(json.dumps(index).encode())
    memory.child("m-1.safetensors").write_bytes((GOLDEN / "model.safetensors").read_bytes())
    found = locate(f"{memory}/model.safetensors.index.json")
    assert sorted(file.name for file in found.parent.iterdir()) == ["m-1.safetensors", found.name]
    with pytest.raises(InputError, match=r"index\.json: the shard m-2\.safetensors is missing; fetch it and try again"):
        open_any(f"{memory}/model.safetensors.index.json")


def test_an_interrupted_download_is_continued(bucket, monkeypatch, reads):
    data = np.random.default_rng(0).bytes(2500)
    bucket.child("model.bin").write_bytes(data)
    monkeypatch.setattr(fetching, "CHUNK", 1000)
    whole = Address.read_range

    def breaks(self, start, size):
        if start >= 1000:
            raise OSError(5, "503 Service Unavailable")
        return whole(self, start, size)

    with monkeypatch.context() as patch:
        patch.setattr(Address, "read_range", breaks)
        with (
            pytest.warns(Remark, match=r"model\.bin: downloading 0 MB into"),
            pytest.raises(InputError, match=r"model\.bin is not readable: 503 Service Unavailable"),
        ):
            fetch(bucket.child("model.bin"))
    assert not copy_of(bucket.child("model.bin")).exists()
    reads.clear()
    with pytest.warns(Remark, match="the first 0 MB are here"):
        assert fetch(bucket.child("model.bin")).read_bytes() == data
    assert reads == [("model.bin", 1000), ("model.bin", 2000)]


def test_an_object_that_is_replaced_during_the_download_is_never_mixed(memory, monkeypatch):
    memory.child("model.bin").write_bytes(b"old" * 500)
    monkeypatch.setattr(fetching, "CHUNK", 1000)
    whole = Address.read_range

    def replaced(self, start, size):
        data = whole(self, start, size)
        self.write_bytes(b"new" * 500)
        return data

    with (
        monkeypatch.context() as patch,
        pytest.warns(Remark),
        pytest.raises(InputError, match=r"cannot be downloaded \(it was replaced while it was downloaded"),
    ):
        patch.setattr(Address, "read_range", replaced)
        fetch(memory.child("model.bin"))
    with pytest.warns(Remark):
        assert fetch(memory.child("model.bin")).read_bytes() == b"new" * 500


def test_a_name_that_would_leave_the_cache_is_refused(memory, cache):
    memory.child("../../../../x.json").write_bytes(b"{}")
    memory.child("config.json").write_bytes(b"{}")
    with pytest.raises(InputError, match=r"the object '\.\./.*x\.json' cannot be a file here; rename it"):
        locate(str(memory))
    assert not list(cache.parent.parent.rglob("x.json"))


def test_what_is_missing_or_offline_is_one_line(bucket, monkeypatch, capsys):
    assert main(["inspect", f"{bucket}/nothing"]) == 2
    assert capsys.readouterr().err == f"heirloom: {bucket}/nothing: no such file or folder\n"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="would be downloaded; leave out --offline "):
        locate(f"{bucket}/nothing")


def _write(folder: Path, names: tuple[str, ...], text: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


NAMES = ("config.json", "model_index.json", "vae/config.json", "vae/model.safetensors", "a.txt")


def test_the_index_is_uploaded_last_and_removed_first(bucket, monkeypatch):
    out, done = bucket.child("out"), []
    up, gone = Address.upload, Address.unlink

    def upload(self, file):
        done.append(f"+{self.relative_to(out)}")
        up(self, file)

    def unlink(self):
        done.append(f"-{self.relative_to(out)}")
        gone(self)

    monkeypatch.setattr(Address, "upload", upload)
    monkeypatch.setattr(Address, "unlink", unlink)
    with staged(out) as folder:
        _write(folder, NAMES, "old")
    assert done == ["+vae/model.safetensors", "+a.txt", "+vae/config.json", "+config.json", "+model_index.json"]
    done.clear()
    with staged(out, force=True) as folder:
        _write(folder, ("config.json", "b.txt"), "new")
    assert set(done[:2]) == {"-config.json", "-model_index.json"} and done[2] == "-vae/config.json"
    assert done[3:5] == ["+b.txt", "+config.json"] and sorted(out.files()) == ["b.txt", "config.json"]


@pytest.mark.parametrize("at", range(len(NAMES)))
def test_an_upload_that_fails_leaves_nothing(at, memory, monkeypatch):
    up, count = Address.upload, iter(range(9))

    def fails(self, file):
        if next(count) == at:
            raise OSError(5, "503 Service Unavailable")
        up(self, file)

    monkeypatch.setattr(Address, "upload", fails)
    with (
        pytest.raises(InputError, match=r"out: could not be written \(503 Service Unavailable\); check the bucket"),
        staged(memory.child("out")) as folder,
    ):
        _write(folder, NAMES, "x")
    assert memory.child("out").files() == {}


def test_a_command_that_fails_uploads_nothing(memory):
    with pytest.raises(ZeroDivisionError), staged(memory.child("out")) as folder:
        _write(folder, NAMES, "x")
        raise ZeroDivisionError
    assert not memory.child("out").exists() and not folder.exists()


def test_an_upload_of_which_bytes_are_missing_is_an_error(memory, tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"12345")
    monkeypatch.setattr(type(memory._fs), "put_file", lambda fs, file, path: fs.pipe_file(path, b"123"))
    with pytest.raises(OSError, match="3 of 5 bytes arrived"):
        memory.child("f").upload(tmp_path / "f")


def test_a_file_and_a_folder_never_replace_each_other(memory):
    memory.child("out/x").write_bytes(b"1")
    memory.child("file").write_bytes(b"1")
    out, file = memory.child("out"), memory.child("file")
    with pytest.raises(InputError, match="out is a folder, which this would hide"), staged(out, force=True) as new:
        new.write_text("x")
    with pytest.raises(InputError, match="file is a file, which this would hide"), staged(file, force=True) as new:
        new.mkdir()
    assert sorted(memory.files()) == ["file", "out/x"]


def test_a_copy_knows_its_address(memory, tmp_path):
    assert origin(copy_of(memory.child("a/b"))) == f"{memory}/a/b" and origin(tmp_path) == str(tmp_path)


def test_a_report_of_a_run_in_a_bucket(memory, capsys):
    memory.child("metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.5}\n')
    memory.child("config.json").write_bytes(b'{"seed": 7}')
    assert main(["report", str(memory)]) == 0
    assert capsys.readouterr().out == f"{memory}/report.html\n"
    page = memory.child("report.html").read_text()
    assert "<dt>steps</dt><dd>1</dd>" in page and "&quot;seed&quot;: 7" in page
    assert main(["report", f"{memory}/other"]) == 2
    assert "is not a run: it has no metrics.jsonl" in capsys.readouterr().err


def test_an_index_is_what_readers_recognise():
    names = ("config.json", "vae/config.json", "model_index.json", "model.safetensors.index.json", "verify.json")
    assert [files._is_index(name) for name in names] == [True, True, True, True, False]
