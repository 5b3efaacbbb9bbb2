"""Data in buckets: records, their order and resumed streams equal those of local copies."""

from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from heirloom.common import reading
from heirloom.common.data import catalogue, tar_index
from heirloom.common.data.pipeline import PipelineConfig, training_batches
from heirloom.common.data.sources import SourceConfig, open_source, per_picture
from heirloom.common.errors import InputError
from heirloom.common.paths import Address, place


def _records(root, path: str, **columns) -> list[dict]:
    source = open_source(SourceConfig(f"{root}{path}", **columns))
    return [source[i] | {"key": source[i]["key"].removeprefix(f"{root}/")} for i in range(len(source))]


def _same(one: list[dict], other: list[dict]) -> bool:
    def plain(record: dict) -> dict:
        return {k: v.tolist() if isinstance(v, np.ndarray | np.generic) else v for k, v in record.items()}

    return bool(one) and list(map(plain, one)) == list(map(plain, other))


def _shards(folder: Path, write_tar) -> None:
    for n in range(3):
        write_tar(folder / f"s-{n:04d}.tar", 10 * n, 3 + n)
    (folder / "classnames.txt").write_text("a\nb\nc\n")


@pytest.mark.parametrize("path", ["", "/s-{0000..0002}.tar", "/s-*.tar", "/s-0001.tar", "/**/s-000[12].tar"])
def test_tar_shards(path, bucket, tmp_path, write_tar, put):
    (data := tmp_path / "data").mkdir()
    _shards(data, write_tar)
    put(data, bucket)
    local = _records(data, path, columns=("label",))
    assert _same(local, _records(bucket, path, columns=("label",)))
    assert open_source(SourceConfig(f"{bucket}{path}")).class_names == {"label": ("a", "b", "c")}


def test_parquet_by_name_column_and_relative_picture(bucket, tmp_path, picture, put):
    (data := tmp_path / "data").mkdir()
    (data / "p").mkdir()
    for i in range(6):
        (data / "p" / f"{i}.png").write_bytes(picture(i))
    inside = [{"bytes": picture(i), "path": None} if i % 2 else {"bytes": None, "path": f"p/{i}.png"} for i in range(6)]
    columns = {"image": inside, "caption": list("abcdef"), "split": ["train", "test"] * 3}
    columns["score"] = [i / 2 for i in range(6)]
    parquet.write_table(pyarrow.table(columns), data / "rows.parquet", row_group_size=2)
    put(data, bucket)
    for split in ("test", "train", ""):
        for path in ("", "/rows.parquet"):
            how = {"split": split, "columns": ("score",)}
            assert _same(_records(data, path, **how), _records(bucket, path, **how))


def test_tables(bucket, tmp_path, picture, put):
    (data := tmp_path / "data").mkdir()
    for i in range(3):
        (data / f"{i}.png").write_bytes(picture(i))
    rows = ["image,caption,n", "0.png,zero,1", "./1.png,one,2", "0.png,none,3"]
    (data / "rows.csv").write_text("\n".join(rows) + "\n")
    put(data, bucket)
    assert _same(_records(data, "/rows.csv", columns=("n",)), _records(bucket, "/rows.csv", columns=("n",)))
    assert len(per_picture(open_source(SourceConfig(f"{bucket}/rows.csv")), "rows")) == 2
    (tmp_path / "here.csv").write_text(f"image,caption\n{bucket}/2.png,two\n")  # a local table of pictures in a bucket
    assert open_source(SourceConfig(str(tmp_path / "here.csv")))[0]["image"] == picture(2)


def test_arrays_row_by_row(bucket, tmp_path, put, monkeypatch):
    (data := tmp_path / "data").mkdir()
    np.save(data / "moments.npy", np.random.default_rng(0).normal(size=(40, 3, 500)).astype(np.float16))
    np.save(data / "label.npy", np.arange(40, dtype=np.int32))
    np.save(data / "caption.npy", np.array([f"text {i}" for i in range(40)]))
    put(data, bucket)
    how = {"image": "", "text": "caption", "columns": ("moments", "label")}
    source = open_source(SourceConfig(str(bucket), **how))
    monkeypatch.setattr(Address, "read_bytes", lambda self: pytest.fail("the whole array was read"))
    assert _same(_records(data, "", **how), [source[i] | {"key": f"{data} row {i}"} for i in range(40)])
    assert source[39]["moments"].dtype == np.float16 and source[39]["moments"].shape == (3, 500)


