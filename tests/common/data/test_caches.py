"""The folder of a new cache."""

import jax
import numpy as np
import pytest

from heirloom.common.data.caches import new_cache, write_columns
from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.errors import InputError


def test_columns_are_read_back_as_records(tmp_path):
    with new_cache(tmp_path / "cache") as folder:
        write_columns(folder, 3, ({"x": np.full((n, 2), n, np.float16)} for n in (2, 1)))
    source = open_source(SourceConfig(str(tmp_path / "cache"), image="", text="", columns=("x",)))
    assert [source[i]["x"].tolist() for i in range(len(source))] == [[2, 2], [2, 2], [1, 1]]


def test_a_job_of_several_processes_writes_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="this job has 2 processes, one writes a cache"), new_cache(tmp_path / "cache"):
        raise AssertionError
    assert not list(tmp_path.iterdir())
