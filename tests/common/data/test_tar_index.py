import io
import os
import tarfile

import numpy as np
import pytest

from heirloom.common.data import tar_index
from heirloom.common.data.tar_index import STEM, index_shard, read_span, remove_old
from heirloom.common.data.tar_members import _by_tarfile, members
from heirloom.common.errors import InputError
from heirloom.common.reading import Stamp


def test_every_member_is_found_where_tarfile_finds_it(tmp_path, write_tar):
    shard = write_tar(tmp_path / "a.tar", 0, 5)
    table = index_shard(shard).table()
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
    table = index_shard(tmp_path / "a.tar").table()
    assert table.dtype.names == (STEM, "seg.png", "txt")
    assert table[STEM].tolist() == [b"deep/" * 12 + b"x" * 60, b"b/1"]
    assert table["seg.png"]["size"].tolist() == [-1, len("b/1.seg.PNG")]
    assert read_span(tmp_path / "a.tar", table[1]["seg.png"]) == b"b/1.seg.PNG"


def test_the_index_is_built_once_and_again_after_a_change(tmp_path, write_tar, monkeypatch):
    shard = write_tar(tmp_path / "a.tar", 0, 5)
    first = index_shard(shard)
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "_table", lambda *_: pytest.fail("the shard was read again"))
        assert index_shard(shard) == first
    write_tar(shard, 0, 6)
    second = index_shard(shard)
    assert second.count == 6
    remove_old({shard: Stamp.of(shard).mark})
    assert sorted(tmp_path.iterdir()) == [shard, second.file]  # the stale one is gone
    os.utime(shard, ns=(0, 0))
    assert index_shard(shard).file != second.file


def test_a_read_only_folder_is_left_alone(tmp_path, write_tar, monkeypatch):
    shard = write_tar(tmp_path / "a.tar", 0, 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tar_index.os, "access", lambda *_: False)
    index = index_shard(shard)
    assert index.file.is_relative_to(tmp_path / "cache" / "heirloom") and index == index_shard(shard)
    assert len(index.table()) == 3


@pytest.mark.parametrize("cut", ["inside a picture", "between members", "inside a header"])
def test_a_truncated_shard_is_named(tmp_path, write_tar, cut):
    shard = write_tar(tmp_path / "a.tar", 0, 5)
    with tarfile.open(shard) as tar:
        last = tar.getmembers()[-3]
    size = {
        "inside a picture": last.offset_data + 20,
        "between members": last.offset,
        "inside a header": last.offset + 100,
    }[cut]
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
    for name, message in (("z.tar", "it is compressed: unpack it"), ("none.tar", "none.tar")):
        with pytest.raises(InputError, match=message):
            index_shard(tmp_path / name)
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("1.txt"))
    with pytest.raises(InputError, match=r"'1\.txt' twice"):
        index_shard(tmp_path / "twice.tar")


def test_a_shard_that_shrinks_later_is_noticed(tmp_path, write_tar):
    shard = write_tar(tmp_path / "a.tar", 0, 2)
    row = index_shard(shard).table()[1]
    os.truncate(shard, int(row["txt"]["offset"]))
    with pytest.raises(InputError, match="shorter"):
        read_span(shard, row["txt"])


