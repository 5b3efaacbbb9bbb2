"""Tokenizers of SigLIP, SigLIP 2 and MetaCLIP 2: ids, padding, cleaning, files there and back, and what is refused."""

import json
import pickle
import re
import string
from unicodedata import category

import numpy as np
import pytest
import tokenizers
from small_tokenizers import CAPTIONS, SPECIAL, SPIECE, metaclip2, siglip, siglip2
from tokenizers import normalizers

from heirloom.common.data.text import Tokenizer, clean
from heirloom.common.data.tokenizer_files import _CANONICAL, _OPEN_CLIP, load_tokenizer, same_ids
from heirloom.common.errors import InputError

GOLDEN = json.loads(SPIECE.with_name("siglip.json").read_text())
KINDS = {"siglip": siglip, "siglip2": siglip2, "metaclip2": metaclip2}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    return KINDS[kind](tmp_path)


def test_siglip_has_the_ids_of_transformers(tmp_path):
    """Spaces at an end, punctuation alone, Greek in capitals, characters that the vocabulary lacks, long captions."""
    ours = load_tokenizer(siglip(tmp_path))
    for caption, ids in GOLDEN:
        assert ours(caption, len(ids))[0].tolist() == ids, caption
    assert (ours.pad, ours.eot, ours.vocab_size) == (1, 1, 52)
    assert ours.decode(ours("A PHOTO of a Cat!", 24)[0]) == "a photo of a cat"


def test_what_is_saved_has_the_same_ids(folder, tmp_path):
    ours = load_tokenizer(folder)
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.pad, again.eot, again.starts) == (ours.pad, ours.eot, ours.starts)
    for other in (again, pickle.loads(pickle.dumps(ours)), load_tokenizer(tmp_path / "saved" / "tokenizer.json")):
        np.testing.assert_array_equal(other([*CAPTIONS, *SPECIAL], 20), ours([*CAPTIONS, *SPECIAL], 20))
        assert same_ids(other, ours)
    assert not same_ids(ours, Tokenizer.clip())


def test_a_long_caption_keeps_its_end_and_a_short_one_is_padded(folder):
    ours = load_tokenizer(folder)
    long, short = ours(["fox " * 60, "cat"], 12)
    assert long[-1] == ours.eot and (long[:-1] != ours.eot).all()
    end = short.tolist().index(ours.eot)
    assert end < 11 and (short[end + 1 :] == ours.pad).all()
    for wrong, complaint in ((b"a", "must be strings"), (7, "must be strings"), (["a", None], "caption 1")):
        with pytest.raises(InputError, match=complaint):
            ours(wrong, 12)
    with pytest.raises(InputError, match="context 1 is too small"):
        ours("a", 1)


def test_half_a_character_is_replaced_and_two_halves_are_one(folder):
    """As in JSON of captions that were cut, and in names of classes that are not UTF-8."""
    ours = load_tokenizer(folder)
    found = ours(["a cat \ud83d", "a cat \udcff", "a cat \ud83d\ude00"], 16)
    np.testing.assert_array_equal(found, ours(["a cat \ufffd", "a cat \ufffd", "a cat \U0001f600"], 16))


def test_no_caption_ends_early(folder):
    """The vocabulary of a Unigram model has "</s>", and NFKC makes one of full-width letters."""
    ours = load_tokenizer(folder)
    special = {ours.eot, *ours.starts, ours.pad}
    for caption in ("a </s> cat", "a<eos>cat", "\uff1c/s\uff1e cat", "<s><pad><bos> cat"):
        ids = ours(caption, 40)[0].tolist()
        inside = ids[len(ours.starts) : ids.index(ours.eot)]
        assert len(inside) >= 3 and not special & set(inside), caption


def test_siglip_2_lowers_captions_and_gemma_alone_is_remarked(tmp_path, remarks):
    named = load_tokenizer(siglip2(tmp_path))
    np.testing.assert_array_equal(named("A PHOTO of Two Dogs", 20), named("a photo of two dogs", 20))
    assert (named.pad, named.eot, named.starts) == (0, 1, []) and not remarks()
    gemma = load_tokenizer(siglip2(tmp_path, "GemmaTokenizerFast", do_lower_case=True))
    (said,) = remarks()
    assert same_ids(gemma, named) and said.endswith("GemmaTokenizer, which the folder names, keeps capitals")
    kept = load_tokenizer(siglip2(tmp_path, "GemmaTokenizer", do_lower_case=False))
    assert (kept("A PHOTO", 20) != kept("a photo", 20)).any() and not same_ids(kept, named)


def characters():
    """All that this Python knows; the library's Unicode may be newer."""
    return "".join(c for c in map(chr, range(1, 0x10000)) if category(c) not in ("Cn", "Cs"))


def test_cleaning_is_that_of_siglip_and_open_clip_for_every_character():
    punctuation = str.maketrans("", "", string.punctuation)
    words = " \u039f\u0394\u039f\u03a3 \u03a3 \u03a3\u0391\u03a3, a_b\x1c"
    canonical = normalizers.Sequence(_CANONICAL)
    for text in (*(f"x{c}y {c}" for c in characters()), words):
        theirs = re.sub(r"\s+", " ", text.lower().translate(punctuation))
        assert canonical.normalize_str(text) == theirs, ascii(text)
    text = characters() + words
    open_clip = " ".join(text.replace("_", " ").translate(punctuation).lower().split())
    assert normalizers.Sequence(_OPEN_CLIP["canonicalize"]).normalize_str(text) == open_clip
    assert normalizers.Sequence(_OPEN_CLIP["lower"]).normalize_str(text) == " ".join(text.split()).lower()
    assert normalizers.Sequence(_OPEN_CLIP["whitespace"]).normalize_str(text) == " ".join(text.split())


