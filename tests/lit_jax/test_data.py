"""Pictures of a diffusion model that do not decode: replaced in training, an error elsewhere."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.errors import InputError
from heirloom.common.mesh import start
from heirloom.common.train.parts import Opened
from lit_jax import train, train_autoencoder
from lit_jax.autoencoder import AutoencoderConfig
from lit_jax.dit import DitConfig


@pytest.fixture
def broken(tmp_path):
    """Two classes of 8 grey pictures, whose value is 10 times the class; the first of each is no picture."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(8):
            Image.new("RGB", (8, 8), (10 * label,) * 3).save(tmp_path / name / f"{i}.png")
        (tmp_path / name / "0.png").write_bytes(b"?")
    return SourceConfig(str(tmp_path))


def test_a_transformer_trains_on_the_others(broken):
    cfg = train.Config(student=DitConfig(size=8, channels=3, classes=2), data=broken, pipeline=PipelineConfig(batch=16))
    opened = Opened(mesh=start(), donor=None, teacher=None)
    data = train.batches(cfg, opened)
    batch = next(data)
    shown = np.rint((np.asarray(batch["image"])[:, 0, 0, 0] + 1) * 127.5)
    np.testing.assert_array_equal(shown, 10 * np.asarray(batch["label"]))
    keys = {record.key for record in data.delivered.bad}
    assert keys == {f"{broken.path}/{name}/0.png" for name in ("cat", "dog")}
    stop = replace(cfg, pipeline=PipelineConfig(batch=16, bad="stop"))
    with pytest.raises(InputError, match=r"/0\.png: this picture does not decode: .* take it out of the set"):
        next(train.batches(stop, opened))


def test_an_autoencoder_is_scaled_by_the_others_and_scored_by_all(broken):
    cfg = train_autoencoder.Config(student=AutoencoderConfig(size=8), data=broken, held_out=broken)
    pictures = train_autoencoder._some(cfg, cfg.data, "replace")
    assert pictures.shape == (16, 8, 8, 3) and len(np.unique(pictures)) == 2
    with pytest.raises(InputError, match=r"cat/0\.png: this picture does not decode"):
        train_autoencoder._some(cfg, cfg.held_out, "stop")
