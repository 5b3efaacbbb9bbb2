"""Labels in whatever form they come: in range, by name, in an order that is said."""

import io
import json
import pickle
import tarfile

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from heirloom.common.data.class_names import match
from heirloom.common.data.labelled import open_labelled, read_labels, write_labels
from heirloom.common.data.sources import SourceConfig
from heirloom.common.errors import InputError


@pytest.fixture
def labelled(tmp_path, picture):
    """`labelled(labels, ...)`: open a parquet of as many pictures as labels."""

    def write(labels, *args, column="label", **named):
        parquet.write_table(
            pyarrow.table({"image": [picture(0)] * len(labels), column: labels}), tmp_path / "a.parquet"
        )
        return open_labelled(SourceConfig(str(tmp_path / "a.parquet")), column, *args, **named)

    return write


@pytest.fixture
def folders(tmp_path, picture):
    """`folders(*names)`: a folder with a class of one picture for each."""

    def write(*names):
        for name in names:
            (tmp_path / "d" / name).mkdir(parents=True)
            (tmp_path / "d" / name / "0.png").write_bytes(picture(0))
        return SourceConfig(str(tmp_path / "d"))

    return write


def labels(source):
    return [int(source[i]["label"]) for i in range(len(source))]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0, 3], r"row 1: its label is 3, the classes are 0 to 2; number the labels from 0"),
        ([0, -1], r"row 1: its label is -1, the classes are 0 to 2"),
        ([0, 2**40], r"row 1: 'label' is 1099511627776, which does not fit 32 bits"),
        ([0.0, 1.0], r"row 0: its label is '0\.0'; labels must be all whole numbers from 0, or all names"),
        ([[0], [1]], r"row 0: its label is '\[0\]'; labels must be all whole numbers"),
        (["0", "3"], r"row 1: its label is 3, the classes are 0 to 2"),
    ],
)
def test_a_label_that_is_no_class_is_refused(labelled, given, message):
    with pytest.raises(InputError, match=message):
        labels(labelled(given, 3))


def test_numbers_are_taken_from_any_column_and_as_text(labelled):
    assert labels(labelled([2, 0], 3, column="fine")) == [2, 0]
    assert labels(labelled(["10", "9", "2"], 11)) == [10, 9, 2]  # not in alphabetical order
    assert labels(labelled([5, 7])) == [5, 7]
    with pytest.raises(InputError, match="the classes start at 0"):
        labels(labelled([-1]))


def test_names_of_a_column_are_in_alphabetical_order_or_the_models(labelled):
    source = pickle.loads(pickle.dumps(labelled(["dog", "cat", "dog"], 2)))
    assert source.classes == ("cat", "dog") and labels(source) == [1, 0, 1]
    source = labelled(["dog", "cat", "dog"], 2, names=("dog", "cat"))
    assert source.classes == ("dog", "cat") and labels(source) == [0, 1, 0]
    with pytest.raises(
        InputError, match=r"its class 'dgo' does not match exactly one of the 2 known \(dog, cat\); did you mean 'dog'"
    ):
        labelled(["dgo", "cat", "dog"], 2, names=("dog", "cat"))
    for blank in ("", " ", None):
        with pytest.raises(InputError, match=r"row 1: .*label"):
            labelled(["cat", blank], 2)


def test_folders_are_matched_to_the_models_names(folders, remarks):
    data = folders("apple", "moon", "zebra")
    assert labels(open_labelled(data, "label", 3, ("zebra", "apple", "moon"))) == [1, 2, 0]
    # of a model with more classes
    assert labels(open_labelled(data, "label", 4, ("zebra", None, "apple", "moon"))) == [2, 3, 0]
    for generic in (None, ("LABEL_0", "LABEL_1", "LABEL_2"), ("class 0", "class 1", "class 2"), (None, None, None)):
        assert labels(open_labelled(data, "label", 3, generic)) == [0, 1, 2]
    assert remarks() == []


