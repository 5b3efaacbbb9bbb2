"""T5's tokenizer against SentencePiece's own ids, and its files in every form and state."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from heirloom.common.errors import InputError
from heirloom.common.files import write_json
from lit_jax.text.tokenizer import T5Tokenizer, find_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden" / "t5_tokenizer"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
TEXTS = [text for text, _ in EXPECTED["ids"]]


@pytest.fixture
def spiece(tmp_path):
    shutil.copy(GOLDEN / "spiece.model", tmp_path)
    return tmp_path


@pytest.fixture
def as_json(tmp_path):
    """A folder with tokenizer.json alone, and its content."""
    folder = tmp_path / "json"
    folder.mkdir()
    T5Tokenizer.load(GOLDEN).save(folder)
    return folder, json.loads((folder / "tokenizer.json").read_text())


def ids_of(tokenizer, text):
    ids, mask = tokenizer([text], 200)
    return ids[0][mask[0]].tolist()


def test_ids_are_those_of_sentencepiece(spiece, as_json):
    for tokenizer in (T5Tokenizer.load(spiece), T5Tokenizer.load(as_json[0])):
        assert tokenizer.vocabulary == EXPECTED["size"] + 100
        for text, ids in EXPECTED["ids"]:
            assert ids_of(tokenizer, text) == ids, text


def test_padding_and_mask():
    ids, mask = T5Tokenizer.load(GOLDEN)(["", "a photo of a cat"], 12)
    assert ids.dtype == np.int32 and mask.dtype == bool
    assert ids[0].tolist() == [1] + [0] * 11 and mask[0].tolist() == [True] + [False] * 11
    assert mask[1].sum() == len(ids_of(T5Tokenizer.load(GOLDEN), "a photo of a cat")) and ids[1][mask[1]][-1] == 1


def test_half_a_character_is_replaced():
    tokenizer = T5Tokenizer.load(GOLDEN)
    assert ids_of(tokenizer, "a cat \ud83d") == ids_of(tokenizer, "a cat \ufffd")


def test_a_long_prompt_is_cut_before_its_end_and_remarked(remarks):
    tokenizer = T5Tokenizer.load(GOLDEN)
    whole = ids_of(tokenizer, "fox " * 30)
    assert remarks() == [] and len(whole) > 20
    ids, mask = tokenizer(["fox " * 30, "a"], 20)
    assert ids[0].tolist() == [*whole[:19], 1] and mask[0].all()
    assert remarks() == [
        f"the prompt 'fox fox fox fox fox fox fox fox fox f...' has {len(whole)} tokens, and the model takes 20: the"
        f" last {len(whole) - 20} are cut off"
    ]
    tokenizer(["a", "fox " * 30, *(f"{i} fox" * 30 for i in range(5))], 20)
    (said,) = remarks()
    assert said.startswith("the prompt 'fox fox") and said.endswith("off; 5 more of these 7 texts are cut, too")


def test_sentinels_are_found_and_their_number_is_read(spiece):
    size = EXPECTED["size"]
    assert ids_of(T5Tokenizer.load(spiece), "<extra_id_0>") == [size + 99, 1]
    write_json(spiece / "tokenizer_config.json", {"extra_ids": 2, "tokenizer_class": "T5Tokenizer"})
    tokenizer = T5Tokenizer.load(spiece)
    assert tokenizer.vocabulary == size + 2 and ids_of(tokenizer, "<extra_id_0>") == [size + 1, 1]


def test_tokens_added_behind_the_vocabulary(spiece):
    size = EXPECTED["size"] + 100
    write_json(spiece / "added_tokens.json", {"<extra_id_0>": size - 1, "<my-cat>": size})
    tokenizer = T5Tokenizer.load(spiece)
    assert tokenizer.vocabulary == size + 1 and size in ids_of(tokenizer, "a <my-cat>")


def test_the_tokenizer_is_found_next_to_the_encoder(tmp_path):
    for encoder, name in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        shutil.copytree(GOLDEN, tmp_path / name)
        (tmp_path / encoder).mkdir()
        assert find_tokenizer(tmp_path / encoder) == tmp_path / name
    assert find_tokenizer(tmp_path / "tokenizer") == tmp_path / "tokenizer" and find_tokenizer(tmp_path) is None


def test_decode():
    tokenizer = T5Tokenizer.load(GOLDEN)
    assert tokenizer.decode(tokenizer(["a  photo of a cat"], 30).ids[0]) == "a photo of a cat"


def lowered(content):
    content["normalizer"] = {"type": "Sequence", "normalizers": [content["normalizer"], {"type": "Lowercase"}]}


def another_end(content):
    content["model"]["vocab"][1][0] = "<eos>"


DAMAGES = {
    "lower-case": (lowered, "its normalizer has the step 'Lowercase', which T5's does not have"),
    "bytes": (lambda c: c["model"].update(byte_fallback=True), "is not T5's kind, which is Unigram without byte"),
    "kind": (lambda c: c["model"].update(type="BPE"), "is not T5's kind, which is Unigram without byte fallback"),
    "no pieces": (lambda c: c["model"].update(vocab={"a": 1}), "has no vocabulary of pieces with their scores"),
    "another end": (another_end, "the token 1 is '<eos>', and T5's is '</s>'"),
    "charsmap": (lambda c: c["normalizer"].update(precompiled_charsmap="AAAA"), "is not readable as a tokenizer"),
    "cut": (lambda c: c.update(truncation={"direction": "Left"}), "truncation: direction is 'Left'; only models where"),
    "padded": (lambda c: c.update(padding={"direction": "Left"}), "padding: direction is 'Left'; only models where it"),
    "added": (lambda c: c["added_tokens"].append({"id": 9, "content": "x"}), "the added token 'x' has id 9, "),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_another_tokenizer_json_is_refused(as_json, damage):
    folder, content = as_json
    change, message = DAMAGES[damage]
    change(content)
    write_json(folder / "tokenizer.json", content)
    with pytest.raises(InputError) as error:
        T5Tokenizer.load(folder)
    assert message in str(error.value) and str(folder) in str(error.value)


def test_a_missing_or_damaged_file_is_refused(spiece, tmp_path):
    with pytest.raises(InputError, match=r"nowhere has no tokenizer: it needs a tokenizer.json or a spiece.model"):
        T5Tokenizer.load(tmp_path / "nowhere")
    whole = (spiece / "spiece.model").read_bytes()
    for part in (whole[: len(whole) // 2], b"version https://git-lfs", b"\x00" * 99):
        (spiece / "spiece.model").write_bytes(part)
        with pytest.raises(InputError, match=r"spiece.model: not a SentencePiece file .*; fetch it again"):
            T5Tokenizer.load(spiece)
    (spiece / "spiece.model").write_bytes(b"")
    with pytest.raises(InputError, match="a SentencePiece file without a vocabulary; fetch it again"):
        T5Tokenizer.load(spiece)


def test_byt5_is_refused_by_name(spiece):
    write_json(spiece / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer"})
    with pytest.raises(InputError, match="the tokenizer of a ByT5, which reads bytes"):
        T5Tokenizer.load(spiece)


SETTINGS = {
    "add_eos_token": (False, "add_eos_token is False; only models where it is True or None can be read"),
    "padding_side": ("left", "padding_side is 'left'; only models where it is 'right' or None can be read"),
    "additional_special_tokens": (["<extra_id_0>", "fox"], "has 'fox', which has no id: give it an id in"),
    "split_special_tokens": (True, "split_special_tokens is True"),
    "eos_token": ({"content": "<end>"}, "eos_token is {'content': '<end>'}, and T5's is '</s>'"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_make_other_ids_are_refused(spiece, name):
    value, message = SETTINGS[name]
    write_json(spiece / "tokenizer_config.json", {name: value})
    with pytest.raises(InputError) as error:
        T5Tokenizer.load(spiece)
    assert message in str(error.value)
    if name == "eos_token":
        (spiece / "tokenizer_config.json").rename(spiece / "special_tokens_map.json")
        with pytest.raises(InputError, match=r"special_tokens_map.json: eos_token is .*, and T5's is '</s>'"):
            T5Tokenizer.load(spiece)


def test_prompts_must_be_a_list_of_strings():
    tokenizer = T5Tokenizer.load(GOLDEN)
    for wrong in ("a cat", [3]):
        with pytest.raises(InputError, match="prompts must be a list of strings"):
            tokenizer(wrong, 8)
    with pytest.raises(InputError, match="tokens 0 leaves no room for the end token: choose 1 or more"):
        tokenizer(["a"], 0)


def test_the_whole_pipeline_of_a_tokenizer_json_agrees(as_json):
    """What the library makes of the file by itself, special tokens aside."""
    raw = tokenizers.Tokenizer.from_file(str(as_json[0] / "tokenizer.json"))
    for text, ids in EXPECTED["ids"]:
        assert raw.encode(text).ids == ids[:-1]
