"""A small share of the mutations that `mutate.py` makes; the full run is `python tests/mutations/mutate.py 100000`."""

import pytest
from mutate import Target, run
from targets import TARGETS

SHARE = 12
FOUND = {"parquet": (4118,), "tokenizer.json": (540, 3135, 4136)}  # seeds of faults that a full run found, mended since


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_damaged_file_is_read_or_refused_in_one_line(target: Target):
    found = run(target, [*range(SHARE), *FOUND.get(target.name, ())])
    assert found.keys() <= {"read", "refused"}, found
