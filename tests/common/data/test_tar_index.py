import io
import os
import tarfile

import numpy as np
import pytest

from common.data import tar_index
from common.data.tar_index import STEM, index_shard, read_span
from common.errors import InputError


def test_every_member_is_found_where_tarfile_finds_it(tmp_path, write_tar):
    shard = write_tar(tmp_path / "a.tar", 0, 5)
    table = np.load(index_shard(shard))
    assert table[STEM].tolist() == [b"000000", b"000001", b"000002", b"000003", b"000004"]
    with tarfile.open(shard) as tar:
        for i, row in enumerate(table):
            for extension in ("png", "txt", "json"):
                assert read_span(shard, row[extension]) == tar.extractfile(f"{i:06d}.{extension}").read()


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_folders_long_names_and_further_dots(tmp_path, form):
    names = ["deep/" * 12 + "x" * 60 + ".txt", "b/1.seg.PNG", "b/1.txt", "b/.hidden"]
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        tar.addfile(tarfile.TarInfo("b/"))
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    table = np.load(index_shard(tmp_path / "a.tar"))
    assert table.dtype.names == (STEM, "seg.png", "txt")
    assert table[STEM].tolist() == [b"deep/" * 12 + b"x" * 60, b"b/1"]
    assert table["seg.png"]["size"].tolist() == [-1, len("b/1.seg.PNG")]
    assert read_span(tmp_path / "a.tar", table[1]["seg.png"]) == b"b/1.seg.PNG"


def test_the_index_is_built_once_and_again_after_a_change(tmp_path, write_tar, monkeypatch):
    shard = write_tar(tmp_path / "a.tar", 0, 5)
    first = index_shard(shard)
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "_table", lambda shard: pytest.fail("the shard was read again"))
        assert index_shard(shard) == first
    write_tar(shard, 0, 6)
    second = index_shard(shard)
    assert len(np.load(second)) == 6
    assert sorted(tmp_path.iterdir()) == [shard, second]  # the stale one is gone
    os.utime(shard, ns=(0, 0))
    assert index_shard(shard) != second


def test_a_read_only_folder_is_left_alone(tmp_path, write_tar, monkeypatch):
    shard = write_tar(tmp_path / "a.tar", 0, 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tar_index.os, "access", lambda *_: False)
    index = index_shard(shard)
    assert index.is_relative_to(tmp_path / "cache" / "heirloom") and index == index_shard(shard)
    assert len(np.load(index)) == 3


@pytest.mark.parametrize("cut", ["inside a picture", "between members", "inside a header"])
def test_a_truncated_shard_is_named(tmp_path, write_tar, cut):
    shard = write_tar(tmp_path / "a.tar", 0, 5)
    with tarfile.open(shard) as tar:
        last = tar.getmembers()[-3]
    size = {"inside a picture": last.offset_data + 20, "between members": last.offset, "inside a header": last.offset + 100}[cut]
    os.truncate(shard, size)
    with pytest.raises(InputError, match=r"a\.tar"):
        index_shard(shard)
    assert list(tmp_path.iterdir()) == [shard]  # no index of a broken shard


def test_damaged_compressed_missing_and_doubled(tmp_path, write_tar):
    shard = write_tar(tmp_path / "a.tar", 0, 5)
    with tarfile.open(shard) as tar:
        middle = tar.getmembers()[6].offset
    with open(shard, "r+b") as data:
        data.seek(middle)
        data.write(b"\xff" * 300)
    with pytest.raises(InputError, match=f"damaged at byte {middle}"):
        index_shard(shard)
    with tarfile.open(tmp_path / "z.tar", "w:gz"):
        pass
    for name in ("z.tar", "none.tar"):
        with pytest.raises(InputError, match=name):
            index_shard(tmp_path / name)
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("1.txt"))
    with pytest.raises(InputError, match=r"'1\.txt' twice"):
        index_shard(tmp_path / "twice.tar")


def test_a_shard_that_shrinks_later_is_noticed(tmp_path, write_tar):
    shard = write_tar(tmp_path / "a.tar", 0, 2)
    row = np.load(index_shard(shard))[1]
    os.truncate(shard, int(row["txt"]["offset"]))
    with pytest.raises(InputError, match="shorter"):
        read_span(shard, row["txt"])
