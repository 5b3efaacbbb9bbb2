"""Pictures that a zoo and its generator read."""

from functools import partial

import pytest

from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.errors import InputError
from weightgen.zoo.data import encoder, labelled, thumbnails


def test_a_picture_that_does_not_decode_is_named(tmp_path):
    (tmp_path / "class0").mkdir()
    (tmp_path / "class0" / "0.png").write_bytes(b"?")
    records, _ = labelled(open_source(SourceConfig(str(tmp_path), text="")), str(tmp_path))
    for read in (encoder("pixels"), partial(thumbnails, channels=3)):
        with pytest.raises(InputError, match=r"class0/0\.png: this picture does not decode: .* out of the set$"):
            read(records)
