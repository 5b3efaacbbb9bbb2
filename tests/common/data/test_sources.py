import io
import os
import pickle
import tarfile

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from heirloom.common.data import sources
from heirloom.common.data.labelled import open_labelled
from heirloom.common.data.pictures import decode
from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.errors import InputError


def both(source):
    """The source, and what a worker process would get of it."""
    return source, pickle.loads(pickle.dumps(source))


# Folders


def test_a_folder_of_classes(tmp_path, picture, grey):
    for value, name in enumerate(
        ["train/dog/a.png", "train/cat/b.PNG", "train/cat/deep/c.jpeg", "test/cat/d.png", "train/cat/notes.md"]
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(value))
    for source in both(open_source(SourceConfig(str(tmp_path), split="train"))):
        assert len(source) == 3 and source.classes == ("cat", "dog")
        assert [(r["text"], int(r["label"]), grey(r["image"])) for r in source] == [
            ("cat", 0, 1),
            ("cat", 0, 2),
            ("dog", 1, 0),
        ]
        assert source[2]["key"].endswith("train/dog/a.png")
    with pytest.raises(InputError, match="say which one with split"):
        open_source(SourceConfig(str(tmp_path)))
    with pytest.raises(InputError, match="no split 'trian'; did you mean 'train'"):
        open_source(SourceConfig(str(tmp_path), split="trian"))


def test_a_flat_folder_with_captions(tmp_path, picture, grey):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
        (tmp_path / f"{i}.txt").write_text(f"caption {i}\n")
    source = open_source(SourceConfig(str(tmp_path)))
    assert [(r["text"], grey(r["image"])) for r in source] == [("caption 0", 0), ("caption 1", 1), ("caption 2", 2)]
    assert set(open_source(SourceConfig(str(tmp_path), text=""))[0]) == {"key", "image"}
    (tmp_path / "1.txt").unlink()
    with pytest.raises(InputError, match=r"1\.png has no caption, though others have"):
        open_source(SourceConfig(str(tmp_path)))


def test_an_empty_folder_and_a_missing_one(tmp_path):
    with pytest.raises(
        InputError, match=r"has no picture, it is empty: put pictures .* there, or into a sub-folder per class"
    ):
        open_source(SourceConfig(str(tmp_path)))
    (tmp_path / "pictures").mkdir()
    with pytest.raises(InputError, match="did you mean 'pictures'"):
        open_source(SourceConfig(str(tmp_path / "picture")))
    with pytest.raises(InputError, match="no data given"):
        open_source(SourceConfig())
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(InputError, match=r"\.zip cannot be read"):
        open_source(SourceConfig(str(tmp_path / "a.zip")))


# Tables


@pytest.mark.parametrize(("name", "tab"), [("a.csv", ","), ("a.tsv", "\t"), ("open_clip.csv", "\t")])
def test_tables(tmp_path, picture, grey, name, tab):
    rows = [["filepath", "title", "score", "size", "note"]]
    rows += [[f"p{i}.png", f'"caption {i},\nsecond line é"', f"{i}.5", f"{i}", "x" if i else "1"] for i in range(4)]
    (tmp_path / name).write_text("\ufeff" + "\n".join(tab.join(row) for row in rows) + "\n\n", encoding="utf-8")
    for i in range(4):
        (tmp_path / f"p{i}.png").write_bytes(picture(i))
    cfg = SourceConfig(str(tmp_path / name), image="filepath", text="title", columns=("score", "size", "note"))
    for source in both(open_source(cfg)):
        assert len(source) == 4
        record = source[2]
        assert (record["text"], grey(record["image"]), record["note"]) == ("caption 2,\nsecond line é", 2, "x")
        assert (record["score"].dtype, float(record["score"]), record["size"].dtype, int(record["size"])) == (
            np.float32,
            2.5,
            np.int32,
            2,
        )
    (tmp_path / "p1.png").unlink()
    with pytest.raises(InputError, match=r"p1\.png is not readable: No such file"):
        source[1]
    with pytest.raises(InputError, match=r"no column 'titel'; did you mean 'title'"):
        open_source(SourceConfig(str(tmp_path / name), image="filepath", text="titel"))


