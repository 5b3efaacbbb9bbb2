"""Folders of .npy arrays: rows as they are stored, and what is wrong with a folder."""

import pickle

import numpy as np
import pytest

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
