"""Data in the forms in which it is published: lists of captions as text, splits in names, paths of Windows."""

import io
import tarfile

import pyarrow
import pytest
from pyarrow import parquet

from heirloom.common.data.sources import SourceConfig, captions, open_source
from heirloom.common.data.sources.resolve import shards_of
from heirloom.common.data.sources.splits import split_of
from heirloom.common.errors import InputError
from heirloom.common.paths import place

BOTH = ["A dog.", "Two dogs."]


def tar(path, members):
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    return str(path)


# Captions


@pytest.mark.parametrize("text", ['["A dog.", "Two dogs."]', str(BOTH), " [ 'A dog.',\n\"Two dogs.\" ] "])
def test_a_list_of_captions_as_text(text, remarks):
    assert captions(text, "row 1") == captions(text, "row 2") == BOTH
    assert set(remarks()) == {
        "captions that are lists written as text, in brackets and quotes, are read as several captions each"
    }


@pytest.mark.parametrize("text", ["", "[Explored]", "a [dog]", "[1, 2]", '"a dog"', "[dog's] ['bone]' x"])
def test_a_caption_with_brackets_is_a_caption(text):
    assert captions(text, "row 1") == text


@pytest.mark.parametrize("text", ["['A dog.' 'Two dogs.']", "['A dog.'\n 'Two']", '["A dog.", 3]', "['A dog.', ...]"])
def test_half_a_list_of_captions_is_refused(text):
    with pytest.raises(InputError, match=r"row 1: the caption looks like a list but cannot be parsed .*: write a list"):
        captions(text, "row 1")
    with pytest.raises(InputError, match="a list of strings that is not empty"):
        captions("[]", "row 1")


def test_every_form_reads_a_list_of_captions_as_text(tmp_path, picture):
    text = str(BOTH)
    (tmp_path / "0.png").write_bytes(picture(0))
    (tmp_path / "a.csv").write_text(f'image,raw\n0.png,"{text}"\n')
    parquet.write_table(pyarrow.table({"image": [picture(0)], "raw": [text]}), tmp_path / "a.parquet")
    tar(tmp_path / "a.tar", {"0.png": picture(0), "0.json": f'{{"raw": "{text}"}}'.encode()})
    for name in ("a.csv", "a.parquet", "a.tar"):
        assert open_source(SourceConfig(str(tmp_path / name), text="raw"))[0]["text"] == BOTH
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "0.png").write_bytes(picture(0))
    (tmp_path / "flat" / "0.txt").write_text(text)
    assert open_source(SourceConfig(str(tmp_path / "flat")))[0]["text"] == BOTH


# Splits


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("cc3m-train-0000.tar", "train"),
        ("test.tar", "test"),
        ("Test_0.parquet", "test"),
        ("imagenet_val2017.3.tar", "val2017"),
        ("00000.tar", None),
        ("latest-0.tar", None),
        ("train-00000-of-00002.parquet", "train"),
        ("x-train-00000-of-00002.parquet", "train"),
        ("train_sft-00000-of-00002-a09b74b3ef9c3b56.parquet", "train_sft"),
        ("web-00000-of-00002.parquet", "web"),
    ],
)
def test_the_split_in_the_name_of_a_file(name, split):
    assert split_of(place(f"/data/{name}")) == split


def test_shards_of_several_splits_are_not_mixed(tmp_path, write_tar, remarks):
    for number, name in enumerate(("cc3m-train-0000", "cc3m-train-0001", "cc3m-validation-0000")):
        write_tar(tmp_path / f"{name}.tar", 2 * number, 2)
    for path in (tmp_path, tmp_path / "*.tar"):
        with pytest.raises(InputError, match="has the splits train, validation: say which one with split"):
            open_source(SourceConfig(str(path)))
        assert len(open_source(SourceConfig(str(path), split="train"))) == 4
        assert [r["text"] for r in open_source(SourceConfig(str(path), split="validation"))] == [
            "caption 4",
            "caption 5",
        ]
        with pytest.raises(InputError, match=r"no split 'val' \(it has train, validation\)"):
            open_source(SourceConfig(str(path), split="val"))
        assert [len(shards_of(SourceConfig(str(path), split=split))) for split in ("", "train")] == [3, 2]
    assert len(open_source(SourceConfig(str(tmp_path / "cc3m-train-*.tar")))) == 4
    assert remarks() == []
    (tmp_path / "cc3m-validation-0000.tar").rename(tmp_path / "more.tar")
    assert len(open_source(SourceConfig(str(tmp_path)))) == 6
    assert "files of the split train are read together with more.tar" in remarks()[-1]


def test_shards_without_a_split_have_none(tmp_path, write_tar):
    shard = str(write_tar(tmp_path / "00000.tar", 0, 2))
    with pytest.raises(InputError, match=r"no file named like train-00000-of-00001\.tar; leave split empty"):
        open_source(SourceConfig(shard, split="train"))


@pytest.mark.parametrize("names", [("imagenet_train_0", "imagenet_test_0"), ("X-Train_0", "X-Test_0")])
def test_parquet_of_several_splits_is_not_mixed(tmp_path, picture, names):
    for name in names:
        cells = {"image": [picture(0)], "caption": [name]}
        parquet.write_table(pyarrow.table(cells), tmp_path / f"{name}.parquet")
    with pytest.raises(InputError, match="has the splits test, train: say which one"):
        open_source(SourceConfig(str(tmp_path)))
    assert [r["text"] for r in open_source(SourceConfig(str(tmp_path), split="train"))] == [names[0]]


