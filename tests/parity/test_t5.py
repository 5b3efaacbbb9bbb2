"""T5 encoders and tokenizers that transformers makes: features, folders there and back, ids."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.checkpoint.weights import create_safetensors, open_safetensors
from heirloom.common.errors import InputError, VerificationError
from heirloom.common.files import read_json, write_json
from heirloom.common.surgery.layout import Tensor
from lit_jax.text import verify
from lit_jax.text.encoder import open_text
from lit_jax.text.layouts import FAMILY
from lit_jax.text.t5 import position_bucket
from lit_jax.text.tokenizer import T5Tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

GOLDEN = Path(__file__).parents[1] / "golden" / "t5_tokenizer"
PROMPTS = ["a photo of a red fox", "", "the big tree and the old house in the snow " * 8]
BASE = dict(vocab_size=160, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
CONFIGS = {
    "square": BASE,
    "heads wider than the width": BASE | dict(d_kv=24, num_heads=6),
    "few buckets": BASE | dict(relative_attention_num_buckets=8, relative_attention_max_distance=20, num_layers=3),
    "large epsilon": BASE | dict(layer_norm_epsilon=0.1, d_model=40, d_ff=56),
}


@pytest.fixture
def theirs(seeded, tmp_path):
    """`theirs(config, kind, **save)`: a model of transformers, saved as the folder of a pipeline; returns both."""

    def make(config=BASE, kind="T5EncoderModel", **save):
        torch.manual_seed(0)
        about = transformers.T5Config(**config, tie_word_embeddings=False, decoder_start_token_id=0)
        model = seeded(getattr(transformers, kind)(about), 0)
        model.save_pretrained(tmp_path / "pipeline" / "text_encoder", **save)
        shutil.copytree(GOLDEN, tmp_path / "pipeline" / "tokenizer")
        return model, tmp_path / "pipeline"

    return make


def features_of(model, ids, mask):
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long())
    return out.last_hidden_state.float().numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_features(name, theirs):
    model, folder = theirs(CONFIGS[name])
    encoder = open_text(folder, tokens=120)
    features, mask = encoder.encode(PROMPTS)
    assert sorted(mask.sum(1))[0] == 1 and mask.sum(1).max() > 80
    expected = features_of(model, encoder.tokenizer(PROMPTS, 120).ids, mask)
    assert np.abs(features - expected)[mask].max() < 1e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_features_at_the_width_of_the_largest(theirs):
    config = dict(BASE, d_model=4096, d_kv=64, num_heads=64, d_ff=10240, num_layers=2)
    model, folder = theirs(config)
    encoder = open_text(folder, tokens=40)
    features, mask = encoder.encode(PROMPTS[:2])
    expected = features_of(model, encoder.tokenizer(PROMPTS[:2], 40).ids, mask)
    assert np.abs(features - expected)[mask].max() < 1e-4 * np.abs(expected).max()


def test_bfloat16_weights_against_the_same_numbers_in_float32(theirs):
    model, folder = theirs(CONFIGS["square"])
    model.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    encoder = open_text(folder, tokens=40)
    features, mask = encoder.encode(PROMPTS[:2])
    ids = encoder.tokenizer(PROMPTS[:2], 40).ids
    error = lambda expected: np.abs(features - expected)[mask].max() / np.abs(expected).max()  # noqa: E731
    narrow, wide = features_of(model, ids, mask), features_of(model.float(), ids, mask)
    assert error(wide) < 1e-4 < 1e-3 < error(narrow)


@pytest.mark.parametrize("buckets, furthest", [(32, 128), (8, 20), (64, 300), (16, 50)])
def test_buckets(buckets, furthest):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = np.arange(-600, 601)
    expected = T5Attention._relative_position_bucket(torch.from_numpy(distance), True, buckets, furthest)
    np.testing.assert_array_equal(position_bucket(distance, buckets, furthest), expected.numpy())


@pytest.mark.parametrize("save", [dict(), dict(max_shard_size="40KB")], ids=["one file", "shards"])
def test_there_and_back(save, theirs, tmp_path):
    _, folder = theirs(**save)
    source = folder / "text_encoder"
    assert (source / "model.safetensors.index.json").is_file() == bool(save)
    ours = convert(open_donor(source, [FAMILY]), tmp_path / "ours", "heirloom")
    back = convert(open_donor(tmp_path / "ours", [FAMILY]), tmp_path / "back", "hf")
    for check in (ours, back):
        assert check.passed and check.reference == "transformers" and 0 < check.max_error < 1e-5 and not check.note
    tensors = {key: t for file in source.glob("*.safetensors") for key, t in open_safetensors(file).items()}
    written = open_safetensors(tmp_path / "back" / "model.safetensors")
    assert written.keys() == tensors.keys() == {*written}
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor)
    (loaded, info) = transformers.T5EncoderModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and loaded.config.dense_act_fn == "gelu_new"
    for name in ("ours", "back"):  # the tokenizer of the pipeline came along
        assert open_text(tmp_path / name, tokens=20).encode(["a fox"]).mask.sum() > 1


def test_of_a_large_encoder_the_first_layers_are_compared(theirs, tmp_path, monkeypatch):
    _, folder = theirs(CONFIGS["few buckets"])
    monkeypatch.setattr(verify, "LARGE", 1000)
    check = convert(open_donor(folder / "text_encoder", [FAMILY]), tmp_path / "ours", "heirloom")
    assert check.passed and check.sentence().endswith("the first 2 of 3 layers and the final norm")


def test_of_a_whole_t5_the_encoder_is_taken(theirs, tmp_path, remarks):
    model, folder = theirs(kind="T5ForConditionalGeneration")
    encoder = open_text(folder, tokens=40)
    features, mask = encoder.encode(PROMPTS[:2])
    assert [text for text in remarks() if "a whole T5: its decoder (" in text]
    expected = features_of(model.get_encoder(), encoder.tokenizer(PROMPTS[:2], 40).ids, mask)
    assert np.abs(features - expected)[mask].max() < 1e-4 * np.abs(expected).max()
    assert convert(open_donor(folder / "text_encoder", [FAMILY]), tmp_path / "ours", "heirloom").passed


def rewritten(folder, change):
    """Writes the tensors of a folder again after `change(tensors)`."""
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {key: np.array(value) for key, value in open_safetensors(file).items()}
    change(tensors)
    with create_safetensors(file, {key: Tensor(t.shape, t.dtype) for key, t in tensors.items()}) as out:
        for key, value in tensors.items():
            out[key][...] = value
    return folder / "text_encoder"


def test_the_table_under_its_other_name_or_both(theirs):
    _, folder = theirs()
    expected = open_text(folder, tokens=20).encode(["a fox"]).features
    other, table = "encoder.embed_tokens.weight", "shared.weight"
    rewritten(folder, lambda t: t.update({other: t[table]}))
    np.testing.assert_array_equal(open_text(folder, tokens=20).encode(["a fox"]).features, expected)
    rewritten(folder, lambda t: t.pop(table))
    np.testing.assert_array_equal(open_text(folder, tokens=20).encode(["a fox"]).features, expected)
    source = rewritten(folder, lambda t: t.update({table: t[other] + 1}))
    with pytest.raises(InputError, match=r"'shared.weight' and 'encoder.embed_tokens.weight' differ, and a T5 has one"):
        open_donor(source, [FAMILY])


def test_float16_is_read_and_not_written_for_others(theirs, tmp_path):
    _, folder = theirs()
    wide = open_text(folder, tokens=20).encode(["a fox"]).features
    source = rewritten(folder, lambda t: t.update({key: value.astype(np.float16) for key, value in t.items()}))
    narrow = open_text(folder, tokens=20).encode(["a fox"]).features
    assert 0 < np.abs(wide - narrow).max() < 0.02 * np.abs(wide).max()
    convert(open_donor(source, [FAMILY]), tmp_path / "ours", "heirloom")
    with pytest.raises(InputError, match="is in float16, in which a T5 overflows in other libraries"):
        convert(open_donor(tmp_path / "ours", [FAMILY]), tmp_path / "back", "hf")
    assert not (tmp_path / "back").exists()


CHANGES = {
    "model_type": ("umt5", "only models where it is 't5' or 'mt5' can be read"),
    "feed_forward_proj": ("relu", "the first T5, of 2019, has no gate"),
    "dense_act_fn": ("gelu", "only models where it is 'gelu_new'"),
    "num_layers": (3, "num_layers is 3, and the weights have 2; is it the config of another model?"),
    "num_heads": (8, "num_heads is 8, and the weights have 4"),
    "d_kv": (8, "d_kv is 8, and the weights have 16"),
    "quantization_config": ({"bits": 8}, "quantization_config is {'bits': 8}; take the checkpoint that was quantised"),
    "is_decoder": (True, "is_decoder is True"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_another_config_is_refused(field, theirs):
    _, folder = theirs()
    file = folder / "text_encoder" / "config.json"
    value, message = CHANGES[field]
    write_json(file, read_json(file) | {field: value})
    with pytest.raises(InputError) as error:
        open_donor(file.parent, [FAMILY])
    assert message in str(error.value) and str(file) in str(error.value)


def test_a_bare_file_says_what_was_guessed(theirs, tmp_path, remarks):
    _, folder = theirs()
    expected = open_text(folder, tokens=20).encode(["a fox"]).features
    shutil.copy(folder / "text_encoder" / "model.safetensors", tmp_path / "t5.safetensors")
    remarks()
    bare = open_text(tmp_path / "t5.safetensors", tokens=20, tokenizer=folder / "tokenizer")
    np.testing.assert_array_equal(bare.encode(["a fox"]).features, expected)
    guesses = [text.partition(": ")[2].partition(":")[0] for text in remarks()]
    assert guesses == ["max_distance = 128 is a guess", "eps = 1e-06 is a guess"]


def test_relatives_are_refused_by_name(theirs, tmp_path):
    _, folder = theirs(BASE | dict(feed_forward_proj="relu"))
    with pytest.raises(InputError, match="the first T5, of 2019, whose MLP has no gate"):
        open_donor(folder / "text_encoder", [FAMILY])
    config = transformers.UMT5Config(**BASE)
    transformers.UMT5EncoderModel(config).save_pretrained(tmp_path / "umt5")
    with pytest.raises(InputError, match="a umT5, with a table of positions in every layer"):
        open_donor(tmp_path / "umt5", [FAMILY])


def test_another_model_fails_the_verification(theirs, tmp_path, monkeypatch):
    _, folder = theirs()
    transformers_ = verify._transformers
    monkeypatch.setattr(verify, "_transformers", lambda *given: transformers_(*given) * 2)
    with pytest.raises(VerificationError, match="features differ from those of transformers by 5"):
        convert(open_donor(folder / "text_encoder", [FAMILY]), tmp_path / "ours", "heirloom")


@pytest.mark.filterwarnings("ignore:the prompt")
def test_ids_are_those_of_transformers(tmp_path):
    ours = T5Tokenizer.load(GOLDEN)
    ours.save(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 100})
    tokenizer = transformers.T5Tokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    texts = [text for text, _ in json.loads((GOLDEN / "expected.json").read_text())["ids"]]
    texts += ["a </s> cat", "<extra_id_3>fox", "fox " * 99]
    for tokens in (200, 9):
        expected = tokenizer(texts, padding="max_length", truncation=True, max_length=tokens, return_tensors="np")
        for loaded in (ours, T5Tokenizer.load(tmp_path), T5Tokenizer.load(tmp_path / "saved")):
            ids, mask = loaded(texts, tokens)
            np.testing.assert_array_equal(ids, expected["input_ids"])
            np.testing.assert_array_equal(mask, expected["attention_mask"])