def test_a_crooked_table(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\na.png,one\nb.png,two,three\n")
    with pytest.raises(InputError, match="the row at byte 24 has 3 cells, the header 2"):
        open_source(SourceConfig(str(tmp_path / "a.csv")))
    (tmp_path / "a.csv").write_text("image,caption\n")
    with pytest.raises(InputError, match="has no sample"):
        open_source(SourceConfig(str(tmp_path / "a.csv")))
    for other in ";|":
        (tmp_path / "a.csv").write_text(f"image{other}caption\na.png{other}one\n")
        with pytest.raises(InputError, match=rf"a\.csv: its columns are separated by '\{other}'; save it with"):
            open_source(SourceConfig(str(tmp_path / "a.csv")))


# Tar shards


def test_numbered_shards_are_one_source(tmp_path, write_tar, grey):
    for number, (first, count) in enumerate([(0, 4), (4, 1), (5, 3)]):
        write_tar(tmp_path / f"{number:05d}.tar", first, count)
    for path in ("{00000..00002}.tar", "*.tar", ""):
        for source in both(open_source(SourceConfig(str(tmp_path / path), columns=("score",)))):
            assert [(grey(r["image"]), r["text"], float(r["score"])) for r in source] == [
                (i, f"caption {i}", i / 2) for i in range(8)
            ]
            assert source[4]["key"].endswith("00001.tar:000004")
    assert len(open_source(SourceConfig(str(tmp_path / "{00000..00001}.tar")))) == 5
    for path in ("0000{2,0}.tar", f"0000{{2..2}}.tar::{tmp_path}/00000.tar"):
        source = open_source(SourceConfig(str(tmp_path / path)))
        assert [r["text"] for r in source] == [f"caption {i}" for i in (5, 6, 7, 0, 1, 2, 3)]
    with pytest.raises(InputError, match=r"00003\.tar does not exist"):
        open_source(SourceConfig(str(tmp_path / "{00000..00003}.tar")))


def test_captions_of_a_shard(tmp_path, write_tar):
    shard = str(write_tar(tmp_path / "a.tar", 0, 3))
    assert open_source(SourceConfig(shard, text="recaption"))[1]["text"] == "better 1"
    assert set(open_source(SourceConfig(shard, text="", image="", columns=("score",)))[1]) == {"key", "score"}
    with pytest.raises(InputError, match="000000 has no column 'recaptoin'; did you mean 'recaption'"):
        open_source(SourceConfig(shard, text="recaptoin"))[0]
    only_txt = str(write_tar(tmp_path / "d.tar", 0, 3, ("png", "txt")))
    with pytest.raises(InputError, match="no column 'recaption'"):
        open_source(SourceConfig(only_txt, text="recaption"))[0]
    only_json = str(write_tar(tmp_path / "b.tar", 0, 3, ("png", "json")))
    assert open_source(SourceConfig(only_json))[2]["text"] == "json 2"
    shard = str(write_tar(tmp_path / "c.tar", 0, 6, ("png", "cls")))
    classes = open_source(SourceConfig(shard, text="", columns=("label",)))
    assert [int(r["label"]) for r in classes] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("extensions", "message"),
    [((), "is empty"), (("txt",), r"has no pictures .* only txt"), (("png",), r"has no captions .* only png")],
)
def test_shards_that_lack_something(tmp_path, write_tar, extensions, message):
    write_tar(tmp_path / "0.tar", 0, 2)
    write_tar(tmp_path / "1.tar", 2, 2, extensions)
    with pytest.raises(InputError, match=rf"1\.tar.*{message}"):
        open_source(SourceConfig(str(tmp_path)))


def test_damaged_text_is_named(tmp_path, write_tar, picture):
    shard = write_tar(tmp_path / "0.tar", 0, 2)
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b'{"caption": "json 1"', b'{"caption": "json 1 '))
    with pytest.raises(InputError, match=r"0\.tar:000001: its \.json.* is not readable"):
        open_source(SourceConfig(str(shard), columns=("score",)))[1]
    shard.write_bytes(data.replace(b"caption 1", b"\xff" * 9))
    with pytest.raises(InputError, match=r"0\.tar:000001: its .*utf-8"):
        open_source(SourceConfig(str(shard)))[1]
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(picture(0))
    (tmp_path / "flat" / "a.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8"):
        open_source(SourceConfig(str(tmp_path / "flat")))[0]