def test_an_order_that_is_assumed_is_said(folders, remarks):
    data = folders("a", "b", "c")
    assert labels(open_labelled(data, "label", 3, ("eins", "zwei", "drei"))) == [0, 1, 2]
    said = "class names do not match ('a' is not one of eins, zwei, drei), but both have 3 classes"
    assert remarks() == [f"{data.path}: {said}, so the data's order is used (a, b, c)"]
    # the names that match agree with the order
    assert labels(open_labelled(data, "label", 3, ("a", "bb", "c"))) == [0, 1, 2]
    with pytest.raises(InputError, match="its class 'c' does not match exactly one of the 3 known"):
        open_labelled(data, "label", 3, ("b", "a", "cc"))


def test_neither_names_nor_numbers_agree(folders):
    data = folders("a", "b", "c")
    with pytest.raises(
        InputError,
        match=r"has 3 classes \(a, b, c\), the model 2: give data with the model's classes, or a model with 3",
    ):
        open_labelled(data, "label", 2)
    with pytest.raises(InputError, match="its class 'a' does not match exactly one of the 2 known"):
        open_labelled(data, "label", 2, ("x", "y"))
    with pytest.raises(InputError, match=r"there are 2 class names \(x, y\) for the 3 classes of the model"):
        open_labelled(data, "label", 3, ("x", "y"))


def test_folders_that_are_numbers_of_named_classes(folders):
    names = ["ant", "bee", "cat", "dog", "eel"]
    assert labels(open_labelled(folders("00000", "00003"), "label", 5, names)) == [0, 3]  # GTSRB's, some of them


def test_folders_from_one_are_no_numbers_of_classes(folders):
    with pytest.raises(InputError, match=r"its classes are called 1, 2, 3, and the model has 3: number them from 0"):
        open_labelled(folders("1", "2", "3"), "label", 3, ["ant", "bee", "cat"])


def test_numbered_folders_whose_order_surprises(folders, remarks):
    assert labels(open_labelled(folders("0", "2", "10"), "label", 3)) == [0, 1, 2]
    assert "numbered in alphabetical order, so '10' is class 1; for timm that is '2', as timm" in remarks()[0]


def test_numbers_of_folders_mean_nothing_without_a_model(folders, remarks):
    """As in zero-shot evaluation, which reads the names."""
    assert labels(open_labelled(folders("0", "2", "10"), "label")) == [0, 1, 2] and remarks() == []


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("Ant", "Cat", "bee"), "'Cat' is class 1; for timm that is 'bee'"),
        (("n1", "n10", "n9"), "'n10' is class 1; for timm that is 'n9'"),
        (("Ant", "bee", "n09", "n10"), ""),
    ],
)
def test_names_that_timm_sorts_otherwise(folders, remarks, names, said):
    assert labels(open_labelled(folders(*names), "label", len(names))) == list(range(len(names)))
    assert [said in text for text in remarks()] == [True] * bool(said)


def test_two_folders_of_one_class(folders):
    with pytest.raises(InputError, match="its classes 'Cat' and 'cat' both match 'cat'"):
        open_labelled(folders("Cat", "cat"), "label", 2, ("cat", "dog"))


def test_match():
    names = ("tench, Tinca tinca", "great white shark, white shark", "Golden-Retriever", "crane", "crane")
    names += ("missile", "projectile, missile", "Café")
    wanted = (
        "tench",
        "Tinca_tinca",
        "white shark",
        "golden retriever",
        "crane",
        "missile",
        "projectile",
        "cafe\u0301",
        "tin",
    )
    assert match(wanted, names) == [0, 0, 1, 2, None, 5, 6, 7, None]
    assert match(("tench, Tinca tinca", "Projectile, missile"), ("tench", "projectile", None)) == [0, 1]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (("001.Black_footed_Albatross", "002.Laysan_Albatross"), ("laysan albatross", "Black-footed albatross")),
        (("n02085620-Chihuahua", "n02085782-Japanese_spaniel"), ("Japanese spaniel", "Chihuahua")),
        (("AnnualCrop", "SeaLake"), ("sea lake", "annual crop")),
    ],
)
def test_folders_whose_words_are_the_names(folders, remarks, given, names):
    assert labels(open_labelled(folders(*given), "label", 2, names)) == [1, 0] and remarks() == []


