"""Data sources: folders, tables, tar shards, parquet, TFDS, and the emoji and digits in this package.

A *source* is a random-access sequence of records. A record is a dict with `key` (file and name, for messages), `image`
(encoded bytes, or uint8 [h, w, 3]) and/or `text` (a string, or a list of strings when a picture has several captions),
`label` (int) where the format has classes, and the further columns of the config. Records that share a `concept` are
positives of each other. Sources are pickled to worker processes, so they keep positions, not data, and open files
lazily.
"""

from heirloom.common.data.sources.arrays import ArraySource
from heirloom.common.data.sources.folder import FolderSource
from heirloom.common.data.sources.grouped import per_picture
from heirloom.common.data.sources.parquet import ParquetSource
from heirloom.common.data.sources.record import Record, Source, SourceConfig, captions
from heirloom.common.data.sources.resolve import open_source
from heirloom.common.data.sources.table import CsvSource
from heirloom.common.data.sources.tar import TarSource
from heirloom.common.data.sources.tfds import TfdsSource

__all__ = [
    "ArraySource",
    "CsvSource",
    "FolderSource",
    "ParquetSource",
    "Record",
    "Source",
    "SourceConfig",
    "TarSource",
    "TfdsSource",
    "captions",
    "open_source",
    "per_picture",
]
