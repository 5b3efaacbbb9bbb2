"""Checkpoints of transformers and open_clip: what those libraries compute, and the way back bit for bit."""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.weights import create_safetensors, open_safetensors
from heirloom.common.errors import InputError, VerificationError
from heirloom.common.files import read_json, sha256
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.layout import Tensor
from tinyclip_jax import layouts, open_clip_folder
from tinyclip_jax.formats import FORMATS
from tinyclip_jax.model import Clip, ClipConfig, ImageConfig, TextConfig
from tinyclip_jax.zoo import FAMILY

CHECKPOINTS = ("hf_quick_gelu", "hf_gelu", "open_clip_f16")
FILES = {"hf": "model.safetensors", "open_clip": "open_clip_model.safetensors"}


@pytest.fixture(scope="module")
def opened(goldens, families):
    """Of one golden: the donor, the inputs, and what the reference made of them."""

    @cache
    def open_golden(name):
        arrays = dict(np.load(goldens / name / "expected.npz"))
        return (
            open_donor(goldens / name, families),
            arrays.pop("images").astype(np.float32) / 64,
            arrays.pop("tokens"),
            arrays,
        )

    return open_golden


def run(cfg, donor, images, tokens):
    params = {path: np.asarray(view, np.float32) for path, view in donor.source.values.items()}
    return jax.jit(functional(Clip, cfg).apply)(params, images, tokens)


