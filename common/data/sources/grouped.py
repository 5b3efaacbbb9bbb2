"""One record per picture, out of tables with a row per caption."""

from collections.abc import Sequence

from heirloom.common.data.sources.record import Record, Source
from heirloom.common.errors import remark


def per_picture(source: Source, name: str) -> Source:
    """The same data with one record per picture, whose `text` lists the captions of all its rows; `source` itself if it is so already.

    Only tables (.csv, .tsv, .parquet) have rows of one picture: those with the same path, or the same bytes. This is how
    CLIP_benchmark reads Flickr8k's table, where the name of a picture occurs five times. name: for the note that says so.
    """
    if not hasattr(source, "pictures"):
        return source
    rows: dict[object, list[int]] = {}
    for row, picture in enumerate(source.pictures()):
        rows.setdefault(picture, []).append(row)
    if len(rows) == len(source):
        return source
    remark(f"{name}: its {len(source):,} rows are captions of {len(rows):,} pictures; a picture counts once, any of its captions is right")
    return Grouped(source, list(rows.values()))


class Grouped:
    """Records of `source` whose captions are merged: one for each list of rows."""

    def __init__(self, source: Source, rows: Sequence[Sequence[int]]):
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        records = [self._source[row] for row in self._rows[index]]
        texts = [[record["text"]] if isinstance(record["text"], str) else record["text"] for record in records]
        return records[0] | {"text": [caption for several in texts for caption in several]}
