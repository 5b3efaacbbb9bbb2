"""Foreign tables and parquet: paths for bytes, splits in file names, a row per caption, captions that are none."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from heirloom.common.data.sources import ParquetSource, SourceConfig, captions, open_source, per_picture
from heirloom.common.errors import InputError

STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


@pytest.fixture
def pictures(tmp_path, picture):
    """0.png to 3.png, grey as their number."""
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    return tmp_path


def images(pictures, form):
    if form == "struct":
        return pyarrow.array([{"bytes": None, "path": f"{i}.png"} for i in range(4)], STRUCT)
    if form == "absolute":
        return pyarrow.array([{"bytes": None, "path": str(pictures / f"{i}.png")} for i in range(4)], STRUCT)
    return pyarrow.array([f"{i}.png" for i in range(4)])


@pytest.mark.parametrize("form", ["struct", "absolute", "string"])
def test_pictures_by_path(pictures, grey, form, monkeypatch):
    monkeypatch.chdir("/")
    parquet.write_table(
        pyarrow.table({"image": images(pictures, form), "caption": list("abcd")}), pictures / "a.parquet"
    )
    source = open_source(SourceConfig(str(pictures / "a.parquet")))
    assert [grey(r["image"]) for r in source] == [0, 1, 2, 3] and source[2]["key"] == str(pictures / "2.png")
    (pictures / "2.png").unlink()
    with pytest.raises(InputError, match=r"2\.png is not readable: No such file"):
        source[2]


@pytest.mark.parametrize("cell", [{"bytes": None, "path": None}, {"bytes": b"", "path": ""}])
def test_a_picture_that_is_nowhere(tmp_path, cell):
    parquet.write_table(
        pyarrow.table({"image": pyarrow.array([cell], STRUCT), "caption": ["a"]}), tmp_path / "a.parquet"
    )
    with pytest.raises(
        InputError, match=r"a\.parquet row 0: its picture is .*; a picture must be bytes, a path, or a struct"
    ):
        open_source(SourceConfig(str(tmp_path / "a.parquet")))[0]


@pytest.mark.parametrize("where", ["", "data"])
def test_splits_in_the_names_of_files(tmp_path, picture, where):
    (tmp_path / where).mkdir(exist_ok=True)
    for name, rows in (
        ("train-00000-of-00002", 3),
        ("train-00001-of-00002", 2),
        ("test-00000-of-00001-a09b74b3ef9c3b56", 1),
    ):
        parquet.write_table(
            pyarrow.table({"image": [picture(0)] * rows, "caption": ["a"] * rows}), tmp_path / where / f"{name}.parquet"
        )
    assert [len(open_source(SourceConfig(str(tmp_path), split=split))) for split in ("train", "test")] == [5, 1]
    with pytest.raises(InputError, match="has the splits test, train: say which one with split"):
        open_source(SourceConfig(str(tmp_path)))
    with pytest.raises(InputError, match="no split 'tset'; did you mean 'test'"):
        open_source(SourceConfig(str(tmp_path), split="tset"))
    one = str(next((tmp_path / where).glob("test-*")))
    assert len(open_source(SourceConfig(one))) == len(open_source(SourceConfig(one, split="test"))) == 1
    with pytest.raises(InputError, match="no split 'train'"):
        open_source(SourceConfig(one, split="train"))


def test_files_without_splits_have_none(tmp_path, picture):
    parquet.write_table(pyarrow.table({"image": [picture(0)], "caption": ["a"]}), tmp_path / "0000.parquet")
    assert len(open_source(SourceConfig(str(tmp_path)))) == 1
    with pytest.raises(
        InputError, match="has no splits: no column 'split', and no file named like test-00000-of-00001"
    ):
        open_source(SourceConfig(str(tmp_path), split="test"))


def test_a_table_has_splits_in_a_column(pictures):
    rows = ["0.png,a,train", "1.png,b,test", "2.png,c,train", "3.png,d,test"]
    (pictures / "a.csv").write_text("\n".join(["image,caption,split", *rows]))
    source = open_source(SourceConfig(str(pictures / "a.csv"), image="", split="test"))
    assert [(r["text"], r["key"].rpartition(" ")[2]) for r in source] == [("b", "2"), ("d", "4")]
    with pytest.raises(InputError, match=r"no split 'tset'; did you mean 'test'\? \(it has test, train\)"):
        open_source(SourceConfig(str(pictures / "a.csv"), split="tset"))
    (pictures / "a.csv").write_text("image,caption\n0.png,a\n")
    with pytest.raises(InputError, match="has no column 'split'"):
        open_source(SourceConfig(str(pictures / "a.csv"), split="test"))


def table(pictures, form, picture):
    """Three rows of picture 0 and one of picture 1, in mixed order."""
    paths, texts = ["0.png", "1.png", "./0.png", "0.png"], ["a", "b", "c", "a"]
    if form == "csv":
        (pictures / "a.csv").write_text(
            "image,caption\n" + "".join(f"{p},{t}\n" for p, t in zip(paths, texts, strict=True))
        )
        return pictures / "a.csv"
    cells = [picture(int(p[-5])) for p in paths] if form == "bytes" else paths
    parquet.write_table(pyarrow.table({"image": cells, "caption": texts}), pictures / "a.parquet", row_group_size=3)
    return pictures / "a.parquet"


@pytest.mark.parametrize("form", ["csv", "bytes", "paths"])
def test_rows_of_one_picture_are_one_record(pictures, picture, grey, form, remarks):
    source = open_source(SourceConfig(str(table(pictures, form, picture))))
    merged = per_picture(source, "a table")
    assert len(source) == 4 and len(merged) == 2
    assert [(grey(merged[i]["image"]), merged[i]["text"]) for i in range(2)] == [(0, ["a", "c", "a"]), (1, ["b"])]
    assert "its 4 rows are captions of 2 pictures" in remarks()[0]
    assert per_picture(merged, "a table") is merged


def test_a_row_without_a_picture_is_named(pictures):
    (pictures / "a.csv").write_text("image,caption\n0.png,a\n,b\n")
    with pytest.raises(InputError, match=r"a\.csv row 2: the column 'image' is empty; it needs the path of a picture"):
        open_source(SourceConfig(str(pictures / "a.csv")))[1]
    (pictures / "a.csv").write_text("image,caption\n0.png,a\n1.png,\n")
    with pytest.raises(InputError, match=r"a\.csv row 2: the column 'caption' is empty; it needs a caption"):
        open_source(SourceConfig(str(pictures / "a.csv")))[1]


@pytest.mark.parametrize("text", ["a", "", ["a", ""]])
def test_captions_are_strings_or_lists_of_them(text):
    assert captions(text, "row 1") == text


@pytest.mark.parametrize("text", [None, 1984, 2.5, [], ["a", None], ["a", 3], {"a": 1}, [["a"]]])
def test_anything_else_is_no_caption(text, tmp_path, picture):
    with pytest.raises(InputError, match="row 1: its caption is"):
        captions(text, "row 1")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("1.png", picture(0)), ("1.json", json.dumps({"alt": text}).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(InputError, match=r"a\.tar:1: its caption is"):
        open_source(SourceConfig(str(tmp_path / "a.tar"), text="alt"))[0]


def test_captions_of_other_types_in_parquet_and_arrays(tmp_path, picture):
    parquet.write_table(pyarrow.table({"image": [picture(0)], "caption": [1984]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="row 0: its caption is 1984"):
        open_source(SourceConfig(str(tmp_path / "a.parquet")))[0]
    (tmp_path / "b").mkdir()
    np.save(tmp_path / "b" / "caption.npy", np.arange(3))
    with pytest.raises(InputError, match=r"caption\.npy is int64 \[3\]; captions must be strings"):
        open_source(SourceConfig(str(tmp_path / "b"), image=""))


@pytest.mark.parametrize("data", [b"[1, 2]", b"3", b"null", b'"a"', b"[" * 100_000])
def test_json_that_is_no_object(data, tmp_path, picture):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("1.png", picture(0)), ("1.json", data)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(InputError, match=r"a\.tar:1: its \.json"):
        open_source(SourceConfig(str(tmp_path / "a.tar")))[0]


def test_a_number_that_int32_cannot_hold_is_no_column(tmp_path, picture):
    parquet.write_table(pyarrow.table({"image": [picture(0)], "id": [2**32 + 1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet row 0: 'id' is 4294967297, which does not fit 32 bits"):
        open_source(SourceConfig(str(tmp_path / "a.parquet"), text="", columns=("id",)))[0]


def test_class_names_of_hugging_face(tmp_path, picture):
    about = {
        "info": {"features": {"label": {"names": ["zebra", "ant"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}}
    }
    rows = pyarrow.table({"image": [picture(0)], "label": [1]})
    for i, names in enumerate((["zebra", "ant"], ["ant", "zebra"])):
        about["info"]["features"]["label"]["names"] = names
        parquet.write_table(rows.replace_schema_metadata({"huggingface": json.dumps(about)}), tmp_path / f"{i}.parquet")
    source = open_source(SourceConfig(str(tmp_path / "0.parquet"), text="", columns=("label",)))
    assert isinstance(source, ParquetSource) and source.class_names == {"label": ("zebra", "ant")}
    with pytest.raises(InputError, match=r"1\.parquet and .*0\.parquet have different class names"):
        open_source(SourceConfig(str(tmp_path), text="", columns=("label",)))


@pytest.mark.parametrize("sep", [",", "\t"])
@pytest.mark.parametrize("cells", [{1: '"begins', 3: '"again'}, {1: '"begins'}, {3: '"begins'}])
def test_quotes_that_are_not_closed_swallow_no_rows(pictures, sep, cells):
    rows = [f"{i}.png{sep}{cells.get(i, f'caption {i}')}\n" for i in range(4)]
    (pictures / "a.csv").write_text(f"image{sep}caption\n" + "".join(rows))
    start = len("image,caption\n") + sum(map(len, rows[: min(cells)]))
    with pytest.raises(InputError, match=rf"a\.csv: the row at byte {start} is not readable: .* quotes inside it are"):
        open_source(SourceConfig(str(pictures / "a.csv")))


def test_a_column_that_is_twice_in_a_header(pictures):
    (pictures / "a.csv").write_text("image,caption,id,id,caption\n0.png,a,1,1,b\n")
    with pytest.raises(InputError, match=r"a\.csv has 'caption' twice in its header: rename one"):
        open_source(SourceConfig(str(pictures / "a.csv")))
    (pictures / "a.csv").write_text("image,caption,id,id\n0.png,a,1,1\n")
    assert open_source(SourceConfig(str(pictures / "a.csv")))[0]["text"] == "a"


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("https://example.com/0.jpg", r"its picture is on the web \(https://example\.com/0\.jpg\): download"),
        ("A" * 5000, r"its picture is text \(A{20} \.\.\.\), not a path: store encoded bytes"),
    ],
)
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_cells_that_are_no_paths(cell, message, form, tmp_path):
    if form == "csv":
        (tmp_path / "a.csv").write_text(f"image,caption\n{cell},a\n")
    else:
        parquet.write_table(pyarrow.table({"image": [cell], "caption": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=rf"a\.{form} row [01]: {message}"):
        open_source(SourceConfig(str(tmp_path / f"a.{form}")))[0]


def test_the_tables_of_img2dataset_are_not_the_data(tmp_path, write_tar):
    for i in range(2):
        write_tar(tmp_path / f"{i:05d}.tar", 3 * i, 3)
        urls = pyarrow.table({"url": ["http://a"] * 4, "caption": list("abcd")})
        parquet.write_table(urls, tmp_path / f"{i:05d}.parquet")
        (tmp_path / f"{i:05d}_stats.json").write_text("{}")
    assert [r["text"] for r in open_source(SourceConfig(str(tmp_path)))] == [f"caption {i}" for i in range(6)]


def test_a_table_with_several_splits_is_read_whole_with_a_remark(tmp_path, remarks):
    (tmp_path / "a.csv").write_text("text,split,code\na,train,1_0\nb,test,1_1\n")
    cfg = SourceConfig(str(tmp_path / "a.csv"), image="", text="text", columns=("code",))
    source = open_source(cfg)
    assert [source[i]["code"] for i in range(2)] == ["1_0", "1_1"]  # Python reads both as numbers
    assert "its column 'split' has test, train, and all of it is read; name one with split" in remarks()[0]
    assert len(open_source(replace(cfg, split="test"))) == 1 and remarks() == []
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "split": ["train", "test"]}), tmp_path / "b.parquet")
    cfg = SourceConfig(str(tmp_path / "b.parquet"), image="", text="text")
    assert len(open_source(cfg)) == 2 and "has test, train, and all" in remarks()[0]
