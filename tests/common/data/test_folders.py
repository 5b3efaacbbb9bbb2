"""Folders of pictures as they come: other files, symlinks, hidden folders, captions by line."""

import io
import json
import os
import pickle
import tarfile

import pytest
from PIL import Image

from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.errors import InputError


def write(folder, picture, *names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(i, form="PPM" if name.endswith("m") else "PNG"))


def test_netpbm_pictures_are_read(tmp_path, picture, grey):
    write(tmp_path, picture, "00000/a.ppm", "00000/b.pgm", "00001/c.PNM")
    source = open_source(SourceConfig(str(tmp_path)))
    assert [(grey(r["image"]), int(r["label"])) for r in source] == [(0, 0), (1, 0), (2, 1)]


def test_what_is_left_out_is_counted_and_said_once(tmp_path, picture, remarks):
    write(
        tmp_path,
        picture,
        "a/1.png",
        "a/2.avif",
        "b/3.png",
        "b/deep/4.avif",
        "b/.DS_Store",
        "b/.cache/5.png",
        "README.md",
        ".git/6.png",
    )
    for _ in range(2):
        assert len(open_source(SourceConfig(str(tmp_path), text=""))) == 2
    (said,) = remarks()
    assert said.startswith(f"{tmp_path}: left out 3 hidden, 2 .avif, 1 .md; pictures end in jpg, ")
    (tmp_path / "empty").mkdir()
    open_source(SourceConfig(str(tmp_path), text=""))
    assert "1 of its 3 classes have no picture (empty)" in remarks()[-1]


def test_captions_are_not_left_out(tmp_path, picture, remarks):
    write(tmp_path, picture, "1.png", "2.png")
    for name in ("1.txt", "2.txt"):
        (tmp_path / name).write_text("a caption")
    open_source(SourceConfig(str(tmp_path)))
    assert remarks() == []
    (tmp_path / "3.txt").write_text("of no picture")
    open_source(SourceConfig(str(tmp_path)))
    assert "left out 1 .txt" in remarks()[-1]


def test_a_folder_without_pictures_says_what_is_there(tmp_path, picture):
    write(tmp_path, picture, "a/1.avif", "b/2.avif", "b/3.heic")
    with pytest.raises(
        InputError, match=r"has no picture, only 2 \.avif, 1 \.heic: put pictures \(jpg, .*\) there, or into a sub"
    ):
        open_source(SourceConfig(str(tmp_path)))
    with pytest.raises(InputError, match="its pictures need a sub-folder for each class"):
        write(tmp_path / "flat", picture, "1.png")
        open_source(SourceConfig(str(tmp_path / "flat"), columns=("label",)))


def test_symlinks_are_followed_but_not_in_circles(tmp_path, picture, grey):
    write(tmp_path / "d", picture, "a/1.png", "b/2.png")
    write(tmp_path / "more", picture, "x/3.png", "x/y/4.png", "c/5.png")
    (tmp_path / "d" / "b" / "link").symlink_to(tmp_path / "more" / "x")
    (tmp_path / "d" / "c").symlink_to(tmp_path / "more" / "c")
    (tmp_path / "d" / "b" / "up").symlink_to(tmp_path / "d")
    (tmp_path / "more" / "x" / "y" / "again").symlink_to(tmp_path / "more" / "x")
    (tmp_path / "d" / "a" / "self").symlink_to("self")
    source = pickle.loads(pickle.dumps(open_source(SourceConfig(str(tmp_path / "d")))))
    assert source.classes == ("a", "b", "c")
    assert [(source.classes[r["label"]], grey(r["image"])) for r in source] == [
        ("a", 0),
        ("b", 1),
        ("b", 0),
        ("b", 1),
        ("c", 2),
    ]


def test_a_link_that_leads_nowhere_is_named_and_a_pipe_is_not_read(tmp_path, picture, remarks):
    write(tmp_path, picture, "1.png")
    os.mkfifo(tmp_path / "3.png")
    assert len(open_source(SourceConfig(str(tmp_path)))) == 1
    assert "left out 1 .png" in remarks()[-1]
    (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"2\.png is not readable: No such file"):
        open_source(SourceConfig(str(tmp_path)))[1]


def test_a_caption_a_line(tmp_path, picture):
    write(tmp_path, picture, "1.png", "2.png", "3.png")
    last = "three\u2028 and\x85more"
    for name, text in (("1.txt", f"one\n\n  two \r\n{last}\n"), ("2.txt", "\n only \n"), ("3.txt", "\n")):
        (tmp_path / name).write_text(text)
    assert [r["text"] for r in open_source(SourceConfig(str(tmp_path)))] == [["one", "two", last], "only", ""]


@pytest.mark.parametrize("form", ["shard", "files"])
def test_a_caption_with_line_breaks_is_one_where_the_json_says_so(tmp_path, picture, remarks, form):
    """img2dataset writes the same string into both; its captions are web texts."""
    whole = "Sunset over the bay\n\nTaken with my new camera "
    about = {"0": {"caption": whole}, "1": {"caption": "another"}, "2": [], "3": None}
    members = {f"{name}.png": picture(0) for name in about} | {f"{name}.txt": whole.encode() for name in about}
    members |= {f"{name}.json": json.dumps(fields).encode() for name, fields in about.items() if fields is not None}
    if form == "files":
        for name, data in members.items():
            (tmp_path / name).write_bytes(data)
    else:
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            for name in sorted(members):
                info = tarfile.TarInfo(name)
                info.size = len(members[name])
                tar.addfile(info, io.BytesIO(members[name]))
    source = open_source(SourceConfig(str(tmp_path)))
    remarks()
    assert source[0]["text"] == whole and remarks() == []
    lines = ["Sunset over the bay", "Taken with my new camera"]
    assert [source[i]["text"] for i in (1, 2, 3)] == [lines] * 3
    (said,) = remarks()
    assert said.startswith(f"{tmp_path}: each line of a .txt is one caption of its picture")


