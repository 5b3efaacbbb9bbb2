"""Ids of captions against transformers' tokenizer, with tokens added behind CLIP's own."""

import json
from types import SimpleNamespace

import pytest

from heirloom.common.data.text import Tokenizer
from tinyclip_jax.inputs import sidecars
from tinyclip_jax.model import ClipConfig

transformers = pytest.importorskip("transformers")
CFG = ClipConfig()
CAPTIONS = [
    "a photo of <cat-toy>",
    "A <Dog-Toy>, twice: <dog-toy><cat-toy>",
    "<SPEC>x <spec>",
    "it's 10 o'clock",
    "café  au\tlait",
    "",
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = transformers.CLIPTokenizerFast(tokenizer_file=str(Tokenizer.clip().save(folder)))
    tokenizer.add_tokens(["<cat-toy>", "<Dog-Toy>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<SPEC>"]})
    return tokenizer


def assert_the_same(ours, theirs, captions):
    for row, ids in zip(ours(captions, 30), theirs(captions)["input_ids"], strict=True):
        assert row[: len(ids)].tolist() == ids and not row[len(ids) :].any()


def test_what_transformers_saves_is_read(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert (ours.vocab_size, ours.eot) == (49411, theirs.eos_token_id)
    assert_the_same(ours, theirs, CAPTIONS)


def test_transformers_reads_what_is_saved(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Tokenizer.load(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    assert_the_same(ours, transformers.CLIPTokenizerFast(tokenizer_file=str(ours.save(tmp_path / "ours"))), CAPTIONS)


def test_other_names_of_start_and_end_are_written_for_transformers(tmp_path):
    """open_clip's vocabulary calls them <start_of_text> and <end_of_text>."""
    file = Tokenizer.clip().save(tmp_path)
    whole = file.read_text().replace("<|startoftext|>", "<start_of_text>").replace("<|endoftext|>", "<end_of_text>")
    file.write_text(whole)
    ours = Tokenizer.load(tmp_path)
    assert ours.names == ("<start_of_text>", "<end_of_text>")
    (tmp_path / "open_clip_config.json").write_text("{}")
    donor = SimpleNamespace(folder=tmp_path, format="heirloom", cfg=CFG)
    (tmp_path / "out").mkdir()
    sidecars(donor, tmp_path / "out", "hf")
    assert_the_same(ours, transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), ["a photo of a cat", ""])


@pytest.mark.parametrize("decoder", [False, True])
def test_vocabulary_and_merges_with_added_tokens(theirs, decoder, tmp_path):
    model = json.loads(theirs.backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]), encoding="utf-8"
    )
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<cat-toy>": 49408, "<Dog-Toy>": 49409}))
    if decoder:
        token = dict(content="<Dog-Toy>", normalized=True, special=False, lstrip=False, rstrip=False, single_word=False)
        about = dict(tokenizer_class="CLIPTokenizer", added_tokens_decoder={"49408": token})
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    assert_the_same(Tokenizer.load(tmp_path), transformers.CLIPTokenizer.from_pretrained(tmp_path), CAPTIONS)


@pytest.mark.parametrize("where", ["special_tokens_map.json", "tokenizer_config.json"])
def test_a_padding_token_that_is_a_word_is_found_in_captions(where, tmp_path):
    """Stable Diffusion 2 and XL pad with "!", which is then another token than the "!" of a text."""
    Tokenizer.clip().save(tmp_path)
    end = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **end}))
    about = json.loads((tmp_path / where).read_text()) if (tmp_path / where).is_file() else end
    (tmp_path / where).write_text(json.dumps({**about, "pad_token": "!"}))
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    captions = ["a cat!", "Hello, World!!! It's", "! !", "a dog"]
    assert_the_same(ours, theirs, captions)
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    assert (Tokenizer.load(tmp_path / "saved")(captions, 20) == ours(captions, 20)).all()


@pytest.mark.parametrize("decoder", [False, True])
def test_special_tokens_are_those_of_the_file_that_counts(decoder, tmp_path):
    """The map without an added_tokens_decoder, else the config; further special tokens have an id."""
    model = json.loads(Tokenizer.clip()._bpe.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]))
    end = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    known = {49406: "<|startoftext|>", 49407: "<|endoftext|>", 49408: "<x-y>"}
    tokens = {str(i): dict(content=token, special=True, normalized=False) for i, token in known.items()}
    about = dict(tokenizer_class="CLIPTokenizer", **end, pad_token="<|endoftext|>", extra_special_tokens=["<x-y>"])
    about |= {"added_tokens_decoder": tokens} if decoder else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({**end, "pad_token": "!"}))
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_the_same(ours, theirs, ["a cat!", "a <x-y> and x-y", "! !"])
