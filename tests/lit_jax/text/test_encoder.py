"""Prompts through an encoder whose weights stay in their files, and the cache of features."""

import shutil

import numpy as np
import pytest

from heirloom.common.errors import InputError
from heirloom.common.files import write_json
from heirloom.common.methods import locate_any
from heirloom.common.nn.functional import functional
from lit_jax.text import encoder as text
from lit_jax.text.encoder import open_text
from lit_jax.text.t5 import T5Encoder

PROMPTS = ["a red fox", "", "a photo of a cat " * 4, "a red fox"]


def test_features_are_those_of_the_whole_model(pipeline, small_t5):
    cfg, params = small_t5
    steps = []
    features, mask = open_text(pipeline(), tokens=70).encode(PROMPTS, lambda *step: steps.append(step))
    assert features.shape == (4, 70, 24) and features.dtype == np.float32 and steps == [(1, 3), (2, 3), (3, 3)]
    ids, real = open_text(pipeline("float16"), tokens=70).tokenizer(PROMPTS, 70)
    np.testing.assert_array_equal(mask, real)
    whole = np.asarray(functional(T5Encoder, cfg).apply(params, ids, real))
    np.testing.assert_allclose(features[mask], whole[mask], rtol=0, atol=2e-6)
    assert not features[~mask].any() and np.array_equal(features[0], features[3])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_streamed_and_resident_are_the_same_bits(dtype, pipeline):
    folder = pipeline(dtype)
    streamed = open_text(folder, tokens=40).encode(PROMPTS[:2])
    resident = open_text(folder, tokens=40, resident=True)
    for _ in range(2):
        np.testing.assert_array_equal(resident.encode(PROMPTS[:2]).features, streamed.features)


def test_narrow_weights_are_multiplied_as_they_are(pipeline, small_t5):
    """The features of bfloat16 weights are those of the same numbers in float32."""
    cfg, params = small_t5
    found, mask = open_text(pipeline("bfloat16"), tokens=40).encode(PROMPTS[:2])
    rounded = {path: np.asarray(value, "bfloat16").astype(np.float32) for path, value in params.items()}
    ids, _ = open_text(pipeline("float32"), tokens=40).tokenizer(PROMPTS[:2], 40)
    whole = np.asarray(functional(T5Encoder, cfg).apply(rounded, ids, mask))
    np.testing.assert_allclose(found[mask], whole[mask], rtol=0, atol=2e-4)
    exact = np.asarray(functional(T5Encoder, cfg).apply(params, ids, mask))
    assert np.abs(exact[mask] - whole[mask]).max() > 10 * np.abs(found[mask] - whole[mask]).max()


def test_a_run_stands_for_its_weights(tmp_path):
    embedded = locate_any("embedded:emoji")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="has no model yet"):
        open_text(tmp_path, tokens=16)
    shutil.copytree(embedded, tmp_path / "model")
    of_run, of_folder = (open_text(path, tokens=16).encode(PROMPTS[:2]) for path in (tmp_path, embedded))
    np.testing.assert_array_equal(of_run.features, of_folder.features)


def test_prompts_of_one_length_are_computed_together_up_to_a_number_of_tokens():
    rows = [text.Row((0,) * n, n) for n in (3, 40, 300, 32, 299, 33, 70)]
    groups = list(text._groups(rows, 300))
    assert groups == [([0, 3], 32), ([1, 5], 64), ([6], 96), ([2, 4], 300)]
    many = list(text._groups([text.Row((0,) * 100, 100)] * 20, 300))
    assert [len(group) for group, length in many] == [8, 8, 4] and {length for _, length in many} == {128}


def test_features_that_are_not_finite_are_refused(pipeline, small_t5):
    params = {path: value.copy() for path, value in small_t5[1].items()}
    params["blocks/mlp/down/kernel"][1, 3, 4] = np.inf
    with pytest.raises(InputError, match=r"features of 'a red fox' are not finite; .*text_encoder is damaged"):
        open_text(pipeline(params=params), tokens=20).encode(["a red fox"])