@pytest.mark.parametrize("file", ["plain_text/test-00000-of-00001", "data/test/0000", "default/test/0000"])
def test_a_clone_with_its_parquet_in_the_folder_of_a_configuration(tmp_path, picture, file):
    for split in ("train", "test"):
        path = tmp_path / f"{file.replace('test', split)}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.table({"image": [picture(0)], "caption": [split]}), path)
    (tmp_path / "README.md").write_text("")
    assert [r["text"] for r in open_source(SourceConfig(str(tmp_path), split="test"))] == ["test"]
    with pytest.raises(InputError, match="has the splits test, train: say which one with split"):
        open_source(SourceConfig(str(tmp_path)))
    (tmp_path / "other").mkdir()
    path.rename(tmp_path / "other" / "0.parquet")
    with pytest.raises(InputError, match=r"has the configurations .*other.*: give the folder of one, such as /"):
        open_source(SourceConfig(str(tmp_path), split="test"))


# What is refused with a way on


def test_a_dotted_name_in_a_shard(tmp_path, picture):
    shard = tar(tmp_path / "0.tar", {"1.png": picture(0), "1.txt": b"a", "2.v1.png": picture(0), "2.txt": b"b"})
    with pytest.raises(InputError, match=r"ends at its first dot: rename 2\.v1\.png to 2\.png"):
        open_source(SourceConfig(shard))
    shard = tar(tmp_path / "1.tar", {"a.b.c.png": picture(0), "a.b.c.txt": b"a"})
    with pytest.raises(InputError, match=r"rename a\.b\.c\.png to a_b_c\.png"):
        open_source(SourceConfig(shard))


def test_captions_under_another_name(tmp_path, picture):
    shard = tar(tmp_path / "0.tar", {"1.png": picture(0), "1.text": b"a"})
    with pytest.raises(InputError, match=r"no captions .*; rename the members \.text to \.txt"):
        open_source(SourceConfig(shard))
    shard = tar(tmp_path / "1.tar", {"1.png": picture(0), "1.json": b'{"url": "x", "text": "a"}'})
    with pytest.raises(InputError, match=r"name it with --data\.text text \(heirloom eval: --text text\)"):
        open_source(SourceConfig(shard))[0]
    (tmp_path / "a.csv").write_text("file_name,title\n0.png,a\n")
    with pytest.raises(InputError, match=r"no column 'image' .*; name it with --data\.image file_name"):
        open_source(SourceConfig(str(tmp_path / "a.csv")))


def test_a_text_file_with_a_header_is_a_table(tmp_path, picture, grey):
    (tmp_path / "0.png").write_bytes(picture(7))
    (tmp_path / "captions.txt").write_text("image,caption\n0.png,a dog\n")
    (record,) = open_source(SourceConfig(str(tmp_path / "captions.txt")))
    assert (grey(record["image"]), record["text"]) == (7, "a dog")
    (tmp_path / "results.txt").write_text("0.png#0\ta dog\n")
    with pytest.raises(InputError, match=r"\.txt cannot be read; .*a first line that names its columns"):
        open_source(SourceConfig(str(tmp_path / "results.txt")))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("image,caption\n0.png,é\n".encode("utf-16"), "is UTF-16, or no text: save it as UTF-8"),
        ("image,caption\n0.png,é\n".encode("latin-1"), "is not readable as a table: .*; save it as UTF-8"),
        (b"image,caption\r0.png,a\r", "lines end in carriage returns: save it with line ends of Unix"),
    ],
)
def test_tables_in_another_encoding(tmp_path, data, message):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(InputError, match=message):
        open_source(SourceConfig(str(tmp_path / "a.csv")))


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("a.jsonl", r"pandas\.read_json\('.*a\.jsonl', lines=True\)\.to_csv\('/.*/a\.csv', index=False\)"),
        ("a.arrow", r"datasets\.Dataset\.from_file\('.*a\.arrow'\)\.to_parquet\('a\.parquet'\)"),
        ("dataset_dict.json", r"datasets\.load_from_disk\('.*'\)\[SPLIT\]\.to_parquet"),
        ("data-00000-of-00001.arrow", r"datasets\.load_from_disk\('.*'\)\.to_parquet"),
    ],
)
def test_other_forms_are_refused_with_the_line_that_converts_them(tmp_path, name, way):
    (tmp_path / name).write_bytes(b"{}\n")
    path = tmp_path / name if name.startswith("a.") else tmp_path
    with pytest.raises(InputError, match=way):
        open_source(SourceConfig(str(path)))


def test_paths_of_windows(tmp_path, picture, grey, remarks):
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(("sub/0.png", "sub/1.png", "odd\\name.png")):
        (tmp_path / name).write_bytes(picture(i))
    (tmp_path / "a.csv").write_text("image,caption\nsub\\0.png,a\nsub\\1.png,b\nodd\\name.png,c\n")
    assert [grey(r["image"]) for r in open_source(SourceConfig(str(tmp_path / "a.csv")))] == [0, 1, 2]
    assert set(remarks()) == {f"{tmp_path}: its table has paths as Windows writes them; \\ is read as /"}
