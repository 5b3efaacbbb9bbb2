"""Damage to the files of a saved training state: it is named, and the state before it is used."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heirloom.common.checkpoint import seal
from heirloom.common.checkpoint.state import Checkpoints, Keep
from heirloom.common.errors import InputError, Remark

# after a failed read orbax abandons its other readers
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

LIKE = {"w": jax.ShapeDtypeStruct((300,), np.float32)}


def value(step):
    return jnp.arange(300, dtype=jnp.float32) + step


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two states, of steps 10 and 20."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder)
    for step in (10, 20):
        checkpoints.save(step, {"w": value(step)}, {"data": step})
    checkpoints.wait()
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, at):
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at // 8 % len(data)] ^= 1 << at % 8
    path.write_bytes(data)


def earlier(folder):
    """Makes a state like those of versions that wrote no SHA-256."""
    (folder / seal.MANIFEST).unlink()
    metadata = json.loads((folder / seal.METADATA).read_text())
    (folder / seal.METADATA).write_text(json.dumps(metadata | {"custom_metadata": {}}))


def test_every_file_is_hashed_before_the_state_has_its_name(saved, tmp_path, monkeypatch):
    for step in ("10", "20"):
        hashed = json.loads((saved / step / seal.MANIFEST).read_text())
        names = {path.relative_to(saved / step).as_posix() for path in files(saved / step)}
        assert hashed.keys() == names - {seal.MANIFEST} and {"data/metadata", *seal.LATE} < names
    found = []
    before = seal.seal
    monkeypatch.setattr(seal, "seal", lambda folder: (before(folder), found.append(folder.name)))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"w": value(3)}, {})
    checkpoints.wait()
    assert found == ["3.orbax-checkpoint-tmp"]  # a kill leaves either no state or one that can be checked


def test_any_damage_is_found_and_the_state_before_is_used(copy):
    rng = np.random.default_rng(0)
    whole = {path.relative_to(copy / "20"): path.read_bytes() for path in files(copy / "20")}
    kept = shutil.copytree(copy / "20", copy.parent / "whole")
    assert len(whole) > 10
    for name, data in whole.items():
        for kind in ("flip", "truncate", "delete") if data else ("delete",):
            path = copy / "20" / name
            if kind == "flip":
                flip(path, int(rng.integers(8 * len(data))))
            elif kind == "truncate":
                path.write_bytes(data[: int(rng.integers(len(data)))])
            else:
                path.unlink()
            with pytest.warns(Remark, match=r"/20 is damaged: .*; the state of step 10 is used; .*/20\.damaged$"):
                assert Checkpoints(copy).latest() == 10, (name, kind)
            assert {path.name for path in copy.iterdir()} == {"10", "20.damaged"}
            shutil.copytree(kept, copy / "20")


def test_the_run_goes_on_from_the_state_before_and_saves_the_step_again(copy):
    flip(next((copy / "20" / "state" / "d").iterdir()), 999)
    checkpoints = Checkpoints(copy)
    with pytest.warns(Remark) as said:
        assert checkpoints.latest() == 10
    assert [str(one.message).partition(": ")[2] for one in said] == [
        f"state/d/{next((copy / '20.damaged' / 'state' / 'd').iterdir()).name} differs from its SHA-256; "
        f"the state of step 10 is used; what is left of it is {copy / '20.damaged'}"
    ]
    restored = checkpoints.restore(10, LIKE)
    np.testing.assert_array_equal(restored.state["w"], value(10))
    assert restored.data == {"data": 10}
    checkpoints.save(20, {"w": value(7)}, {})
    checkpoints.wait()
    assert checkpoints.latest() == 20 and seal.damage(copy / "20") == ""
    np.testing.assert_array_equal(Checkpoints(copy).restore(20, LIKE).state["w"], value(7))


def test_no_whole_state_is_an_error_and_nothing_is_renamed(copy):
    (copy / "10" / "data" / "metadata").unlink()
    (copy / "20" / seal.MANIFEST).unlink()
    with pytest.raises(InputError) as refused:
        Checkpoints(copy).latest()
    assert str(refused.value) == (
        f"{copy}: no state is whole (of the last, 20, sha256.json is missing); copy one back from a backup, "
        "or start a new run"
    )
    assert {path.name for path in copy.iterdir()} == {"10", "20"}


def test_an_older_state_that_orbax_cannot_read_does_no_harm(copy):
    (copy / "10" / seal.METADATA).write_text("[1]")
    checkpoints = Checkpoints(copy)
    with pytest.warns(Remark, match="/10 is damaged: _CHECKPOINT_METADATA is damaged; the state of step 20 is used"):
        assert checkpoints.latest() == 20
    np.testing.assert_array_equal(checkpoints.restore(20, LIKE).state["w"], value(20))


def test_a_state_of_an_earlier_version_is_used_and_said_to_be_unchecked(copy):
    earlier(copy / "20")
    checkpoints = Checkpoints(copy)
    with pytest.warns(Remark, match=r"/20: an earlier version wrote it without SHA-256, so it cannot be checked$"):
        assert checkpoints.latest() == 20
    np.testing.assert_array_equal(checkpoints.restore(20, LIKE).state["w"], value(20))


def test_an_unchecked_state_with_missing_or_cut_files_is_an_error_of_one_line(copy):
    earlier(copy / "20")
    for path in files(copy / "20" / "state") + files(copy / "20" / "data"):
        data = path.read_bytes()
        for damage in (lambda: path.unlink(), lambda: path.write_bytes(data[: len(data) // 2])):  # noqa: B023
            damage()
            try:
                restored = Checkpoints(copy).restore(20, LIKE)
                np.testing.assert_array_equal(restored.state["w"], value(20))  # this file is not needed
            except InputError as error:
                assert "20: cannot be restored; remove it to continue from the state before it" in str(error)
            path.write_bytes(data)


def test_which_states_stay(tmp_path):
    def steps(folder, keep):
        checkpoints = Checkpoints(tmp_path / folder, keep)
        for step in range(1, 10):
            checkpoints.save(step, {"w": value(step)}, {})
        checkpoints.wait()
        return checkpoints.steps()

    assert steps("last", Keep(last=3)) == [7, 8, 9]
    assert steps("every", Keep(last=1, every=4)) == [4, 8, 9]
    assert steps("minutes", Keep(last=1, minutes=1000)) == [1, 9]  # the first of each 1,000 minutes


def test_a_step_that_exists_is_not_left_out_in_silence(copy):
    with pytest.raises(InputError, match=r"step 15 or the one before it could not be saved.*\(the folder has step 20"):
        Checkpoints(copy).save(15, {"w": value(15)}, {})
