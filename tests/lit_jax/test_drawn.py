"""Pictures of an evaluation on disk: whole at the end, continued where they stopped, refused where they are others."""

import json

import numpy as np
import pytest

from heirloom.common.errors import InputError
from lit_jax.drawn import Drawn

PICTURES = np.random.default_rng(0).integers(0, 256, (10, 4, 5, 3)).astype(np.uint8)
HOW = {"seed": 0, "sample": {"steps": 2}, "weights": {"model.safetensors": "1" * 64}}


def drawing(calls, stop=None, size=3):
    """What draws, three at a time; it is killed before picture `stop`."""

    def draw(first):
        calls.append(first)
        for i in range(first, 10, size):
            if stop is not None and i >= stop:
                raise KeyboardInterrupt
            yield PICTURES[i : i + size]

    return draw


def test_killed_and_started_again_it_draws_the_rest(tmp_path):
    drawn, calls = Drawn(tmp_path / "s.npz", PICTURES.shape, HOW), []
    with pytest.raises(KeyboardInterrupt):
        list(drawn.batches(drawing(calls, stop=6), 3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.npz.part.json", "s.npz.part.npy"] and drawn.count() == 6
    parts = list(drawn.batches(drawing(calls, size=2), 4))  # in other batches
    assert calls == [0, 6] and [len(part) for part in parts] == [4, 2, 2, 2]
    np.testing.assert_array_equal(np.concatenate(parts), PICTURES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.npz", "s.npz.json"]
    np.testing.assert_array_equal(np.load(tmp_path / "s.npz")["arr_0"], PICTURES)
    # Complete, they are read again and nothing is drawn.
    assert drawn.count() == 10
    np.testing.assert_array_equal(np.concatenate(list(drawn.batches(drawing(calls), 4))), PICTURES)
    assert calls == [0, 6]


def test_pictures_drawn_in_another_way_are_not_mixed(tmp_path):
    first = Drawn(tmp_path / "s.npz", PICTURES.shape, HOW)
    with pytest.raises(KeyboardInterrupt):
        list(first.batches(drawing([], stop=6), 3))
    for how, words in (
        ({"seed": 1}, "drawn with another seed"),
        ({"sample": {"steps": 3}}, "drawn with another sample"),
    ):
        with pytest.raises(
            InputError, match=rf"s.npz.part.npy exists and is {words}: remove it, or give another --save"
        ):
            Drawn(tmp_path / "s.npz", PICTURES.shape, HOW | how).count()
    list(first.batches(drawing([]), 3))
    with pytest.raises(InputError, match=r"s.npz exists and is drawn with another seed"):
        Drawn(tmp_path / "s.npz", PICTURES.shape, HOW | {"seed": 1}).count()


def test_a_file_of_somebody_else_is_left_alone(tmp_path):
    np.savez(tmp_path / "mine.npz", arr_0=PICTURES)
    with pytest.raises(InputError, match=r"mine.npz exists and is of unknown settings"):
        Drawn(tmp_path / "mine.npz", PICTURES.shape, HOW).count()
    with pytest.raises(InputError, match=r"name it samples.npz"):
        Drawn(tmp_path / "samples", PICTURES.shape, HOW).count()


def test_a_part_of_another_size_is_refused(tmp_path):
    drawn = Drawn(tmp_path / "s.npz", PICTURES.shape, HOW)
    np.save(tmp_path / "s.npz.part.npy", PICTURES[:5])
    (tmp_path / "s.npz.part.json").write_text(json.dumps({"drawn": 3, "how": HOW}))
    with pytest.raises(InputError, match=r"holds uint8 \[5, 4, 5, 3\], not uint8 \[10, 4, 5, 3\]: remove it"):
        list(drawn.batches(drawing([]), 3))


def test_a_damaged_part_is_refused(tmp_path):
    (tmp_path / "s.npz.part.npy").write_bytes(b"\x93NUMPY\x01\x00\x0a\x00{'descr': \n" + bytes(64))
    (tmp_path / "s.npz.part.json").write_text(json.dumps({"drawn": 3, "how": HOW}))
    with pytest.raises(InputError, match=r"s.npz.part.npy is damaged .*: remove it"):
        list(Drawn(tmp_path / "s.npz", PICTURES.shape, HOW).batches(drawing([]), 3))


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(InputError, match=r"could not be written .No space left on device.; free some space"):
        list(Drawn(tmp_path / "s.npz", PICTURES.shape, HOW).batches(drawing([]), 3))