def test_folders_of_classes_splits_and_captions(bucket, tmp_path, picture, put):
    (data := tmp_path / "data").mkdir()
    for i, name in enumerate(["train/cat/a.png", "train/dog/deep/b.png", "train/dog/.x/c.png", "test/cat/d.png"]):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(picture(i))
    (pairs := tmp_path / "pairs").mkdir()
    (pairs / "1.png").write_bytes(picture(1))
    (pairs / "1.txt").write_text("one\nfirst\n")
    put(data, bucket.child("data"))
    put(pairs, bucket.child("pairs"))
    how = {"split": "train", "columns": ("label",)}
    found = _records(bucket.child("data"), "", **how)
    assert _same(_records(data, "", **how), found) and [r["text"] for r in found] == ["cat", "dog"]
    assert _records(bucket.child("pairs"), "")[0]["text"] == ["one", "first"]
    with pytest.raises(InputError, match=r"data has the splits test, train: say which one with split"):
        open_source(SourceConfig(str(bucket.child("data"))))


def test_the_empty_objects_that_tools_make_for_folders_are_no_files(bucket, picture):
    if bucket.scheme == "memory":
        pytest.skip("memory has no such objects")
    for name, data in {"": b"", "cat/": b"", "cat/a.png": picture(1), "dog/": b"", "dog/b.png": picture(2)}.items():
        with bucket._failures():
            bucket._fs.pipe_file(f"{bucket._path}/{name}", data)
    assert sorted(bucket.files()) == ["cat/a.png", "dog/b.png"]
    assert [r["text"] for r in _records(bucket, "", columns=("label",))] == ["cat", "dog"]


def test_a_resumed_stream_continues_bit_for_bit(bucket, tmp_path, write_tar, put):
    (data := tmp_path / "data").mkdir()
    _shards(data, write_tar)
    put(data, bucket)

    def example(record, rng):
        return {"x": np.int32(record["label"] + 3 * rng.integers(9)), "n": np.int32(len(record["image"]))}

    def stream(root):
        source = open_source(SourceConfig(str(root), columns=("label",)))
        return training_batches(source, PipelineConfig(batch=4, seed=5), example)

    def take(batches, count):
        return [{k: v.tolist() for k, v in next(batches).items()} for _ in range(count)]

    whole, first = take(stream(data), 6), stream(bucket)
    assert take(first, 2) == whole[:2]
    resumed = stream(bucket)
    resumed.restore(first.state())
    assert take(resumed, 4) == whole[2:]


def test_the_index_is_kept_here_and_next_to_the_shard(bucket, tmp_path, write_tar, put, monkeypatch, cache):
    (data := tmp_path / "data").mkdir()
    write_tar(data / "a.tar", 0, 3)
    put(data, bucket)
    shard = bucket.child("a.tar")
    first = tar_index.index_shard(shard)
    assert first.file.is_relative_to(cache / "tar_index")
    assert sorted(bucket.files()) == ["a.tar", first.file.name]
    monkeypatch.setattr(tar_index, "_table", lambda *_: pytest.fail("the shard was read again"))
    assert tar_index.index_shard(shard) == first
    copied = first.file.read_bytes()
    first.file.unlink()  # another host
    assert tar_index.index_shard(shard).file.read_bytes() == copied


def test_many_shards_are_opened_with_one_listing(bucket, tmp_path, write_tar, put, monkeypatch, cache):
    (data := tmp_path / "data").mkdir()
    for n in range(4):
        write_tar(data / f"s-{n}.tar", 10 * n, 3)
    put(data, bucket)
    path = f"{bucket}/s-{{0..3}}.tar"
    assert len(open_source(SourceConfig(path))) == 12 and "heirloom.index" in bucket.files()
    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "MANY", 1)
        patch.setattr(Address, "version", lambda self: pytest.fail("a request for one shard"))
        patch.setattr(tar_index, "_table", lambda *_: pytest.fail("a shard was read again"))
        assert len(open_source(SourceConfig(path))) == 12
        for file in cache.rglob(catalogue.FILE):  # another host
            file.unlink()
        assert len(open_source(SourceConfig(path))) == 12
    bucket.child("s-2.tar").write_bytes(write_tar(data / "s-2.tar", 50, 5).read_bytes())
    source = open_source(SourceConfig(path))
    assert len(source) == 14 and source[10]["text"] == "caption 54"
    assert len([name for name in bucket.files() if name.startswith("s-2.tar.index-")]) == 1