def test_names_next_to_shards(tmp_path, picture):
    """CLIP_benchmark's folders: classnames.txt above the splits, whole numbers or names in .cls."""
    (tmp_path / "test").mkdir()
    (tmp_path / "classnames.txt").write_text("zebra\nant\n")

    def shard(*values):
        with tarfile.open(tmp_path / "test" / "0.tar", "w") as tar:
            for i, text in enumerate(values):
                for name, data in ((f"s{i}.webp", picture(i, form="WEBP")), (f"s{i}.cls", text.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        return SourceConfig(str(tmp_path), split="test")

    source = open_labelled(shard("1", "0", "1\n"), "label")
    assert source.classes == ("zebra", "ant") and labels(source) == [1, 0, 1]
    assert labels(open_labelled(shard("1", "0"), "label", 3, ("ant", "bee", "zebra"))) == [0, 2]
    assert labels(open_labelled(shard("ant", "zebra"), "label")) == [1, 0]
    with pytest.raises(InputError, match=r"0\.tar:s1: its label is 2, which is not one of the classes \(0, 1\)"):
        labels(open_labelled(shard("1", "2"), "label"))
    with pytest.raises(
        InputError, match=r"0\.tar:s1: its label is 'bee', which is not one of the classes \(zebra, ant\)"
    ):
        labels(open_labelled(shard("ant", "bee"), "label"))


def test_class_names_of_hugging_face_keep_their_order(tmp_path, picture):
    about = {"info": {"features": {"label": {"names": ["zebra", "ant"], "_type": "ClassLabel"}}}}
    rows = pyarrow.table({"image": [picture(0)] * 2, "label": [1, 0]}).replace_schema_metadata(
        {"huggingface": json.dumps(about)}
    )
    parquet.write_table(rows, tmp_path / "a.parquet")
    data = SourceConfig(str(tmp_path / "a.parquet"))
    assert open_labelled(data, "label").classes == ("zebra", "ant") and labels(open_labelled(data, "label", 2)) == [
        1,
        0,
    ]
    assert labels(open_labelled(data, "label", 2, ("ant", "zebra"))) == [0, 1]


def test_arrays_of_labels(tmp_path):
    for name, value in (("image", np.zeros((2, 4, 4, 3), np.uint8)), ("label", np.array([1, 300], np.int64))):
        np.save(tmp_path / f"{name}.npy", value)
    source = open_labelled(SourceConfig(str(tmp_path)), "label", 10)
    assert source[0]["label"] == 1 and source[0]["label"].dtype == np.int32
    with pytest.raises(InputError, match="row 1: its label is 300, the classes are 0 to 9"):
        source[1]


def test_labels_of_a_weights_folder(tmp_path):
    assert read_labels(tmp_path) is None
    write_labels(tmp_path, ("zèbre", "ant"))
    assert read_labels(tmp_path) == ("zèbre", "ant") and json.loads((tmp_path / "labels.json").read_text()) == [
        "zèbre",
        "ant",
    ]
    for names in (["a", ""], [], ["a", 3], {"a": 0}):
        (tmp_path / "labels.json").write_text(json.dumps(names))
        with pytest.raises(InputError, match=r"labels\.json"):
            read_labels(tmp_path)
    (tmp_path / "labels.json").write_bytes(b"[\xff")
    with pytest.raises(InputError, match=r"labels\.json: cannot be read as JSON"):
        read_labels(tmp_path)
    write_labels(tmp_path, ("crane", "ant", "crane"))  # of ImageNet's classes, a bird and a machine
    assert read_labels(tmp_path) == ("crane", "ant", "crane") and match(
        ["crane", "ant"], ("crane", "ant", "crane")
    ) == [None, 1]


def test_numbers_that_name_folders_are_the_numbers_of_named_classes(tmp_path):
    for i in range(11):
        (tmp_path / str(i)).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / str(i) / "a.png")
    names = [f"name {i}" for i in range(11)]
    data = open_labelled(SourceConfig(str(tmp_path), text=""), "label", 11, names)
    assert list(data.numbers.values()) == [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]  # in alphabetical order of the folders
