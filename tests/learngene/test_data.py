"""Pictures of a classifier that do not decode: replaced in training, an error in evaluation."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from heirloom.common.data.bad import BAD, WrongData
from heirloom.common.data.labelled import open_labelled
from heirloom.common.data.pipeline import PipelineConfig, training_batches
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.sources import SourceConfig
from heirloom.common.errors import InputError
from heirloom.common.mesh import start
from learngene.augment import AugmentConfig
from learngene.data import LOGITS, Example, decoded, evaluation, resident
from learngene.randaugment import RandAugment

PRE = Preprocess(size=8)


@pytest.fixture
def broken(tmp_path):
    """Three classes of 8 grey pictures, whose value is 10 times the class; dog/3.png is no picture."""
    for label, name in enumerate(("cat", "dog", "emu")):
        (tmp_path / name).mkdir()
        for i in range(8):
            Image.new("RGB", (8, 8), (10 * label,) * 3).save(tmp_path / name / f"{i}.png")
    (tmp_path / "dog" / "3.png").write_bytes(b"?")
    return SourceConfig(str(tmp_path))


@pytest.fixture
def picture_of_zeros():
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    return out.getvalue()


def test_a_picture_on_the_devices_is_replaced_with_its_label(broken):
    arrays = decoded(broken, "label", 3, Example(AugmentConfig(), PRE, 3))
    np.testing.assert_array_equal(arrays["image"][:, 4, 4, 0], 10 * arrays["label"])
    assert arrays["label"].tolist()[:11] == [0] * 8 + [1] * 3 and np.flatnonzero(arrays[BAD] != "[]").tolist() == [11]
    data = resident(arrays, PipelineConfig(batch=8, bad_limit=0.25), start())
    said = []
    for batch in itertools.islice(data, 6):
        assert set(batch) == {"image", "label"}
        said.append(data.delivered)
    assert data.bad_limit == 0.25 and {delivered.examples for delivered in said} == {8}
    found = [record for delivered in said for record in delivered.bad]
    assert [record.key for record in found] == [f"{broken.path}/dog/3.png"] * 2  # once an epoch
    assert found[0].position < 24 <= found[1].position


def test_in_every_other_case_it_is_named(broken):
    named = rf"{broken.path}/dog/3\.png: this picture does not decode"
    with pytest.raises(InputError, match=named):
        decoded(broken, "label", 3, Example(AugmentConfig(), PRE, 3), "stop")
    source, cfg = open_labelled(broken, "label", 3), PipelineConfig(batch=24, bad="stop")
    with pytest.raises(InputError, match=named):
        next(training_batches(source, cfg, Example(AugmentConfig(), PRE, 3)))
    with pytest.raises(InputError, match=named):
        list(evaluation(broken, "label", PRE, 8, 3))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1.0, 2.0, 3.0, 4.0], r"numbers of shape \[4\]"),
        (1.5, r"numbers of shape \[\]"),
        ([[1.0], [2.0, 3.0]], r"\[\[1.0\], \[2.0, 3.0\]\]"),
        ("[1.2, 3.4, 5.6]", r"'\[1.2, 3.4, 5.6\]'"),
    ],
)
def test_logits_of_another_number_of_classes_stop_a_run(given, said, picture_of_zeros):
    record = {"key": "a.png", "image": picture_of_zeros, "label": 0, LOGITS: given}
    with pytest.raises(WrongData, match=rf"a\.png: its teacher_logits are {said}, and the student has 3 classes"):
        Example(AugmentConfig(), PRE, 3)(record, np.random.default_rng(0))


def test_logits_are_an_array_of_the_classes(picture_of_zeros):
    record = {"key": "a.png", "image": picture_of_zeros, "label": 0, LOGITS: [1, 2, 3]}
    found = Example(AugmentConfig(), PRE, 3)(record, np.random.default_rng(0))[LOGITS]
    assert found.dtype == np.float32 and found.tolist() == [1, 2, 3]


def test_a_batch_that_the_devices_do_not_divide_is_refused():
    arrays = {"image": np.zeros((20, 4, 4, 3), np.uint8), "label": np.zeros(20, np.int32)}
    with pytest.raises(InputError, match="a batch of 12 cannot be divided into 8 parts"):
        resident(arrays, PipelineConfig(batch=12), start())


def test_resident_batches_cover_an_epoch_and_resume():
    mesh = start()
    arrays = {"label": np.arange(40, dtype=np.int32), "image": np.arange(40, dtype=np.uint8)}
    data = resident(arrays, PipelineConfig(batch=16, seed=3), mesh)
    first = np.concatenate([next(data)["label"] for _ in range(5)])
    assert (
        sorted(first[:40].tolist()) == sorted(first[40:80].tolist()) == list(range(40))
        and (first[:40] != first[40:80]).any()
    )
    state = data.state()
    ahead = np.asarray(next(data)["label"])
    other = resident(arrays, PipelineConfig(batch=16, seed=3), mesh)
    other.restore(state)
    np.testing.assert_array_equal(next(other)["label"], ahead)
    with pytest.raises(InputError, match="seed was 3 and is 4 now"):
        resident(arrays, PipelineConfig(batch=16, seed=4), mesh).restore(state)
    with pytest.raises(InputError, match="fewer than a batch"):
        resident(arrays, PipelineConfig(batch=64), mesh)


def test_randaugment_above_a_spread_of_100_is_uniform_as_in_timm():
    drawn = RandAugment.parse("rand-m9-mstd101-inc1")._drawn
    found = np.array([drawn(np.random.default_rng(i)) for i in range(500)])
    assert 0 < found.min() < 0.02 and 0.88 < found.max() < 0.9  # 9 of 10


@pytest.mark.parametrize("text", ["rand-m9-mstd0.5.1-inc1", "rand-m9-inc1", "rand-m9-mstd.-inc1"])
def test_a_wrong_randaugment_is_refused_before_data_is_read(text):
    with pytest.raises(InputError, match=rf"randaugment '{text}' is not understood: write rand-m9-mstd0.5-inc1"):
        AugmentConfig(randaugment=text)