@pytest.mark.parametrize(("text", "label"), [("\ufeff10\r\n", 10), ("-1", -1), ("1_0", "1_0"), ("cat", "cat")])
def test_a_class_is_a_whole_number_or_a_name(tmp_path, picture, text, label):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in (("0.png", picture(0)), ("0.cls", text.encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert open_source(SourceConfig(str(tmp_path / "0.tar"), text="", columns=("label",)))[0]["label"] == label


def test_one_of_several_pictures_of_a_sample(tmp_path, picture, grey, remarks):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in (("0.jpg", picture(10, form="JPEG")), ("0.png", picture(200)), ("0.txt", b"a cat")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    shard = str(tmp_path / "0.tar")
    assert grey(open_source(SourceConfig(shard))[0]["image"]) == 10
    assert "samples have jpg and png; jpg is read, unless image names another" in remarks()[-1]
    assert grey(open_source(SourceConfig(shard, image="png"))[0]["image"]) == 200
    with pytest.raises(InputError, match=r"has no picture 'webp' \(it has jpg, png\)"):
        open_source(SourceConfig(shard, image="webp"))[0]
    assert "label" not in open_source(SourceConfig(shard))[0]


def test_rows_of_different_lengths_are_named(tmp_path, picture):
    rows = [{"image": picture(0), "caption": "a cat", "boxes": [[1.0, 2.0], [3.0]]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"row 0: 'boxes' is .*: rows of different lengths make no array"):
        open_source(SourceConfig(str(tmp_path / "a.parquet"), columns=("boxes",)))[0]


def test_a_sample_without_a_picture(tmp_path, write_tar):
    shard = write_tar(tmp_path / "0.tar", 0, 2)
    with tarfile.open(shard, "a") as tar:
        tar.addfile(tarfile.TarInfo("000002.txt"))
    with pytest.raises(InputError, match="1 of 3 samples have no picture, the first is 000002; pack"):
        open_source(SourceConfig(str(shard)))


# Parquet


def table(first, count, picture, struct=False):
    images = [picture(i) for i in range(first, first + count)]
    return pyarrow.table(
        {
            "image": [{"bytes": b, "path": None} for b in images] if struct else images,
            "caption": [f"caption {i}" for i in range(first, first + count)],
            "tags": [[] if i % 2 else ["x", f"t{i}"] for i in range(first, first + count)],
            "concept": [f"c{i // 2}" for i in range(first, first + count)],
            "embedding": [[i / 2, 1.0] for i in range(first, first + count)],
            "split": ["test" if i % 3 == 0 else "train" for i in range(first, first + count)],
        }
    )


@pytest.mark.parametrize("struct", [False, True])
def test_parquet(tmp_path, picture, grey, struct):
    parquet.write_table(table(0, 5, picture, struct), tmp_path / "0.parquet", row_group_size=2)
    parquet.write_table(table(5, 4, picture, struct), tmp_path / "1.parquet", row_group_size=3)
    cfg = SourceConfig(str(tmp_path), columns=("tags", "concept", "embedding"))
    for source in both(open_source(cfg)):
        assert [(grey(r["image"]), r["text"], r["concept"]) for r in source] == [
            (i, f"caption {i}", f"c{i // 2}") for i in range(9)
        ]
        assert [source[6]["tags"], source[7]["tags"]] == [["x", "t6"], []]
        assert source[7]["embedding"].dtype == np.float32 and source[7]["embedding"].tolist() == [3.5, 1.0]
        assert source[7]["key"].endswith("1.parquet row 2")
    for source in both(open_source(SourceConfig(str(tmp_path / "*.parquet"), split="test"))):
        assert [grey(r["image"]) for r in source] == [0, 3, 6]


def test_parquet_keeps_only_the_row_groups_it_may(tmp_path, picture, monkeypatch):
    parquet.write_table(table(0, 8, picture), tmp_path / "0.parquet", row_group_size=2)
    source = open_source(SourceConfig(str(tmp_path / "0.parquet")))
    reads = []
    read = parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        parquet.ParquetFile, "read_row_group", lambda self, n, **kw: reads.append(n) or read(self, n, **kw)
    )
    for _ in range(2):
        assert [r["text"] for r in source] == [f"caption {i}" for i in range(8)]
    assert reads == [0, 1, 2, 3]
    reads.clear()
    monkeypatch.setattr(sources.parquet, "ROW_GROUP_MEMORY", 1)
    source = open_source(SourceConfig(str(tmp_path / "0.parquet")))
    assert [source[i]["text"] for i in (1, 0, 7, 6, 0)] == [
        "caption 1",
        "caption 0",
        "caption 7",
        "caption 6",
        "caption 0",
    ]
    assert reads == [0, 3, 0]


def test_parquet_that_lacks_something(tmp_path, picture):
    parquet.write_table(table(0, 2, picture), tmp_path / "0.parquet")
    with pytest.raises(InputError, match="no column 'captions'; did you mean 'caption'"):
        open_source(SourceConfig(str(tmp_path), text="captions"))
    with pytest.raises(InputError, match=r"no split 'tset'; did you mean 'test'\? \(it has test, train\)"):
        open_source(SourceConfig(str(tmp_path), split="tset"))
    parquet.write_table(table(0, 2, picture).slice(0, 0), tmp_path / "1.parquet")
    with pytest.raises(InputError, match=r"1\.parquet is empty"):
        open_source(SourceConfig(str(tmp_path)))
    os.truncate(tmp_path / "1.parquet", 100)
    with pytest.raises(InputError, match=r"1\.parquet is not readable as parquet"):
        open_source(SourceConfig(str(tmp_path)))
    parquet.write_table(pyarrow.table({"image": [b"", b""], "caption": ["a", None]}), tmp_path / "1.parquet")
    with pytest.raises(InputError, match=r"1\.parquet row 1: the column 'caption' is empty"):
        open_source(SourceConfig(str(tmp_path)))[3]


def test_the_emoji_of_this_package():
    everything = open_source(SourceConfig("emoji"))
    noto = {split: open_source(SourceConfig("emoji:noto", split=split)) for split in ("train", "test")}
    assert len(everything) == 3 * sum(map(len, noto.values()))
    record = noto["test"][0]
    assert set(record) == {"key", "image", "text", "concept", "tags"} and record["image"][8:12] == b"WEBP"
    assert not {r["concept"] for r in noto["train"]} & {r["concept"] for r in noto["test"]}
    with pytest.raises(InputError, match="did you mean 'noto'"):
        open_source(SourceConfig("emoji:nota"))


def test_the_digits_of_this_package():
    train, test = (open_labelled(SourceConfig("digits", split=split), "label", 10) for split in ("train", "test"))
    assert (len(train), len(test)) == (1500, 297)
    ink = 255 - np.asarray(decode(train[0]["image"]), np.float32)  # a nought
    assert ink.shape == (8, 8, 3) and train[0]["label"] == 0
    assert ink[3:5, 3:5].mean() < ink[3:5, [2, 5]].mean()
    with pytest.raises(InputError, match="has no column 'caption'"):
        open_source(SourceConfig("digits"))


# TensorFlow Datasets


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    import io

    tfds = pytest.importorskip("tensorflow_datasets")
    from PIL import Image

    def png(value):
        out = io.BytesIO()
        Image.new("RGB", (4, 4), (value, value, value)).save(out, "PNG")
        out.seek(0)
        return out

    class HeirloomToy(tfds.core.GeneratorBasedBuilder):
        __module__ = "toy"  # else TFDS looks for its code with importlib_resources, which it does not require
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
                "captions": tfds.features.Sequence(tfds.features.Text()),
                "score": tfds.features.Scalar(np.float32),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples(6), "test": self._generate_examples(2)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"image": png(i), "label": i % 2, "captions": [f"one {i}", f"two {i}"], "score": i / 2}

    folder = tmp_path_factory.mktemp("tfds")
    HeirloomToy(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds_reads_what_tfds_prepared(prepared, grey):
    cfg = SourceConfig(f"tfds:heirloom_toy:1.0.0@{prepared}", split="train", text="captions", columns=("score",))
    for source in both(open_source(cfg)):
        records = sorted(
            (grey(r["image"]), r["text"], int(r["label"]), float(r["score"])) for r in map(source.__getitem__, range(6))
        )
        assert records == [(i, [f"one {i}", f"two {i}"], i % 2, i / 2) for i in range(6)]
    named = open_source(SourceConfig(f"tfds:heirloom_toy@{prepared}", split="test", text="label"))
    assert named.classes == ("cat", "dog") and sorted(named[i]["text"] for i in range(2)) == ["cat", "dog"]
    assert len(open_source(SourceConfig(f"tfds:heirloom_toy@{prepared}", split="train[:50%]", text=""))) == 3


def test_tfds_that_is_not_there(prepared):
    with pytest.raises(InputError, match=r"no split 'tets'; did you mean 'test'"):
        open_source(SourceConfig(f"tfds:heirloom_toy@{prepared}", split="tets"))
    with pytest.raises(InputError, match="no column 'caption'; did you mean 'captions'"):
        open_source(SourceConfig(f"tfds:heirloom_toy@{prepared}", split="test"))
    with pytest.raises(InputError, match=r"tfds:mnist is not prepared.*tfds build mnist --file_format=array_record"):
        open_source(SourceConfig(f"tfds:mnist@{prepared}", split="test", text="label"))
    with pytest.raises(InputError, match="tfds:nosuchset"):
        open_source(SourceConfig(f"tfds:nosuchset@{prepared}", split="test"))