def test_a_cached_prompt_needs_no_weights(pipeline, tmp_path, monkeypatch):
    folder, cache = pipeline(), tmp_path / "cache"
    first = open_text(folder, tokens=40, cache=cache).encode(PROMPTS)
    assert len(list(cache.iterdir())) == 3

    def refuse(*_):
        raise AssertionError("the weights were opened")

    monkeypatch.setattr(text, "open_donor", refuse)
    again = open_text(folder, tokens=40, cache=cache).encode(PROMPTS)
    np.testing.assert_array_equal(again.features, first.features)
    longer = open_text(folder, tokens=60, cache=cache).encode(PROMPTS[:2])  # the length of the padding does not count
    np.testing.assert_array_equal(longer.features[:, :40], first.features[:2])
    with pytest.raises(AssertionError, match="the weights were opened"):
        open_text(folder, tokens=40, cache=cache).encode(["another fox"])


def test_features_of_other_weights_are_not_taken_from_the_cache(pipeline, small_t5, tmp_path):
    cache = tmp_path / "cache"
    first = open_text(pipeline(), tokens=20, cache=cache).encode(["a fox"]).features
    other = {path: value * 2 for path, value in small_t5[1].items()}
    folder = pipeline("bfloat16", params=other)
    second = open_text(folder, tokens=20, cache=cache).encode(["a fox"]).features
    assert len(list(cache.iterdir())) == 2 and np.abs(first - second).max() > 0.1


def test_a_damaged_file_of_the_cache_is_replaced(pipeline, tmp_path, remarks):
    folder, cache = pipeline(), tmp_path / "cache"
    first = open_text(folder, tokens=20, cache=cache).encode(["a fox"]).features
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    np.testing.assert_array_equal(open_text(folder, tokens=20, cache=cache).encode(["a fox"]).features, first)
    assert remarks() == [f"{file}: damaged, so the prompt is encoded again and the file replaced"]
    assert file.read_bytes() == whole and len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_refused(pipeline, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="features cannot be kept here"):
        open_text(pipeline(), tokens=20, cache=tmp_path / "file" / "cache").encode(["a fox"])


def test_sources(pipeline, tmp_path):
    folder = pipeline()
    expected = open_text(folder, tokens=20).encode(["a fox"]).features
    np.testing.assert_array_equal(open_text(folder / "text_encoder", tokens=20).encode(["a fox"]).features, expected)
    alone = tmp_path / "alone"
    shutil.copytree(folder / "text_encoder", alone)
    with pytest.raises(InputError, match=r"alone has no tokenizer .* name the folder that has"):
        open_text(alone)
    named = open_text(alone, tokens=20, tokenizer=folder / "tokenizer").encode(["a fox"]).features
    np.testing.assert_array_equal(named, expected)
    with pytest.raises(InputError, match="nowhere does not exist"):
        open_text(tmp_path / "nowhere")


def test_a_tokenizer_with_more_tokens_than_the_table_is_refused(pipeline):
    folder = pipeline()
    write_json(folder / "tokenizer" / "tokenizer_config.json", {"extra_ids": 300})
    with pytest.raises(InputError, match=r"has 160 tokens, and its tokenizer \d+: they do not belong together"):
        open_text(folder, tokens=20).encode(["a fox"])


def test_the_features_of_padding_are_computed_where_they_are_asked_for(pipeline, small_t5):
    """PixArt's unconditional half reads the features of the empty text behind its end token too."""
    cfg, params = small_t5
    encoder = open_text(pipeline("float32"), tokens=40)
    found, mask = encoder.encode([PROMPTS[0], ""], padding=[""])
    ids, _ = encoder.tokenizer([""], 40)
    whole = np.asarray(functional(T5Encoder, cfg).apply(params, ids, mask[1:]))
    np.testing.assert_allclose(found[1], whole[0], rtol=1e-3, atol=1e-4)
    assert mask[1].sum() == 1 and not found[0][~mask[0]].any() and found[1].any(axis=1).all()
