"""Folders of .npy arrays: rows as they are stored, and what is wrong with a folder."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from heirloom.common import reading
from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.errors import InputError


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "latent.npy", np.arange(24, dtype=np.float16).reshape(4, 2, 3))
    np.save(tmp_path / "label.npy", np.array([3, 1, 2, 0]))
    np.save(tmp_path / "caption.npy", np.array(["a", "bc", "", "d"]))
    np.save(tmp_path / "short.npy", np.zeros(3))
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    return tmp_path


def test_rows_keep_shape_and_dtype_and_survive_pickling(folder):
    source = pickle.loads(pickle.dumps(open_source(SourceConfig(str(folder), image="", columns=("latent", "label")))))
    assert len(source) == 4
    record = source[2]
    assert record["label"] == 2 and record["text"] == "" and record["key"] == f"{folder} row 2"
    np.testing.assert_array_equal(record["latent"], [[12, 13, 14], [15, 16, 17]])
    assert record["latent"].dtype == np.float16
    assert len(pickle.dumps(source)) < 1000  # places, not data


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(columns=("latents",)), "has no column 'latents'; did you mean 'latent'"),
        (dict(columns=("latent", "short")), r"different lengths \(latent 4, short 3\)"),
        (dict(columns=("objects",)), r"objects\.npy is not readable as an array"),
        (dict(), "no array is selected"),
        (dict(columns=("label",), split="train"), "leave split empty"),
    ],
)
def test_what_is_wrong_is_named(fields, message, folder):
    with pytest.raises(InputError, match=message):
        open_source(SourceConfig(str(folder), image="", text="", **fields))


def damaged(file, array):
    """An array whose header does not end: numpy raises tokenize.TokenError."""
    np.save(file, array)
    file.write_bytes(file.read_bytes().replace(b"}", b"(", 1))


def test_a_damaged_header_is_named(folder):
    damaged(folder / "latent.npy", np.zeros((4, 2), np.float32))
    with pytest.raises(InputError, match=r"latent\.npy is not readable as an array: its header is damaged"):
        open_source(SourceConfig(str(folder), image="", text="", columns=("latent",)))


def test_one_array_a_picture_is_named_as_such(tmp_path):
    for i in range(50):
        np.save(tmp_path / f"{i}.npy", np.zeros((1, 4, 2, 2), np.float32))
    with pytest.raises(InputError, match="has 50 numbered arrays, one for each picture, as fast-DiT stores latents"):
        open_source(SourceConfig(str(tmp_path), text=""))
    for i in range(50):
        (tmp_path / f"{i}.npy").rename(tmp_path / f"column{i}.npy")
    with pytest.raises(InputError, match=r"has no column 'image' \(it has column0, .*, ... \(50 in all\)\)") as error:
        open_source(SourceConfig(str(tmp_path), text=""))
    assert len(str(error.value)) < 1000


def test_headers_are_parsed_once_and_one_at_a_time(tmp_path, monkeypatch):
    """numpy parses them as Python, which two threads of Python 3.11 must not do at once."""
    np.save(tmp_path / "image.npy", np.arange(24, dtype=np.uint8).reshape(8, 3))
    np.save(tmp_path / "column.npy", np.asfortranarray(np.arange(24.0).reshape(8, 3)))
    parsed, parse = [], np.lib.format.open_memmap

    def watched(file, **options):
        parsed.append((file.name, reading.PARSING.locked()))
        return parse(file, **options)

    monkeypatch.setattr(np.lib.format, "open_memmap", watched)
    source = open_source(SourceConfig(str(tmp_path), text="", columns=("column",)))
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(source.__getitem__, [*range(8)] * 20))
    assert sorted(parsed) == [("column.npy", True), ("image.npy", True)]
    for i, row in enumerate(rows):
        assert row["image"].tolist() == [3 * (i % 8) + n for n in range(3)]
        assert row["column"].tolist() == [3.0 * (i % 8) + n for n in range(3)]


def test_rows_of_bfloat16_are_numbers_and_records_are_refused(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    np.save(tmp_path / "moments.npy", values.astype(ml_dtypes.bfloat16))
    np.save(tmp_path / "big.npy", values.astype(">f4"))
    cfg = SourceConfig(str(tmp_path), image="", text="", columns=("moments", "big"))
    row = open_source(cfg)[3]
    assert row["moments"].dtype == ml_dtypes.bfloat16 and row["big"].dtype.isnative
    assert row["moments"].astype(float).tolist() == row["big"].tolist() == [6.0, 7.0]
    np.save(tmp_path / "big.npy", np.zeros(6, [("a", "f4"), ("b", "i4")]))
    with pytest.raises(InputError, match=r"big.npy has .*, not numbers or text: write it as float32"):
        open_source(cfg)