def relative(got, expected):
    return float(np.abs(np.asarray(got) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_features_and_logits_are_the_references(name, opened):
    donor, images, tokens, expected = opened(name)
    got = run(donor.cfg, donor, images, tokens)
    # The reference and we add in another order; 1e-4 is the bound for whole models, 1e-5 what is reached.
    assert relative(got.image, expected["image"]) < 1e-5
    assert relative(got.text, expected["text"]) < 1e-5
    assert relative(got.scale * got.image @ got.text.T, expected["logits"]) < 1e-5


@pytest.mark.parametrize(
    ("name", "image", "text"),
    [
        ("hf_quick_gelu", dict(activation="gelu"), dict()),
        ("hf_gelu", dict(eps=1e-2), dict(eps=1e-2)),
        ("hf_gelu", dict(activation="gelu_tanh"), dict(eot=None)),
        ("open_clip_f16", dict(activation="gelu"), dict(activation="gelu")),
    ],
)
def test_the_goldens_tell_a_wrong_config(name, image, text, opened):
    """What the comparison above would miss is not tested by it: each of these is seen, in the tower it is in."""
    donor, images, tokens, expected = opened(name)
    cfg = replace(donor.cfg, image=replace(donor.cfg.image, **image), text=replace(donor.cfg.text, **text))
    got = run(cfg, donor, images, tokens)
    assert relative(got.image, expected["image"]) > 1e-4
    assert relative(got.text, expected["text"]) > 1e-4 if text else relative(got.text, expected["text"]) < 1e-5


def test_the_goldens_tell_a_wrong_number_of_heads(goldens, families, opened):
    """Heads do not show in the shapes of the files."""
    _, images, tokens, expected = opened("hf_quick_gelu")
    donor = open_donor(goldens / "hf_quick_gelu", families, image_heads=8, text_heads=4)
    got = run(donor.cfg, donor, images, tokens)
    assert relative(got.image, expected["image"]) > 1e-2 and relative(got.text, expected["text"]) > 1e-2


def test_configs_are_read_from_the_words_of_each_library(opened):
    hf, other, half = (opened(name)[0].cfg for name in CHECKPOINTS)
    image = ImageConfig(size=32, patch=8, width=32, layers=3, heads=4, hidden=96, activation="quick_gelu")
    text = TextConfig(context=12, vocab=64, width=16, layers=2, heads=2, hidden=48, activation="quick_gelu")
    assert hf == ClipConfig(image, text, joint=24)  # the legacy id 2 means the largest
    exact = replace(image, activation="gelu", eps=1e-6)
    assert other == ClipConfig(exact, replace(text, activation="gelu", eps=1e-6, eot=40), joint=24)
    assert half == ClipConfig(replace(image, layers=2), replace(text, layers=3), joint=24)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_conversion_there_and_back_keeps_every_bit(name, goldens, opened, families, tmp_path):
    donor, *_ = opened(name)
    convert(donor, tmp_path / "ours", "heirloom", verify=False)
    ours = open_donor(tmp_path / "ours", families)
    assert (ours.format, ours.cfg) == ("heirloom", donor.cfg)
    convert(ours, tmp_path / "back", donor.format, verify=False)
    original, back = (open_safetensors(folder / FILES[donor.format]) for folder in (goldens / name, tmp_path / "back"))
    assert original.keys() == back.keys()
    for key, value in original.items():
        assert (back[key].dtype, back[key].shape) == (value.dtype, value.shape)
        assert back[key].tobytes() == value.tobytes(), key
    assert open_donor(tmp_path / "back", families).cfg == donor.cfg


def test_our_folder_is_plain_safetensors_and_json(opened, tmp_path):
    from safetensors.numpy import load_file

    donor, *_ = opened("hf_gelu")
    check = convert(donor, tmp_path / "ours", "heirloom")
    written = {file.name for file in (tmp_path / "ours").iterdir()}
    assert check.passed and written >= {
        "model.safetensors",
        "config.json",
        "provenance.json",
        "verify.json",
        "preprocess.json",
    }
    loaded = load_file(tmp_path / "ours" / "model.safetensors")
    assert loaded.keys() == donor.source.spec.keys()
    for path, view in donor.source.values.items():
        np.testing.assert_array_equal(loaded[path], np.asarray(view))
    assert loaded["image/blocks/attn/query/kernel"].shape == (3, 32, 4, 8)
    record = read_json(tmp_path / "ours" / "provenance.json")
    assert record["fraction"] == 1.0 and record["unused"] == []
    query = record["parameters"]["image/blocks/attn/query/kernel"]
    assert query["source"] == "model.safetensors:vision_model.encoder.layers.{layer}.self_attn.q_proj.weight"
    assert read_json(tmp_path / "ours" / "config.json")["method"] == "tinyclip"
    saved = read_json(tmp_path / "ours" / "verify.json")
    assert saved["passed"] is True and saved["source"] == {"model.safetensors": sha256(donor.file)}


def test_a_model_open_clip_cannot_say_is_refused(opened, tmp_path):
    donor, *_ = opened("hf_gelu")
    other = replace(donor.cfg, text=replace(donor.cfg.text, activation="quick_gelu"))
    with pytest.raises(InputError, match="quick_gelu in both towers or in none, this model has gelu in the image"):
        convert(replace(donor, cfg=other), tmp_path / "out", "open_clip", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_eps_and_the_pooled_token_are_written_for_open_clip(opened, families, tmp_path):
    donor, *_ = opened("hf_gelu")  # eps 1e-6, pooled at id 40
    convert(donor, tmp_path / "out", "open_clip", verify=False)
    assert open_donor(tmp_path / "out", families).cfg == donor.cfg


def test_the_ratio_written_for_open_clip_gives_the_hidden_units(tmp_path):
    cfg = ClipConfig(ImageConfig(width=704, heads=11, hidden=1920), TextConfig(width=704, heads=11, hidden=1920))
    open_clip_folder.write(cfg, tmp_path)  # 704 * (1920 / 704) is 1919.99...
    model = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]
    towers = (model["vision_cfg"], model["text_cfg"])
    assert [int(tower["width"] * tower["mlp_ratio"]) for tower in towers] == [1920, 1920]


def test_heads_that_shapes_cannot_tell_are_refused_by_the_original_format(opened, tmp_path):
    pytest.importorskip("torch")  # the format is torch's
    donor, *_ = opened("hf_quick_gelu")
    with pytest.raises(InputError, match="the original layout needs 64"):
        convert(donor, tmp_path / "out", "original", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_a_bare_open_clip_file_says_that_its_heads_are_unknown(goldens, families, tmp_path):
    shutil.copy(goldens / "open_clip_f16" / "open_clip_model.safetensors", tmp_path / "bare.safetensors")
    with pytest.raises(
        InputError, match=r"0 heads do not divide a width of 32: set the number of heads \(image_heads, text_heads\)"
    ):
        open_donor(tmp_path / "bare.safetensors", families)
    with pytest.raises(
        InputError, match=r"0 heads do not divide a width of 32: set the number of heads \(image_heads, text_heads\)"
    ):
        open_donor(tmp_path / "bare.safetensors", families, activation="quick_gelu")
    donor = open_donor(tmp_path / "bare.safetensors", families, activation="quick_gelu", image_heads=4, text_heads=2)
    assert donor.cfg == open_donor(goldens / "open_clip_f16", families).cfg


def test_what_fails_verification_gets_no_name(opened, tmp_path):
    from heirloom.common.checkpoint.convert import Check

    donor, *_ = opened("hf_gelu")
    broken = replace(
        donor.family, verify=lambda *_: Check(passed=False, reference="transformers.CLIPModel", max_error=0.25)
    )
    with pytest.raises(VerificationError) as error:
        convert(replace(donor, family=broken), tmp_path / "out", "heirloom")
    assert (
        str(error.value)
        == f"{tmp_path / 'out'} was not written: features differ from those of transformers.CLIPModel by 2.5e-01"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_does_not_come_back_fails_verification(opened, tmp_path):
    donor, *_ = opened("hf_gelu")

    def spoil(donor, destination, format):
        with (destination / "model.safetensors").open("r+b") as file:
            file.seek(-4, 2)
            last = file.read(1)
            file.seek(-4, 2)
            file.write(bytes([last[0] ^ 1]))

    with pytest.raises(VerificationError, match="is not read back as it was written"):
        convert(replace(donor, family=replace(donor.family, sidecars=spoil)), tmp_path / "out", "heirloom")
    assert list(tmp_path.iterdir()) == []


def test_without_torch_the_check_says_what_it_did_not_do(opened, tmp_path, monkeypatch):
    monkeypatch.setattr("heirloom.common.checkpoint.verify.importable", lambda *names: False)
    donor, *_ = opened("hf_gelu")
    check = convert(donor, tmp_path / "out", "heirloom")
    assert check.passed and check.reference is None and check.max_error is None
    assert "structure and finiteness only" in check.note


def test_features_that_are_not_finite_fail_without_any_reference(opened, families, tmp_path):
    donor, *_ = opened("hf_gelu")
    values = {path: np.array(view) for path, view in donor.source.values.items()}
    values["image/projection/kernel"][0, 0] = np.nan
    check = donor.family.verify(donor.cfg, values, donor.file, "heirloom")
    assert not check.passed and check.note == "features are not finite"


def test_older_releases_saved_position_ids_too(goldens, families, tmp_path):
    folder = Path(shutil.copytree(goldens / "hf_quick_gelu", tmp_path / "old"))
    tensors = {key: np.array(value) for key, value in open_safetensors(folder / "model.safetensors").items()}
    tensors["text_model.embeddings.position_ids"] = np.arange(12)[None]
    tensors["vision_model.embeddings.position_ids"] = np.arange(17)[None]
    write(folder / "model.safetensors", tensors)
    donor = open_donor(folder, families)
    assert np.asarray(donor.source.values["image/position"]).shape == (4, 4, 32)


def test_shards_are_one_checkpoint(goldens, families, tmp_path):
    """transformers' index names the shard of each tensor."""
    tensors = {
        key: np.array(value) for key, value in open_safetensors(goldens / "hf_quick_gelu" / "model.safetensors").items()
    }
    shutil.copy(goldens / "hf_quick_gelu" / "config.json", tmp_path)
    names = {key: f"model-{1 + i % 3:05}-of-00003.safetensors" for i, key in enumerate(tensors)}
    for shard in set(names.values()):
        write(tmp_path / shard, {key: value for key, value in tensors.items() if names[key] == shard})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    whole, sharded = open_donor(goldens / "hf_quick_gelu", families), open_donor(tmp_path, families)
    for path, value in whole.source.values.items():
        np.testing.assert_array_equal(np.asarray(sharded.source.values[path]), np.asarray(value))
    check = convert(sharded, tmp_path / "ours", "heirloom", verify=False)
    assert check.passed and len(read_json(tmp_path / "ours" / "verify.json")["source"]) == 3
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"the shard model-00002-of-00003\.safetensors is missing"):
        open_donor(tmp_path, families)


def write(file: Path, tensors):
    with create_safetensors(file, {key: Tensor(value.shape, value.dtype) for key, value in tensors.items()}) as out:
        for key, value in tensors.items():
            out[key][...] = value


configs = st.builds(
    lambda grid, patch, heads, dim, layers, text_heads, text_layers, joint: ClipConfig(
        ImageConfig(size=grid * patch, patch=patch, width=heads * dim, layers=layers, heads=heads, hidden=3 * dim),
        TextConfig(context=5, vocab=7, width=text_heads * dim, layers=text_layers, heads=text_heads, hidden=5 * dim),
        joint=joint,
    ),
    *(st.integers(1, 3) for _ in range(8)),
)


@settings(max_examples=12)
@given(
    configs,
    st.sampled_from([layouts.HF, layouts.OPEN_CLIP, layouts.ORIGINAL]),
    st.sampled_from(["float32", "float16", "bfloat16"]),
)
def test_layouts_round_trip_bit_for_bit_in_both_directions(cfg, layout, dtype):
    import ml_dtypes  # noqa: F401  (names bfloat16)

    spec = {path: replace(leaf, dtype=np.dtype(dtype)) for path, leaf in functional(Clip, cfg).spec.items()}
    rng = np.random.default_rng(0)
    # Any bits at all, not-a-numbers included, as integers of the same width.
    file = {key: random_bits(rng, t) for key, t in layout.foreign(spec).items()}
    ours = {path: np.asarray(view) for path, view in layout.view(file, spec).items()}
    assert {path: (x.shape, x.dtype) for path, x in ours.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in spec.items()
    }
    back = {key: np.zeros_like(value) for key, value in file.items()}
    for path, view in layout.view(back, spec).items():
        view.write(ours[path])
    assert {key: value.tobytes() for key, value in back.items()} == {
        key: value.tobytes() for key, value in file.items()
    }
    again = layout.view(back, spec)
    assert {path: np.asarray(again[path]).tobytes() for path in ours} == {path: x.tobytes() for path, x in ours.items()}


def random_bits(rng, tensor):
    return (
        np.frombuffer(rng.bytes(int(np.prod(tensor.shape)) * tensor.dtype.itemsize), tensor.dtype)
        .reshape(tensor.shape)
        .copy()
    )


@pytest.mark.parametrize("layout", [layouts.HF, layouts.OPEN_CLIP, layouts.ORIGINAL], ids=lambda layout: layout.name)
def test_number_of_tensors_in_each_format(layout):
    """61M/32: 12 and 9 layers. transformers keeps q, k, v apart: 16 tensors a layer, others 12; 14 outside."""
    from tinyclip_jax.zoo import STUDENTS

    spec = functional(Clip, STUDENTS["vit_61m_32"]).spec
    assert len(layout.foreign(spec)) == 14 + (12 + 9) * (16 if layout.name == "hf" else 12)


def test_every_format_has_a_name_that_family_knows():
    assert [FAMILY.format(f.name).file for f in FORMATS] == [
        "model.safetensors",
        "flax_model.msgpack",
        "open_clip_model.safetensors",
        "tinyclip.pt",
    ]
    with pytest.raises(
        InputError, match="no format 'onnx' for tinyclip models; there are heirloom, nnx, orbax, hf, flax, open_clip"
    ):
        FAMILY.format("onnx")


def test_transformers_pools_where_we_do_if_the_end_token_is_below_the_last_id(opened, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    donor, *_ = opened("hf_quick_gelu")
    assert donor.cfg.text.eot is None
    convert(donor, tmp_path / "ours", "heirloom", verify=False)
    convert(open_donor(tmp_path / "ours", [FAMILY]), tmp_path / "out", "hf", verify=False)
    tokens = np.zeros((2, donor.cfg.text.context), np.int32)
    tokens[0, :3], tokens[1, :4] = (3, 4, 9), (3, 5, 6, 9)  # no caption has the last id
    params = {path: np.asarray(view) for path, view in donor.source.values.items()}
    mine = functional(Clip, donor.cfg).apply(params, tokens, method="encode_text")
    with torch.no_grad():
        model = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
        found = model.get_text_features(torch.from_numpy(tokens).long())
    theirs = getattr(found, "pooler_output", found).numpy()
    np.testing.assert_allclose(mine, theirs / np.linalg.norm(theirs, axis=1, keepdims=True), atol=1e-5)
