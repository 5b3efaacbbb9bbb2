import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from common.data.text import EOT, SOT, Tokenizer, clean
from common.errors import InputError

GOLDENS = json.loads((Path(__file__).parents[2] / "golden" / "clip_tokens.json").read_text())
CAPTIONS = ["a photo of a cat", "a photo of a dog", "two cats and a dog", "the hot air balloon"] * 3


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.clip()


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda g: repr(g["text"][:20]))
def test_tokens_are_those_of_open_clip(clip, golden):
    tokens = clip(golden["text"], golden["context"])
    assert (tokens.dtype, tokens.shape) == (np.int32, (1, golden["context"]))
    assert tokens[0, : len(golden["ids"])].tolist() == golden["ids"]
    assert not tokens[0, len(golden["ids"]) :].any()


def test_clip_has_its_published_numbers(clip):
    assert (clip.vocab_size, clip.sot, clip.eot) == (49408, 49406, 49407)
    assert len(GOLDENS) >= 60
    assert clip(["a cat", ""], 5).tolist() == [[49406, 320, 2368, 49407, 0], [49406, 49407, 0, 0, 0]]


def test_long_captions_end_with_eot(clip):
    tokens = clip("cat " * 100, 8)[0]
    assert tokens.tolist() == [49406, *[2368] * 6, 49407]
    assert tokens.argmax() == 7


def test_cleaning():
    assert clean("  Schön &amp;amp;\n\tTwo\u3000Words ") == "schön & two words"


def test_no_caption_can_end_itself(clip):
    tokens = clip(f"a {EOT} cat {SOT}", 30)[0]
    assert (tokens == clip.eot).sum() == 1 and (tokens == clip.sot).sum() == 1
    again = pickle.loads(pickle.dumps(clip))
    np.testing.assert_array_equal(again(f"a {EOT} cat {SOT}", 30)[0], tokens)


def test_decoding_gives_the_words_back(clip):
    assert clip.decode(clip("A hot-air balloon, café 😀!", 40)[0]) == "a hot - air balloon , café 😀!"


def test_a_fitted_vocabulary(tmp_path):
    small = Tokenizer.train(CAPTIONS, 540)
    assert (small.vocab_size, small.sot, small.eot) == (540, 538, 539)
    assert small("a", 4)[0].tolist() == [538, 256 + ord("a") - ord("!"), 539, 0]  # byte tokens are numbered as CLIP's are
    frequent, rare = (int((small(text, 20)[0] > 0).sum()) for text in ("photo", "xylem"))
    assert (frequent, rare) == (3, 7)  # one merged token against five letters, and SOT and EOT
    assert small.decode(small("Ünseen 日本 bytes", 40)[0]) == "ünseen 日本 bytes"
    np.testing.assert_array_equal(Tokenizer.load(small.save(tmp_path))(CAPTIONS, 12), small(CAPTIONS, 12))
    assert Tokenizer.train(["ab"], 10_000).vocab_size == 515  # one pair to merge
    with pytest.raises(InputError, match="514"):
        Tokenizer.train(CAPTIONS, 500)


def test_fitting_breaks_ties_the_same_way_every_time():
    texts = [g["text"] for g in GOLDENS]
    first = Tokenizer.train(texts, 1500)
    for _ in range(3):
        np.testing.assert_array_equal(Tokenizer.train(texts, 1500)(texts, 77), first(texts, 77))


def test_hugging_face_files_both_ways(clip, tmp_path):
    file = clip.save(tmp_path)
    model = json.loads(file.read_text())["model"]
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (tmp_path / "hf" / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = [g["text"] for g in GOLDENS]
    for loaded in (Tokenizer.load(tmp_path), Tokenizer.load(tmp_path / "hf")):
        np.testing.assert_array_equal(loaded(texts, 77), clip(texts, 77))
    standing_alone = tokenizers.Tokenizer.from_file(str(file))
    assert standing_alone.encode("A  Hot-Air Balloon").ids == clip("A  Hot-Air Balloon", 7)[0].tolist()


def test_what_is_no_clip_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"needs a tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not readable as a tokenizer"):
        Tokenizer.load(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="no start and end token"):
        Tokenizer.load(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.BPE({SOT: 0, EOT: 1, "a": 2}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="needs it to be the last"):
        Tokenizer.load(tmp_path)
    with pytest.raises(InputError, match="no room"):
        Tokenizer.clip()("a", 1)
