"""Whatever bytes a file holds, what comes out is tensors or one line that says what to do."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heirloom.common.checkpoint.hub import locate
from heirloom.common.checkpoint.unwrap import open_torch
from heirloom.common.checkpoint.weights import open_folder, open_safetensors, open_sharded
from heirloom.common.errors import InputError
from heirloom.common.files import staged, write_json


def raw(header, data=b"\0" * 24) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


GOOD = raw({"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}})


def opened(tmp_path: Path, content: bytes):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    return open_safetensors(file)


def test_the_good_file_is_good(tmp_path):
    np.testing.assert_array_equal(opened(tmp_path, GOOD)["a"], np.zeros((2, 3), np.float32))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([1, 2], "cut short, or not a safetensors file"),
        ({"a": 3}, "cut short, or not"),
        ({"a": {"dtype": "F32", "shape": [2, 3]}}, "cut short, or not"),
        ({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0]}}, "cut short, or not"),
        ({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": ["0", "24"]}}, "cut short, or not"),
        ({"a": {"dtype": "F32", "shape": [2, -3], "data_offsets": [24, 0]}}, "cut short, or not"),
        ({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [-24, 0]}}, "cut short, or not"),
        ({"a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 24]}}, "cut short, or not"),
        ({"a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}}, "cut short, or not"),
        # 12 bytes belong to nobody
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}, "cut short, or not"),
        (
            {"a": {"dtype": "F8_E4M3", "shape": [24], "data_offsets": [0, 24]}},
            "tensor 'a' has dtype F8_E4M3, which is not one of F64",
        ),
        (b"\xff\xfe", "cut short, or not"),
        (b"{", "cut short, or not"),
    ],
)
def test_headers_that_lie(header, message, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        opened(tmp_path, raw(header))
    assert "x.safetensors" in str(error.value) and "\n" not in str(error.value)


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, len(GOOD)),
)
def test_random_damage_is_an_input_error_or_harmless(tmp_path_factory, changes, length):
    content = bytearray(GOOD)
    for position, byte in changes:
        content[position] = byte
    try:
        tensors = opened(tmp_path_factory.getbasetemp(), bytes(content[:length]))
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(t, np.ndarray) for t in tensors.values())


def test_a_file_without_tensors_is_empty(tmp_path):
    assert opened(tmp_path, raw({}, b"")) == {}


def test_misaligned_data_is_read(tmp_path):
    """Other writers do not align: a header of odd length puts the numbers anywhere."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    header += b" " * (1 + -len(header) % 4)
    got = opened(tmp_path, raw(header, np.array([1.5, -2, 3], np.float32).tobytes()))["a"]
    np.testing.assert_array_equal(got, [1.5, -2, 3])


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 4}}'])
def test_an_index_that_is_none(content, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
        open_sharded(index)


def test_an_index_that_names_a_tensor_its_shard_lacks(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(GOOD)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    with pytest.raises(InputError, match=r"tensor 'b' is not in x\.safetensors"):
        open_sharded(index)


def test_a_folder_that_is_not_ours(tmp_path):
    with pytest.raises(InputError, match="is not a weights folder of heirloom; `heirloom convert"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "heirloom", "method": "tinyclip"')
    with pytest.raises(InputError, match=r"config\.json: cannot be read as JSON"):
        open_folder(tmp_path)


def test_a_folder_of_ours_without_its_weights(tmp_path):
    write_json(
        tmp_path / "config.json", {"format": "heirloom", "version": 1, "method": "tinyclip", "model": {}}
    )
    with pytest.raises(InputError, match=r"model\.safetensors"):
        open_folder(tmp_path)


def test_a_forced_replacement_that_fails_leaves_the_old_one(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("x")
    with pytest.raises(InputError, match="could not be written"), staged(out, force=True):
        pass  # writes nothing, so that there is nothing to rename
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (out / "old").read_text() == "x"
    with pytest.raises(ValueError), staged(out, force=True) as temporary:
        temporary.mkdir()
        raise ValueError
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (out / "old").read_text() == "x"


def test_a_destination_under_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="could not be written"), staged(tmp_path / "file" / "out"):
        pass
    assert (tmp_path / "file").read_text() == "x"


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"no such file or folder \(a Hugging Face model is written hf:org/name"):
        locate(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"no embedded model 'emojis'; did you mean 'emoji'\? \(there are: emoji\)"):
        locate("embedded:emojis", {"emoji": tmp_path})
    assert locate("embedded:emoji", {"emoji": tmp_path}) == tmp_path
    assert locate(str(tmp_path)) == tmp_path


@pytest.fixture
def hub(monkeypatch):
    """A hub of these files, or out of reach; records what is asked for."""
    import huggingface_hub

    def serve(files=None, cached=None):
        asked = []

        def list_repo_files(self, name, revision=None):
            if files is None:
                raise ConnectionError("no route\nto host")
            asked.append((name, revision))
            return files

        def snapshot_download(name, revision=None, allow_patterns=None, local_files_only=False):
            if local_files_only and cached is None:
                raise huggingface_hub.errors.LocalEntryNotFoundError("nothing")
            asked.append((name, revision, allow_patterns))
            return cached or "/cache"

        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    return serve


def test_pickles_are_fetched_only_where_there_is_nothing_else(hub):
    asked = hub(["model.safetensors", "pytorch_model.bin", "config.json"])
    assert locate("hf:org/name@abc") == Path("/cache")
    assert asked[0] == ("org/name", "abc") and asked[1][:2] == ("org/name", "abc")
    assert "*.safetensors" in asked[1][2] and "*.bin" not in asked[1][2] and "*.json" in asked[1][2]
    asked = hub(["pytorch_model.bin", "config.json"])
    locate("hf:org/name")
    assert asked[0] == ("org/name", None) and "*.bin" in asked[1][2]


def test_of_a_repository_a_folder(hub):
    asked = hub(["transformer/model.safetensors", "vae/weights.bin"])
    assert locate("hf:org/name/transformer@v1") == Path("/cache/transformer")
    name, revision, patterns = asked[-1]
    assert (name, revision) == ("org/name", "v1")
    assert "transformer/*.safetensors" in patterns and all(pattern.startswith("transformer/") for pattern in patterns)
    locate("hf:org/name/vae")
    assert "vae/*.bin" in asked[-1][2]  # no safetensors in this folder, whatever lies in others


def test_of_a_repository_a_file_with_what_describes_it(hub):
    files = ["dit/a.pt", "dit/b.pt", "dit/config.json", "vae/config.json", "vae/x-1-of-2.bin", "vae/x.bin.index.json"]
    asked = hub(files)
    assert locate("hf:org/name/dit/a.pt") == Path("/cache/dit/a.pt")
    assert asked[-1][2] == ["dit/a.pt", "dit/config.json"]
    locate("hf:org/name/vae/x.bin.index.json")
    assert asked[-1][2] == ["vae/config.json", "vae/x-1-of-2.bin", "vae/x.bin.index.json"]
    with pytest.raises(InputError, match="the repository has no file or folder 'di'"):
        locate("hf:org/name/di")


def test_each_folder_of_a_repository_has_its_own_kind_of_weights(hub):
    asked = hub(["transformer/a.safetensors", "transformer/a.bin", "vae/a.bin", "vae/config.json", "run/optimizer.bin"])
    locate("hf:org/name")
    assert asked[-1][2] == ["transformer/a.safetensors", "vae/a.bin", "vae/config.json"]


@pytest.mark.parametrize("file", ["vit.npz", "last.ckpt", "checkpoint.pth.tar", "best.th"])
def test_every_file_that_can_be_opened_is_fetched(file, hub):
    asked = hub([file, "README.md", "config.json"])
    locate("hf:org/name")
    assert any(Path(file).match(pattern) for pattern in asked[-1][2])


def test_numpy_archives_next_to_weights_are_not_fetched(hub):
    asked = hub(["model.safetensors", "statistics/fid.npz"])
    locate("hf:org/name")
    assert asked[-1][2][:2] == ["*.safetensors.index*.json", "*.safetensors"]


def test_a_repository_without_weights_names_its_files(hub):
    hub(["model.gguf", "optimizer.bin"], cached="/earlier")
    with pytest.raises(InputError, match=r"^hf:org/name: the repository has no weights .*; it has model\.gguf, "):
        locate("hf:org/name")
    hub(["adapter_config.json", "adapter_model.safetensors"])
    assert locate("hf:org/name") == Path("/cache")  # opening it says what to do with an adapter


def test_without_a_network_the_cache_serves_or_one_line_says_so(hub):
    hub(None, cached="/earlier")
    assert locate("hf:org/name") == Path("/earlier")
    hub(None)
    with pytest.raises(InputError) as error:
        locate("hf:org/name")
    assert str(error.value) == "hf:org/name: could not be fetched (no route); check name and network"


def test_torch_files_without_torch_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(InputError, match=r"needs torch; pip install 'heirloom-jax\[torch\]'"):
        open_torch(tmp_path / "x.pt")
