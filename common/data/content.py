"""What data contains: a sample of its records and their hashes, by which what is made of data is matched to it."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from heirloom.common.data.sources import Record, Source

SAMPLES = 64  # records that are hashed


def samples(source: Source) -> list[Record]:
    """Returns evenly spread records."""
    return [source[int(i)] for i in np.linspace(0, len(source) - 1, min(SAMPLES, len(source)))]


def content(source: Source, records: Sequence[Record], captions: Sequence[str]) -> dict[str, Any]:
    """Returns the number of records of a source, and hashes of the pictures and captions of some of them."""
    texts, pictures = "\n".join(captions).encode(), sha256()
    for record in records:
        image = record["image"]
        pictures.update(image if isinstance(image, bytes) else np.asarray(image).tobytes())
    hashes = {"captions": sha256(texts).hexdigest()[:16], "pictures": pictures.hexdigest()[:16]}
    return {"records": len(source)} | hashes
