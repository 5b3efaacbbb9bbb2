"""One record per picture, from tables with a row per caption."""

from collections.abc import Sequence

from heirloom.common.data.sources.record import Record, Source, key_of
from heirloom.common.errors import remark


def per_picture(source: Source, name: str) -> Source:
    """Returns a source with one record per picture, whose `text` has all its captions; `source` if it is one already.

    Only tables (.csv, .tsv, .parquet) have several rows of one picture: rows with the same path, or the same bytes.
    CLIP_benchmark reads Flickr8k's table this way, where the name of a picture occurs five times. name: of the data,
    for the remark.
    """
    if not hasattr(source, "pictures"):
        return source
    rows: dict[object, list[int]] = {}
    for row, picture in enumerate(source.pictures()):
        rows.setdefault(picture, []).append(row)
    if len(rows) == len(source):
        return source
    counted = "a picture counts once, any of its captions is right"
    remark(f"{name}: its {len(source):,} rows are captions of {len(rows):,} pictures; {counted}")
    return Grouped(source, list(rows.values()))


class Grouped:
    """Merges the captions of records: one record for each list of rows of `source`."""

    def __init__(self, source: Source, rows: Sequence[Sequence[int]]):
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        records = [self._source[row] for row in self._rows[index]]
        texts = [[record["text"]] if isinstance(record["text"], str) else record["text"] for record in records]
        return records[0] | {"text": [caption for several in texts for caption in several]}

    def key(self, index: int) -> str:
        """Returns the name of the first of the rows."""
        return key_of(self._source, self._rows[index][0])
