"""Files of the Flax models that transformers and diffusers had: what those computed, and the way back bit for bit."""

import shutil
import struct
from pathlib import Path

import huggingface_hub
import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.flax_files import as_torch, open_flax
from heirloom.common.checkpoint.hub import locate
from heirloom.common.checkpoint.unwrap import KINDS, open_tensors
from heirloom.common.checkpoint.verify import RENAMED, Check
from heirloom.common.errors import InputError
from heirloom.common.files import read_json, write_json
from heirloom.common.methods import families

GOLDENS = Path(__file__).parents[2] / "golden" / "flax"
FILES = {"clip": "flax_model.msgpack", "vit": "flax_model.msgpack", "autoencoder": "diffusion_flax_model.msgpack"}


def opened(name):
    donor, expected = open_donor(GOLDENS / name, families()), dict(np.load(GOLDENS / name / "expected.npz"))
    expected = {key: value / np.float32(64) if value.dtype == np.int8 else value for key, value in expected.items()}
    return donor, {path: np.asarray(view) for path, view in donor.source.values.items()}, expected


def differs(got, expected):
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


def test_features_of_a_clip_are_those_of_flax():
    donor, params, expected = opened("clip")
    assert (donor.family.name, donor.format) == ("tinyclip", "flax")
    assert (donor.cfg.image.activation, donor.cfg.text.eot, donor.cfg.text.eps) == ("quick_gelu", 40, 1e-3)
    got = jax.jit(donor.model.apply)(params, expected["images"], expected["tokens"])
    assert differs(got.image, expected["image"]) < 1e-5 and differs(got.text, expected["text"]) < 1e-5
    assert differs(got.scale * got.image @ got.text.T, expected["logits"]) < 1e-5


def test_logits_of_a_vit_are_those_of_flax():
    donor, params, expected = opened("vit")
    assert (donor.family.name, donor.format, donor.cfg.eps) == ("learngene", "flax", 1e-3)
    assert differs(jax.jit(donor.model.apply)(params, expected["images"]), expected["logits"]) < 1e-5


def test_latents_and_pictures_of_an_autoencoder_are_those_of_flax():
    donor, params, expected = opened("autoencoder")
    assert (donor.family.name, donor.format) == ("autoencoder", "flax")
    mean, logvar = jax.jit(lambda p, x: donor.model.apply(p, x, method="encode"))(params, expected["images"])
    decoded = jax.jit(lambda p, x: donor.model.apply(p, x, method="decode"))(params, expected["latents"])
    for name, got in (("mean", mean), ("logvar", logvar), ("decoded", decoded)):
        assert differs(got, expected[name]) < 1e-4, name


@pytest.mark.parametrize("name", FILES)
def test_the_way_there_and_back_keeps_every_bit(name, tmp_path):
    donor = open_donor(GOLDENS / name, families())
    assert all(isinstance(_owner(part), np.memmap) for view in donor.source.values.values() for part in view.parts)
    convert(donor, tmp_path / "ours", "heirloom", verify=False)
    convert(open_donor(tmp_path / "ours", families()), tmp_path / "back", "flax", verify=False)
    # Read by Flax itself, of both files.
    theirs, written = (_of_flax(folder / FILES[name]) for folder in (GOLDENS / name, tmp_path / "back"))
    assert theirs.keys() == written.keys()
    for key, value in theirs.items():
        assert (value.dtype, value.shape) == (written[key].dtype, written[key].shape)
        assert value.tobytes() == written[key].tobytes(), key
    assert open_donor(tmp_path / "back", families()).cfg == donor.cfg


def _owner(array):
    while not isinstance(array, np.memmap) and array.base is not None:
        array = array.base
    return array


def _of_flax(file):
    return flatten_dict(serialization.msgpack_restore(file.read_bytes()), sep="/")


