"""Torch's own files: wrappers and prefixes come off, code does not run, and what is written torch reads back."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.unwrap import open_tensors, open_torch, weights_files, write_torch
from heirloom.common.checkpoint.weights import open_safetensors
from heirloom.common.errors import InputError
from tinyclip_jax.zoo import FAMILY

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity


@pytest.fixture
def state():
    return {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.tensor([1.5, -0.0]).half()}


def same(opened, state):
    assert opened.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(opened[key], value.numpy())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": {"state_dict": s}}]
)
def test_wrapping_dicts_are_opened(state, wrap, legacy, tmp_path):
    file = tmp_path / "weights.pt"
    torch.save(wrap(state), file, _use_new_zipfile_serialization=not legacy)
    same(open_torch(file).tensors, state)


def test_optimizer_state_beside_the_weights_is_left_out(state, tmp_path):
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(5)}}, "param_groups": [{"lr": 1e-3}]}
    torch.save({"state_dict": state, "optimizer": optimizer, "name": "x"}, tmp_path / "weights.pt")
    same(open_torch(tmp_path / "weights.pt").tensors, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_written_files_come_back_bit_for_bit(dtype, tmp_path):
    tensors = {"w": torch.tensor([0.0, -0.0, 1.5, -3.0]).to(dtype), "scalar": torch.tensor(2).to(dtype)}
    torch.save(tensors, tmp_path / "theirs.pt")
    read = open_torch(tmp_path / "theirs.pt").tensors
    write_torch(tmp_path / "ours.pt", read)
    back = torch.load(tmp_path / "ours.pt", weights_only=True)["state_dict"]
    for key, tensor in tensors.items():
        assert back[key].dtype == dtype and back[key].shape == tensor.shape
        bits = tensor.reshape(-1).view(torch.uint8)
        assert read[key].tobytes() == bits.numpy().tobytes()
        assert torch.equal(back[key].reshape(-1).view(torch.uint8), bits)


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("save", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))])
def test_pickled_code_is_refused_and_does_not_run(save, state, tmp_path):
    save({"state_dict": state, "extra": Bomb(tmp_path / "ran")}, tmp_path / "weights.pt")
    with pytest.raises(InputError) as error:
        open_torch(tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()
    assert "\n" not in str(error.value)
    if save is torch.save:
        assert "holds pickled code, not only tensors (getattr), and was not opened; save its state_dict() alone" in str(
            error.value
        )


def test_torchscript_is_refused_with_the_way_out(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "weights.pt")
    with pytest.raises(
        InputError, match=r"TorchScript archive; save its state_dict\(\) with torch.save and convert that$"
    ):
        open_torch(tmp_path / "weights.pt")


@pytest.mark.parametrize("content", [b"", b"not a torch file", b"PK\x03\x04 nor this"])
def test_damaged_files_are_input_errors_of_one_line(content, tmp_path):
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"weights\.pt: not a readable torch file .*; fetch it again$") as error:
        open_torch(tmp_path / "weights.pt")
    assert "\n" not in str(error.value)


def test_truncated_file(state, tmp_path):
    torch.save(state | {"big": torch.zeros(10_000)}, tmp_path / "weights.pt")
    whole = (tmp_path / "weights.pt").read_bytes()
    (tmp_path / "weights.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a readable torch file"):
        open_torch(tmp_path / "weights.pt")


def test_a_list_is_no_dictionary_of_tensors(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "weights.pt")
    with pytest.raises(InputError, match="holds a list, not a dictionary of tensors"):
        open_torch(tmp_path / "weights.pt")


def test_large_files_are_memory_mapped(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "weights.pt")
    first = open_torch(tmp_path / "weights.pt").tensors["w"]
    data = bytearray((tmp_path / "weights.pt").read_bytes())
    start = len(data) - data[::-1].index(b"\0" * 4000) - 4000  # the tensor's own bytes
    with (tmp_path / "weights.pt").open("r+b") as file:
        file.seek(start + 400)
        file.write(np.float32(7).tobytes())
    assert first.max() == 7  # what was read lives in the file


def original(small):
    """The checkpoint of `small` in the original names, written out by hand."""
    t = small.state_dict()
    out = {
        "_image_encoder.visual.conv1.weight": t["vision_model.embeddings.patch_embedding.weight"],
        "_image_encoder.visual.class_embedding": t["vision_model.embeddings.class_embedding"],
        "_image_encoder.visual.positional_embedding": t["vision_model.embeddings.position_embedding.weight"],
        "_image_encoder.visual.proj": t["visual_projection.weight"].T.contiguous(),
        "_text_encoder.token_embedding.weight": t["text_model.embeddings.token_embedding.weight"],
        "_text_encoder.positional_embedding": t["text_model.embeddings.position_embedding.weight"],
        "_text_encoder.text_projection": t["text_projection.weight"].T.contiguous(),
        "_logit_scale.logit_scale": t["logit_scale"],
    }
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
    norms = {f"_image_encoder.{a}": b for a, b in norms.items()} | {
        "_text_encoder.ln_final": "text_model.final_layer_norm"
    }
    for leaf in ("weight", "bias"):
        out |= {f"{a}.{leaf}": t[f"{b}.{leaf}"] for a, b in norms.items()}
        for tower, source in (("_image_encoder.visual", "vision_model"), ("_text_encoder", "text_model")):
            for i in range(2):
                a, b = f"{tower}.transformer.resblocks.{i}", f"{source}.encoder.layers.{i}"
                pairs = dict(ln_1="layer_norm1", ln_2="layer_norm2") | {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
                pairs |= {"attn.out_proj": "self_attn.out_proj"}
                out |= {f"{a}.{x}.{leaf}": t[f"{b}.{y}.{leaf}"] for x, y in pairs.items()}
                out[f"{a}.attn.in_proj_{leaf}"] = torch.cat([t[f"{b}.self_attn.{p}_proj.{leaf}"] for p in "qkv"])
    return out


def distributed(key):
    tower, _, rest = key.partition(".")
    return f"module.{tower}.module.{rest}"


def automatic(key):
    return "module." + key.replace("_image_encoder.", "image_encoder_without_ddp.").replace(
        "_text_encoder.", "text_encoder_without_ddp."
    )


@pytest.mark.parametrize(
    "wrap", [str, distributed, automatic, lambda key: f"module.{key}", lambda key: f"module.module.{key}"]
)
def test_original_files_under_any_wrapper_are_the_same_model(small, wrap, tmp_path):
    file, hf = tmp_path / "tinyclip.pt", tmp_path / "hf"
    small.save_pretrained(hf)
    extra = {"_image_encoder.l0_module.hidden_loga": torch.zeros(3), "_text_encoder.attn_mask": torch.zeros(16, 16)}
    torch.save({"state_dict": {wrap(key): value for key, value in (original(small) | extra).items()}, "epoch": 1}, file)
    donor, reference = open_donor(file, [FAMILY]), open_donor(hf, [FAMILY])
    assert donor.format == "original" and reference.format == "hf"
    assert donor.source.spec == reference.source.spec
    for path, value in reference.source.values.items():
        np.testing.assert_array_equal(np.asarray(donor.source.values[path]), np.asarray(value), err_msg=path)


@pytest.mark.parametrize("to", ["original", "open_clip"])
def test_conversion_through_every_format_is_verified_and_exact(small, to, tmp_path):
    small.save_pretrained(tmp_path / "hf")
    hf = open_safetensors(tmp_path / "hf" / "model.safetensors")
    first = convert(open_donor(tmp_path / "hf", [FAMILY]), tmp_path / to, to)
    again = convert(open_donor(tmp_path / to, [FAMILY]), tmp_path / "back", "hf")
    # open_clip itself, where another test of this process could import it.
    assert first.reference in ({"own formulas"} if to == "original" else {"own formulas", "open_clip"})
    assert again.reference == "transformers"
    assert first.passed and first.max_error < 1e-4 and again.passed and again.max_error < 1e-4
    for key, value in open_safetensors(tmp_path / "back" / "model.safetensors").items():
        assert value.tobytes() == hf[key].tobytes(), key
    if to == "original":
        written = torch.load(tmp_path / to / "tinyclip.pt", weights_only=True)["state_dict"]
        for key, value in original(small).items():
            assert torch.equal(written[key], value), key


def test_bfloat16_reaches_the_original_format(small, tmp_path):
    small.to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    small.float()
    check = convert(open_donor(tmp_path / "hf", [FAMILY]), tmp_path / "original", "original")
    assert check.passed
    written = torch.load(tmp_path / "original" / "tinyclip.pt", weights_only=True)["state_dict"]
    assert {value.dtype for value in written.values()} == {torch.bfloat16}


def test_a_bare_bin_beside_its_config_is_read(small, tmp_path):
    small.save_pretrained(tmp_path / "hf")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    torch.save(small.state_dict(), folder / "pytorch_model.bin")
    a, b = open_donor(folder, [FAMILY]), open_donor(tmp_path / "hf", [FAMILY])
    assert a.cfg == b.cfg
    for path in a.source.values:
        np.testing.assert_array_equal(np.asarray(a.source.values[path]), np.asarray(b.source.values[path]))


def test_shards_of_pickles_are_one_checkpoint(state, tmp_path):
    for number, key in enumerate(state, 1):
        torch.save({key: state[key]}, tmp_path / f"pytorch_model-{number}.bin")
    where = {key: f"pytorch_model-{number}.bin" for number, key in enumerate(state, 1)}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert weights_files(tmp_path) == [index]
    same(open_tensors(index), state)