def pack(path, *members):
    """A tar of (name or TarInfo, data)."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_names_are_only_names(tmp_path):
    """Nothing is unpacked, so that absolute names and `..` lead nowhere."""
    shard = pack(
        tmp_path / "a.tar", ("/etc/1.txt", b"one"), ("../../2.txt", b"two"), ("..", b""), ("a/../3.txt", b"three")
    )
    table = index_shard(shard).table()
    assert table[STEM].tolist() == [b"/etc/1", b"../../2", b"a/../3"]
    assert [read_span(shard, row["txt"]) for row in table] == [b"one", b"two", b"three"]


def test_names_that_are_not_utf8(tmp_path):
    names = [name.decode(errors="surrogateescape") for name in (b"\xff1.txt", b"2.t\xff")]
    shard = pack(tmp_path / "a.tar", *((name, b"x") for name in names))
    table = index_shard(shard).table()
    assert table[STEM].tolist() == [b"\xff1", b"2"] and table.dtype.names == (STEM, "t\\udcff", "txt")


def test_a_hard_link_has_the_bytes_it_links_to(tmp_path):
    shard = pack(
        tmp_path / "a.tar", ("1.txt", b"one"), (special("2.txt", tarfile.LNKTYPE, "1.txt"), b""), ("3.txt", b"three")
    )
    table = index_shard(shard).table()
    assert [read_span(shard, row["txt"]) for row in table] == [b"one", b"one", b"three"]
    lost = pack(tmp_path / "b.tar", (special("2.txt", tarfile.LNKTYPE, "1.txt"), b""))
    with pytest.raises(
        InputError, match=r"b\.tar: its member '2\.txt' is a hard link to a file that is not in the shard"
    ):
        index_shard(lost)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_members_that_are_no_files_are_refused(tmp_path, kind):
    shard = pack(tmp_path / "a.tar", ("1.txt", b"one"), (special("2.txt", kind, "1.txt"), b""))
    with pytest.raises(InputError, match=r"a\.tar: its member '2\.txt' is a link, a device, a pipe or a sparse file"):
        index_shard(shard)


def test_a_pipe_or_a_folder_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    (tmp_path / "b.tar").mkdir()
    for name in ("a.tar", "b.tar"):
        with pytest.raises(InputError, match=f"{name} is not a file"):
            index_shard(tmp_path / name)


def test_names_with_many_dots_are_refused_before_the_table_grows(tmp_path):
    shard = pack(tmp_path / "a.tar", *((f"v1.{i}.txt", b"x") for i in range(300)))
    with pytest.raises(InputError, match=r"over 256 extensions, such as '256\.txt': a name ends at its first dot"):
        index_shard(shard)


@pytest.mark.parametrize(
    "damage", ["cut in the header", "cut in the table", "empty", "no array", "another array", "a flipped bit"]
)
def test_a_damaged_index_is_built_again(tmp_path, write_tar, damage):
    shard = write_tar(tmp_path / "a.tar", 0, 5)
    index = index_shard(shard)
    whole = index.file.read_bytes()
    if damage == "another array":
        np.save(index.file, np.arange(5))
    else:
        middle = len(whole) - 32 - 2 * index.dtype.itemsize  # an offset that is wrong in silence, were it believed
        damaged = {
            "cut in the header": whole[:40],
            "cut in the table": whole[:-20],
            "empty": b"",
            "no array": b"PK\x03\x04" * 9,
            "a flipped bit": whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :],
        }
        index.file.write_bytes(damaged[damage])
    assert index_shard(shard) == index and index.file.read_bytes() == whole
    assert sorted(tmp_path.iterdir()) == [shard, index.file]


def test_the_index_of_another_shard_is_not_believed(tmp_path, write_tar):
    first, second = write_tar(tmp_path / "a.tar", 0, 5), write_tar(tmp_path / "b.tar", 5, 4)
    file = index_shard(second).file
    own = file.read_bytes()
    file.write_bytes(index_shard(first).file.read_bytes())
    assert index_shard(second).file.read_bytes() == own
    # The same size and time, but other members at other places.
    third = pack(tmp_path / "c.tar", ("1.txt", b"x" * 600), ("2.txt", b"y"))
    fourth = pack(tmp_path / "d.tar", ("1.txt", b"x"), ("2.txt", b"y" * 600))
    for shard in (third, fourth):
        os.utime(shard, ns=(10**18, 10**18))
    index_shard(fourth).file.write_bytes(index_shard(third).file.read_bytes())
    assert [read_span(fourth, row["txt"])[:1] for row in index_shard(fourth).table()] == [b"x", b"y"]


def test_no_place_for_the_index_is_said(tmp_path, write_tar, monkeypatch):
    shard = write_tar(tmp_path / "a.tar", 0, 3)
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def full(file, table):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tar_index.np, "save", full)
        with pytest.raises(
            InputError,
            match=r"cannot be written to .* \(No space left on device\) or .*; set XDG_CACHE_HOME to a folder",
        ):
            index_shard(shard)
    assert sorted(tmp_path.iterdir()) == [shard, tmp_path / "cache"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    write = tar_index._written
    monkeypatch.setattr(tar_index, "_written", lambda f, *a: full(f, a) if f.parent == tmp_path else write(f, *a))
    assert index_shard(shard).file.is_relative_to(tmp_path / "other")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("name", ["1.txt", "d/2.cls", "deep/" * 25 + "3.txt", "ä.txt", "plain"])
def test_headers_are_read_as_tarfile_reads_them(tmp_path, form, name, monkeypatch):
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for i, time in enumerate((0, 7, 7.25)):  # a fraction becomes a pax header
            info = tarfile.TarInfo(f"{i}/{name}")
            info.mtime, info.size = time, 600 * i
            tar.addfile(info, io.BytesIO(bytes(600 * i)))
    expected = _by_tarfile(tmp_path / "a.tar")
    assert len(expected) == (0 if name == "plain" else 3)
    if len(name) < 100 and name != "ä.txt":  # these need no tarfile
        monkeypatch.setattr("heirloom.common.data.tar_members._by_tarfile", lambda _: pytest.fail("tarfile was used"))
    assert members(tmp_path / "a.tar") == expected


def test_every_damaged_header_is_left_to_tarfile(tmp_path, write_tar):
    """What is accepted is read as tarfile reads it; all else raises what tarfile finds."""
    whole = write_tar(tmp_path / "a.tar", 0, 2).read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.integers(0, 512)] ^= 1 << rng.integers(0, 8)
        (tmp_path / "b.tar").write_bytes(damaged)
        outcomes = []
        for read in (members, _by_tarfile):
            try:
                outcomes.append(read(tmp_path / "b.tar"))
            except InputError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
        refused += isinstance(outcomes[0], str)
    assert refused == 60