def test_shards_are_read_and_any_ending(tmp_path):
    tensors = open_flax(GOLDENS / "vit" / FILES["vit"])
    names, half = sorted(tensors), len(tensors) // 2
    for number, part in enumerate((names[:half], names[half:])):
        tree = unflatten_dict({key: tensors[key] for key in part}, sep="/")
        (tmp_path / f"flax_model-{number}.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    weight_map = {key: f"flax_model-{int(key in names[half:])}.msgpack" for key in names}
    write_json(tmp_path / "flax_model.msgpack.index.json", {"weight_map": weight_map})
    shutil.copy(GOLDENS / "vit" / "config.json", tmp_path)
    donor = open_donor(tmp_path, families())
    bare = tmp_path / "weights.bin"
    shutil.copy(GOLDENS / "vit" / FILES["vit"], bare)
    for path, view in open_donor(GOLDENS / "vit", families()).source.values.items():
        np.testing.assert_array_equal(np.asarray(donor.source.values[path]), np.asarray(view))
        np.testing.assert_array_equal(np.asarray(open_donor(bare, families()).source.values[path]), np.asarray(view))


def test_dtypes_of_flax_are_read(tmp_path):
    rng = np.random.default_rng(0)
    tree = {
        "a": {"half": rng.standard_normal((3, 5)).astype(np.float16), "none": np.zeros((0, 2), np.float32)},
        "b": {"brain": rng.standard_normal(300).astype(ml_dtypes.bfloat16), "scalar": np.float32(2.5)},
    }
    (tmp_path / "x.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    found = open_tensors(tmp_path / "x.msgpack")
    assert found.keys() == {"a/half", "a/none", "b/brain", "b/scalar"} and found["b/scalar"] == np.float32(2.5)
    for key, value in (("a/half", tree["a"]["half"]), ("a/none", tree["a"]["none"]), ("b/brain", tree["b"]["brain"])):
        assert found[key].dtype == value.dtype and found[key].shape == value.shape
        assert found[key].tobytes() == value.tobytes() and not found[key].flags.writeable


def test_names_and_axes_of_torch():
    found = as_torch({
        "encoder/down_blocks_0/resnets_1/conv1/kernel": np.zeros((3, 5, 7, 11)),
        "text/embedding": np.zeros((4, 6)),
        "layers/0/layer_norm1/scale": np.zeros(2),
        "fc1/kernel": np.zeros((2, 9)),
        "vit/embeddings/cls_token": np.zeros((1, 1, 8)),
    })  # fmt: skip
    assert {key: value.shape for key, value in found.items()} == {
        "encoder.down_blocks.0.resnets.1.conv1.weight": (11, 7, 3, 5),
        "text.weight": (4, 6),
        "layers.0.layer_norm1.weight": (2,),
        "fc1.weight": (9, 2),
        "vit.embeddings.cls_token": (1, 1, 8),
    }


def _packed(shape=(2,), dtype="float32", data=bytes(8), kind=1):
    return msgpack.ExtType(kind, msgpack.packb((shape, dtype, data)))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (msgpack.packb({"a": _packed()})[:-1], "cut short"),
        (msgpack.packb({"a": _packed()}) + b"\0", "more bytes after the end"),
        (msgpack.packb({"a": _packed((3,))}), "'a' has 8 bytes, which float32 of shape .3,. has not"),
        (msgpack.packb({"a": _packed(dtype="object")}), "'a' has dtype object"),
        (msgpack.packb({"a": _packed(kind=2)}), "'a' is a complex number or of an unknown kind"),
        (msgpack.packb({"step": 3}), "'step' is a number, and only arrays can be read; save the parameters alone"),
        (msgpack.packb({"a": {"__msgpack_chunked_array__": True}}), "'a' is over 1 GiB and stored in chunks"),
        (msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(7))}), "a number where a list must be"),
        (b"\xdf" + struct.pack(">I", 2**32 - 1) + b"\xa1a", "cut short"),
        (b"\x81\xa1a" * 100 + b"\x80", "maps within maps without end"),
        (msgpack.packb({"a\nb": _packed()}), "a name is 'a.nb'"),
        (b"\x82" + 2 * (b"\xa1a" + msgpack.packb(_packed())), "'a' is there twice"),
    ],
)
def test_damaged_files_are_one_line(content, complaint, tmp_path):
    (tmp_path / "flax_model.msgpack").write_bytes(content)
    with pytest.raises(InputError, match=complaint) as error:
        open_donor(tmp_path, families())
    assert "\n" not in str(error.value) and str(tmp_path / "flax_model.msgpack") in str(error.value)


@pytest.mark.parametrize(
    ("name", "drop", "message"),
    [
        ("clip", ("text_model", "text_projection", "logit_scale"), "FlaxCLIPVisionModel.: take the whole model"),
        ("vit", ("classifier",), "has no classifier"),
        ("autoencoder", ("decoder",), "match no known model"),
    ],
)
def test_parts_of_models_are_refused(name, drop, message, tmp_path):
    tree = serialization.msgpack_restore((GOLDENS / name / FILES[name]).read_bytes())
    shutil.copy(GOLDENS / name / "config.json", tmp_path)
    kept = {key: value for key, value in tree.items() if key not in drop}
    (tmp_path / FILES[name]).write_bytes(serialization.msgpack_serialize(kept))
    with pytest.raises(InputError, match=message):
        open_donor(tmp_path, families())


def test_a_deit_has_no_flax_file(tmp_path):
    donor = open_donor(GOLDENS.parent / "vit" / "hf_deit_teacher", families())
    with pytest.raises(InputError, match="transformers had no Flax DeiT"):
        convert(donor, tmp_path / "out", "flax", verify=False)


def test_the_config_of_torch_serves(tmp_path):
    """A folder with weights of both libraries has one config, that of torch."""
    shutil.copytree(GOLDENS / "autoencoder", tmp_path / "both")
    file = tmp_path / "both" / "config.json"
    write_json(file, read_json(file) | {"_class_name": "AutoencoderKL", "use_quant_conv": True})
    assert open_donor(tmp_path / "both", families()).cfg == open_donor(GOLDENS / "autoencoder", families()).cfg


def test_the_message_does_not_say_verified():
    check = Check(True, f"transformers{RENAMED}", max_error=1e-7, cosine=1.0)
    said = "checked against transformers, with tensors renamed here: largest relative error 1.0e-07, cosine 1.000000"
    assert check.sentence() == said


@pytest.mark.parametrize(
    ("files", "kinds"),
    [
        (["flax_model.msgpack", "config.json"], {"*.msgpack", "*.msgpack.index.json"}),
        (["flax_model.msgpack", "pytorch_model.bin"], set(KINDS[1])),
        (["flax_model.msgpack", "model.safetensors"], {"*.safetensors", "*.safetensors.index*.json"}),
    ],
)
def test_flax_is_fetched_where_a_repository_has_nothing_else(files, kinds, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision: files)
    fetched = lambda name, revision, allow_patterns: asked.append(allow_patterns) or str(tmp_path)  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert locate("hf:org/name") == tmp_path
    assert set(asked[0]) - {"*.json", "*.txt", "*.model"} == kinds