@pytest.mark.parametrize("cleaning", ["canonicalize", "lower", None])
def test_an_open_clip_folder_says_how_captions_are_cleaned(cleaning, tmp_path):
    plain = load_tokenizer(siglip2(tmp_path, "TokenizersBackend"))
    options = {} if cleaning is None else {"tokenizer_kwargs": {"clean": cleaning}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": options}}))
    ours = load_tokenizer(tmp_path)
    for caption in ("caf\u00c3\u00a9 &amp;amp; A_Photo,  of", " two\nDogs "):
        cleaned = clean(caption, lower=cleaning == "lower")
        if cleaning == "canonicalize":
            punctuation = str.maketrans("", "", string.punctuation)
            cleaned = " ".join(cleaned.replace("_", " ").translate(punctuation).lower().split())
        np.testing.assert_array_equal(ours(caption, 60), plain(cleaned, 60))
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    np.testing.assert_array_equal(load_tokenizer(tmp_path / "saved")(CAPTIONS, 30), ours(CAPTIONS, 30))


def change(name, **fields):
    def damage(folder):
        file = folder / name
        file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | fields))

    return damage


CONFIG = "tokenizer_config.json"
OPEN_CLIP = "open_clip_config.json"
EXTRA = {"200": {"content": "<x>"}}
DAMAGES = [
    ("siglip", change(CONFIG, padding_side="left"), "padding_side is left"),
    ("siglip", change(CONFIG, pad_token="<none>"), "the padding token '<none>' is not in the vocabulary"),
    ("siglip", change(CONFIG, pad_token=7), "the padding token 7 is not in the vocabulary"),
    ("siglip", change(CONFIG, eos_token="<none>"), "the end token '<none>' is not in the vocabulary"),
    ("siglip", change(CONFIG, eos_token=7), "eos_token is 7; it must be a token"),
    ("siglip", change(CONFIG, added_tokens_decoder=EXTRA), "'<x>' has id 200 in one file and would get 52"),
    ("siglip", change("added_tokens.json", **{"<x>": 52}), "adds tokens to those of spiece.model"),
    ("siglip", lambda folder: (folder / "spiece.model").write_bytes(b"no"), "not a SentencePiece file"),
    ("siglip", lambda folder: (folder / CONFIG).write_text("{"), "tokenizer_config.json"),
    ("siglip", change(CONFIG, tokenizer_class=7), "tokenizer_class is 7; it must be a name"),
    ("siglip2", change(CONFIG, add_eos_token=False), "add_eos_token is False, and tokenizer.json does otherwise"),
    ("siglip2", change(CONFIG, add_bos_token=True), "add_bos_token is True, and tokenizer.json does otherwise"),
    ("siglip2", change(CONFIG, tokenizer_class="NllbTokenizer"), "tokenizer_class is 'NllbTokenizer'; only"),
    ("siglip2", change(CONFIG, do_lower_case="yes"), "do_lower_case is 'yes', and must be true or false"),
    ("siglip2", change(CONFIG, truncation_side="left"), "truncation_side is 'left'"),
    ("siglip2", change("tokenizer.json", post_processor=None), "does not end a text with one token"),
    ("siglip2", change("tokenizer.json", normalizer={"type": "Nonsense"}), "is not readable as a tokenizer"),
    ("siglip2", change("tokenizer.json", normalizer={"type": "NFD"}), "'NFD', which Siglip2Tokenizer does not have"),
    ("siglip2", change(OPEN_CLIP, model_cfg={"text_cfg": {"tokenizer_mode": "clips"}}), "tokenizer_mode is 'clips'"),
    (
        "siglip2",
        change(OPEN_CLIP, model_cfg={"text_cfg": {"tokenizer_kwargs": {"clean": "odd"}}}),
        "clean is 'odd'; only 'whitespace', 'lower', 'canonicalize' can be read",
    ),
    (
        "siglip2",
        change(OPEN_CLIP, model_cfg={"text_cfg": {"tokenizer_kwargs": {"language": "de"}}}),
        r"the field 'language' \('de'\) is not known here and may change the tokens of a caption",
    ),
    ("metaclip2", change("tokenizer.json", model={"type": "Unigram", "vocab": []}), "not readable as a tokenizer"),
    (
        "metaclip2",
        change("tokenizer.json", pre_tokenizer={"type": "Digits", "individual_digits": True}),
        "'Digits', which XLMRobertaTokenizer does not have",
    ),
]


@pytest.mark.parametrize(("kind", "damage", "complaint"), DAMAGES)
def test_what_is_not_understood_is_refused_in_one_line(folder, damage, complaint):
    damage(folder)
    with pytest.raises(InputError, match=rf"^[^\n]*{complaint}[^\n]*$"):
        load_tokenizer(folder)


def test_padding_is_never_guessed(tmp_path):
    siglip2(tmp_path, "TokenizersBackend", pad_token=None)
    with pytest.raises(InputError, match=r"nothing says with which token captions are padded: give tokenizer_config"):
        load_tokenizer(tmp_path)
    file = str(tmp_path / "tokenizer.json")
    bpe = tokenizers.Tokenizer.from_file(file)
    bpe.enable_padding(pad_id=0, pad_token="<eos>")
    bpe.save(file)
    with pytest.raises(InputError, match="only the id of pad_token, on the right, can be read"):
        load_tokenizer(tmp_path)
    bpe.enable_padding(pad_id=0, pad_token="<pad>", length=64)
    bpe.save(file)
    assert load_tokenizer(tmp_path)("a", 6)[0, -1] == 0