def test_a_bucket_that_can_only_be_read_is_enough(memory, tmp_path, write_tar, put, monkeypatch):
    write_tar(tmp_path / "a.tar", 0, 3)
    memory.child("a.tar").write_bytes((tmp_path / "a.tar").read_bytes())

    def refuses(self, data):
        raise PermissionError(13, "denied")

    monkeypatch.setattr(Address, "write_bytes", refuses)
    assert len(open_source(SourceConfig(f"{memory}/a.tar"))) == 3 and list(memory.files()) == ["a.tar"]


def test_a_missing_shard_is_named(bucket, tmp_path, write_tar, put):
    (data := tmp_path / "data").mkdir()
    write_tar(data / "s-0.tar", 0, 3)
    put(data, bucket)
    with pytest.raises(InputError, match=rf"^{bucket}/s-1\.tar does not exist; did you mean 's-0\.tar'\?$"):
        open_source(SourceConfig(f"{bucket}/s-{{0..2}}.tar"))


def test_a_failure_that_heals_is_tried_again(memory, tmp_path, write_tar, monkeypatch):
    memory.child("a.tar").write_bytes(write_tar(tmp_path / "a.tar", 0, 3).read_bytes())
    source, whole = open_source(SourceConfig(f"{memory}/a.tar")), Address.read_range
    answers = iter(["500", "truncated"])

    def flaky(self, start, size):
        answer = next(answers, "")
        if answer == "500":
            raise OSError(5, "500 Internal Server Error")
        return whole(self, start, size)

    cut = iter([3])
    monkeypatch.setattr(Address, "read_range", flaky)
    memory_fs = type(memory._fs)
    real = memory_fs.cat_file
    monkeypatch.setattr(memory_fs, "cat_file", lambda fs, path, **how: real(fs, path, **how)[: next(cut, None)])
    assert source[1]["text"] == "caption 1"


def test_a_body_that_stays_cut_is_an_error_with_its_length(memory, tmp_path, write_tar, monkeypatch):
    memory.child("a.tar").write_bytes(write_tar(tmp_path / "a.tar", 0, 3).read_bytes())
    source = open_source(SourceConfig(f"{memory}/a.tar"))
    memory_fs = type(memory._fs)
    real = memory_fs.cat_file
    monkeypatch.setattr(memory_fs, "cat_file", lambda fs, path, **how: real(fs, path, **how)[:3])
    with pytest.raises(InputError, match=r"a\.tar is not readable: 3 of \d+ bytes came; it is cut, or being written"):
        source[1]


def test_a_shard_that_is_replaced_during_a_run_is_refused(bucket, tmp_path, write_tar, put, monkeypatch):
    (data := tmp_path / "data").mkdir()
    write_tar(data / "a.tar", 0, 3)
    put(data, bucket)
    monkeypatch.setattr(reading, "RECHECK", 0.0)
    source = open_source(SourceConfig(f"{bucket}/a.tar"))
    assert source[0]["text"] == "caption 0"
    write_tar(data / "a.tar", 5, 3)
    put(data, bucket)
    with pytest.raises(InputError, match=r"a\.tar is not readable: it has changed since it was indexed"):
        source[0]
    assert open_source(SourceConfig(f"{bucket}/a.tar"))[0]["text"] == "caption 5"


def test_a_shard_that_is_cut_is_refused(memory, tmp_path, write_tar):
    whole = write_tar(tmp_path / "a.tar", 0, 3).read_bytes()
    memory.child("a.tar").write_bytes(whole[:2000])
    with pytest.raises(InputError, match=rf"^{memory}/a\.tar is (truncated|not readable as an uncompressed tar)"):
        open_source(SourceConfig(f"{memory}/a.tar"))


def test_file_addresses_are_local_paths(tmp_path, write_tar):
    write_tar(tmp_path / "s-0.tar", 0, 3)
    path = "/s-{0..0}.tar"
    assert _same(_records(tmp_path, path), _records(f"file://{tmp_path}", path) and _records(tmp_path, path))
    assert open_source(SourceConfig(f"file://{tmp_path}/s-0.tar"))[0]["key"] == f"{tmp_path}/s-0.tar:000000"
    assert place(f"file://{tmp_path}") == tmp_path
