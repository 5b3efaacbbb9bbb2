"""Files: read lazily and strictly, written whole or not at all."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from heirloom.common.checkpoint.unwrap import open_weights, weights_files
from heirloom.common.checkpoint.weights import create_safetensors, open_npz, open_safetensors, open_sharded
from heirloom.common.errors import InputError
from heirloom.common.files import staged
from heirloom.common.surgery.layout import Tensor, release

TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.array(2.5, np.float16),
    "c/d": np.arange(5, dtype=np.int64),
    "e": np.array([1.5, -2], ml_dtypes.bfloat16),
}


def write(path, tensors=TENSORS):
    with create_safetensors(path, {k: Tensor(v.shape, v.dtype) for k, v in tensors.items()}) as out:
        for key, value in tensors.items():
            out[key][...] = value


def test_we_and_the_library_read_each_others_files(tmp_path):
    write(tmp_path / "ours.safetensors")
    theirs = load_file(tmp_path / "ours.safetensors")
    for key, value in TENSORS.items():
        np.testing.assert_array_equal(theirs[key], value)
    save_file({k: v for k, v in TENSORS.items() if k != "e"}, tmp_path / "theirs.safetensors")
    for key, value in open_safetensors(tmp_path / "theirs.safetensors").items():
        np.testing.assert_array_equal(value, TENSORS[key])
    assert open_safetensors(tmp_path / "ours.safetensors")["e"].dtype == ml_dtypes.bfloat16


def test_opened_tensors_cannot_be_written_and_are_maps(tmp_path):
    write(tmp_path / "m.safetensors")
    tensor = open_safetensors(tmp_path / "m.safetensors")["a"]
    with pytest.raises(ValueError, match="read-only"):
        tensor[0, 0] = 1
    assert not tensor.flags.owndata


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    file = tmp_path / "m.safetensors"
    write(file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"m\.safetensors.*cut short"):
        open_safetensors(file)


def test_noise_is_not_a_safetensors_file(tmp_path):
    file = tmp_path / "m.safetensors"
    file.write_bytes((20).to_bytes(8, "little") + b"x" * 64)
    with pytest.raises(InputError, match="not a safetensors file"):
        open_safetensors(file)


def test_released_pages_leave_memory_and_are_read_again(tmp_path):
    save_file({name: np.arange(2**22, dtype=np.float32) for name in "abc"}, tmp_path / "a.safetensors")
    tensors = open_safetensors(tmp_path / "a.safetensors")
    tensor = tensors["b"].reshape(2048, 2048).T

    def resident():
        ranges = Path("/proc/self/smaps").read_text().split("a.safetensors\n")[1:]
        return sum(int(text.split("Rss:")[1].split()[0]) * 1024 for text in ranges)

    if not Path("/proc/self/smaps").is_file():
        pytest.skip("needs Linux, which says what is resident")
    total = sum(float(value.sum(dtype=np.float64)) for value in tensors.values())
    assert resident() > 48e6
    release(tensor)
    assert 30e6 < resident() < 34e6
    assert float(tensors["b"].sum(dtype=np.float64)) == total / 3 and resident() > 48e6
    release(tensors["b"][:0])
    release(np.ones(3))  # not mapped: nothing to do
    assert resident() > 48e6


def test_a_numpy_archive_is_read_and_one_with_objects_is_not(tmp_path):
    np.savez(tmp_path / "a.npz", **{"x/y": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "scalar": np.float32(2)})
    found = open_npz(tmp_path / "a.npz")
    assert (
        found["x/y"].flags.c_contiguous
        and found["x/y"].tolist() == [[0, 1, 2], [3, 4, 5]]
        and found["scalar"].shape == ()
    )
    np.savez(tmp_path / "b.npz", x=np.array([{"a": 1}], object))
    (tmp_path / "c.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    for name in ("b", "c"):
        with pytest.raises(InputError, match=rf"{name}\.npz: not a readable numpy archive"):
            open_npz(tmp_path / f"{name}.npz")


def test_bfloat16_and_the_other_byte_order_of_a_numpy_archive(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.savez(tmp_path / "a.npz", half=values.astype(ml_dtypes.bfloat16), big=values.astype(">f4"))
    found = open_npz(tmp_path / "a.npz")
    assert found["half"].dtype == ml_dtypes.bfloat16 and found["big"].dtype == np.dtype("<f4")
    for array in found.values():
        np.testing.assert_array_equal(array.astype(np.float32), values)


def test_shards_are_one_checkpoint_and_a_missing_one_is_named(tmp_path):
    write(tmp_path / "1.safetensors", {"a": TENSORS["a"]})
    write(tmp_path / "2.safetensors", {"b": TENSORS["b"]})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    found = open_sharded(index)
    np.testing.assert_array_equal(found["a"], TENSORS["a"])
    assert found["b"] == 2.5
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(InputError, match=r"the shard 2\.safetensors is missing"):
        open_sharded(index)


def test_nothing_stands_under_the_name_before_the_end(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "out") as temporary:
        temporary.mkdir()
        (temporary / "half").write_text("x")
        assert not (tmp_path / "out").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_existing_name_is_refused_unless_forced_and_then_replaced_whole(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("x")
    with pytest.raises(InputError, match="exists; give another name, or --force"), staged(out):
        pass
    assert (out / "old").exists()
    with staged(out, force=True) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("y")
    assert [p.name for p in out.iterdir()] == ["new"] and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    code = f"""
import resource, signal, sys
from pathlib import Path
import numpy as np
from heirloom.common.checkpoint.weights import create_safetensors
from heirloom.common.files import staged
from heirloom.common.surgery.layout import Tensor
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with staged(Path({str(tmp_path / "out")!r})) as folder:
        folder.mkdir()
        with create_safetensors(folder / "model.safetensors", {{"w": Tensor((1 << 20,), np.dtype(np.float32))}}) as out:
            out["w"][...] = 1
except Exception as error:
    print(type(error).__name__, error)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    ).stdout
    assert out.startswith("InputError") and "could not be written" in out and out.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_killed_while_writing_leaves_nothing_under_the_name(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from heirloom.common.files import staged
with staged(Path({str(tmp_path / "out")!r})) as folder:
    folder.mkdir()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()


def test_shards_next_to_the_same_weights_in_one_file(tmp_path):
    """transformers takes the file, diffusers the shards: the one that is out of date would be taken in silence."""
    for name, value in (("model-1.safetensors", 1.0), ("model.safetensors", 2.0)):
        with create_safetensors(tmp_path / name, {"a": Tensor((), np.dtype(np.float32))}) as out:
            out["a"][...] = value
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(InputError, match=r"holds model\.safetensors, and model\.safetensors\.index\.json of the same"):
        weights_files(tmp_path)
    assert weights_files(index) == [index] and float(open_weights(index).tensors["a"]) == 1
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert weights_files(tmp_path) == [index] and float(open_weights(index).tensors["a"]) == 2


def test_what_is_not_the_average_is_no_average(tmp_path):
    for name in ("a.safetensors", "a.non_ema.bin"):
        (tmp_path / name).write_text("")
    assert weights_files(tmp_path) == [tmp_path / "a.safetensors"]
    (tmp_path / "a_ema.bin").write_text("")
    with pytest.raises(InputError, match=r"holds a\.safetensors and its average a_ema\.bin"):
        weights_files(tmp_path)
