"""The data set that lives in the repository: what is held out is held out in every hand, and it stays small."""

from itertools import product
from pathlib import Path

import pytest
from pyarrow import parquet

from heirloom.common.data import emoji
from heirloom.common.data.sources import SourceConfig, open_source


@pytest.fixture(scope="module")
def rows():
    """`rows[style, split]`: the rows as they lie in the file."""
    tables = {style: parquet.read_table(emoji.path(style)).to_pylist() for style in emoji.STYLES}
    return {
        (style, split): [r for r in tables[style] if r["split"] == split]
        for style, split in product(emoji.STYLES, ("train", "test"))
    }


# The three hands share concepts and captions; of 3,921 to learn from, 22 repeat another: families, a cat.
@pytest.mark.parametrize(
    ("column", "counts"), [("concept", (1307, 300)), ("caption", (1307, 300)), ("image", (3921 - 22, 900))]
)
def test_nothing_held_out_is_seen_in_any_hand(rows, column, counts):
    seen, held_out = (
        {row[column] for style in emoji.STYLES for row in rows[style, split]} for split in ("train", "test")
    )
    assert (len(seen), len(held_out)) == counts
    assert not seen & held_out


def test_every_hand_draws_the_same_concepts_in_the_same_order(rows):
    for split in ("train", "test"):
        concepts = [[row["concept"] for row in rows[style, split]] for style in emoji.STYLES]
        assert concepts[0] == concepts[1] == concepts[2] == sorted(set(concepts[0]))
    assert all({row["style"] for row in rows[style, split]} == {style} for style, split in rows)


def test_a_split_is_what_is_trained_and_scored_on():
    seen, held_out = (open_source(SourceConfig("emoji", split=split)) for split in ("train", "test"))
    assert (len(seen), len(held_out)) == (3 * 1307, 3 * 300)
    assert not {record["concept"] for record in held_out} & {seen[i]["concept"] for i in range(len(seen))}


def test_it_is_small_enough_to_clone():
    files = [file for file in Path(emoji.__file__).parent.iterdir() if file.is_file()]
    assert 3e6 < sum(file.stat().st_size for file in files) <= 12e6
