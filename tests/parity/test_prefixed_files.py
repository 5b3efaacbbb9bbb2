"""What is removed from the names of all tensors is removed for the reference, too; and files that are no weights."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.cli import main
from heirloom.common.files import read_json
from tinyclip_jax.zoo import FAMILY

pytest.importorskip("torch")
pytest.importorskip("transformers")
GOLDEN = Path(__file__).parents[1] / "golden" / "clip" / "hf_gelu"


def convert(folder, out):
    assert main(["convert", str(folder), str(out)]) == 0
    return read_json(out / "verify.json")


def test_an_attribute_around_a_model_is_removed_for_its_reference(tmp_path, capsys):
    folder = shutil.copytree(GOLDEN, tmp_path / "wrapped")
    file = folder / "model.safetensors"
    save_file({f"clip_model.{key}": value for key, value in load_file(file).items()}, file)
    found = convert(folder, tmp_path / "out")
    assert found["passed"] and found["max_error"] < 1e-4
    assert found["reference"] == "transformers, with tensors renamed here"
    assert "'clip_model.' removed from all names" in capsys.readouterr().out


def test_shards_under_a_wrapper_are_unwrapped_for_their_reference(tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "shards")
    tensors = {f"module.{key}": value for key, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    where = {key: file for file, keys in parts.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert convert(folder, tmp_path / "out")["passed"]


def test_a_file_that_is_no_model_does_not_stop_its_folder(tmp_path, remarks):
    folder = shutil.copytree(GOLDEN, tmp_path / "two")
    (folder / "zero.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert open_donor(folder, [FAMILY]).file.name == "model.safetensors"
    assert any("not read: " in said and "zero.safetensors is a Git LFS pointer" in said for said in remarks())