def test_captions_in_sub_folders_are_read(tmp_path, picture, remarks):
    """As img2dataset writes files, with a .parquet for each folder."""
    write(tmp_path, picture, "00000/1.png", "00000/2.png", "00001/3.png")
    (tmp_path / "00000.parquet").write_bytes(b"of urls")
    for i, name in enumerate(("00000/1.txt", "00000/2.txt")):
        (tmp_path / name).write_text(f"picture {i}")
    with pytest.raises(InputError, match=r"00001/3\.png has no caption, though others have: 00001/3\.txt is missing"):
        open_source(SourceConfig(str(tmp_path)))
    assert [int(r["label"]) for r in open_source(SourceConfig(str(tmp_path), text=""))] == [0, 0, 1]
    (tmp_path / "00001/3.txt").write_text("picture 2")
    source = open_source(SourceConfig(str(tmp_path)))
    assert [r["text"] for r in source] == ["picture 0", "picture 1", "picture 2"]
    assert not any(".txt" in said for said in remarks())


def test_a_table_beside_one_folder_is_not_passed_over(tmp_path, picture):
    write(tmp_path, picture, "Images/1.png")
    (tmp_path / "__MACOSX").mkdir()
    with pytest.raises(InputError, match=r"one folder of pictures without captions: put a \.txt next to each picture"):
        open_source(SourceConfig(str(tmp_path)))
    (tmp_path / "captions.txt").write_text("image,caption\n1.png,a dog\n")
    with pytest.raises(InputError, match=r"pictures without captions, and captions\.txt, which is not read: put"):
        open_source(SourceConfig(str(tmp_path)))
    assert len(open_source(SourceConfig(str(tmp_path), text=""))) == 1


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (("images/1.png", "images/2.png"), "annotations/captions.json"),  # Flickr30k, say
        (("InternImgs/1.png",), "InternData/data_info.json"),  # PixArt's
        (("00000/1.png", "00001/2.png"), "00000/1.json"),  # img2dataset without .txt
        (("a/1.png", "b/2.png"), "metadata.csv"),
    ],
)
def test_names_of_folders_are_no_captions_next_to_a_table(names, table, tmp_path, picture):
    write(tmp_path, picture, *names)
    (tmp_path / table).parent.mkdir(exist_ok=True)
    (tmp_path / table).write_text("{}")
    with pytest.raises(InputError, match=rf"pictures without captions, and {table}, which is not read: put a \.txt"):
        open_source(SourceConfig(str(tmp_path)))
    assert len(open_source(SourceConfig(str(tmp_path), text=""))) == len(names)


def test_names_of_folders_that_are_captions_are_said(tmp_path, picture, remarks):
    write(tmp_path, picture, "ant/1.png", "bee/2.png")
    (tmp_path / "LICENSE.txt").write_text("free")
    assert [record["text"] for record in open_source(SourceConfig(str(tmp_path)))] == ["ant", "bee"]
    assert f"{tmp_path}: captions are the names of its sub-folders (ant, bee), and LICENSE.txt, which" in remarks()[0]
    open_source(SourceConfig(str(tmp_path), text=""))
    assert not any("captions" in said for said in remarks())


def test_splits_of_coco_are_splits(tmp_path, picture):
    write(tmp_path, picture, "train2014/1.png", "val2014/2.png")
    (tmp_path / "annotations").mkdir()
    with pytest.raises(InputError, match="has the splits train2014, val2014: say which one with split"):
        open_source(SourceConfig(str(tmp_path)))
    assert "text" not in open_source(SourceConfig(str(tmp_path), split="val2014"))[0]


def test_splits_may_be_spelled_with_capitals(tmp_path, picture):
    write(tmp_path, picture, "Training/a/1.png", "Test/a/2.png")
    with pytest.raises(InputError, match="has the splits Test, Training: say which one with split"):
        open_source(SourceConfig(str(tmp_path)))


def test_a_split_is_a_sub_folder_of_any_form(tmp_path, write_tar):
    for split, count in (("train", 5), ("test", 2)):
        (tmp_path / split).mkdir()
        write_tar(tmp_path / split / "0.tar", 0, count)
    assert len(open_source(SourceConfig(str(tmp_path), split="test"))) == 2
    with pytest.raises(InputError, match="has the splits test, train: say which one with split"):
        open_source(SourceConfig(str(tmp_path)))
    with pytest.raises(InputError, match=r"no file named like test-00000-of-00001\.tar; leave split empty"):
        open_source(SourceConfig(str(tmp_path / "train"), split="test"))


def test_splits_next_to_another_folder_are_no_classes(tmp_path):
    for name in ("train", "val", "annotations"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    with pytest.raises(InputError, match="has the splits train, val: say which one with split"):
        open_source(SourceConfig(str(tmp_path)))
