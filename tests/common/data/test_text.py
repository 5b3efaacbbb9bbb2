import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from heirloom.common.data.text import EOT, SOT, Tokenizer, clean
from heirloom.common.data.tokenizer_files import load_tokenizer
from heirloom.common.errors import InputError

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
    # byte tokens are numbered as CLIP's are
    assert small("a", 4)[0].tolist() == [538, 256 + ord("a") - ord("!"), 539, 0]
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
    with pytest.raises(InputError, match="too small for the start and end tokens"):
        Tokenizer.clip()("a", 1)
    for texts, complaint in (
        (7, "captions must be strings, not int"),
        (["a", None], "caption 1, counted from 0, is NoneType"),
    ):
        with pytest.raises(InputError, match=complaint):
            Tokenizer.clip()(texts, 8)


def test_captions_come_one_or_several(clip):
    one = clip("a cat", 5).tolist()
    for texts in (["a cat"], ("a cat",), iter(["a cat"]), np.array(["a cat"])):
        assert clip(texts, 5).tolist() == one
    assert clip([], 5).shape == (0, 5)


def with_added(clip, folder, *tokens):
    """CLIP's tokenizer.json with tokens behind its own."""
    bpe = tokenizers.Tokenizer.from_file(str(clip.save(folder)))
    for token in tokens:
        (bpe.add_special_tokens if token.special else bpe.add_tokens)([token])
    bpe.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def test_tokens_added_behind_the_end(clip, tmp_path):
    added = tokenizers.AddedToken
    more = with_added(
        clip,
        tmp_path,
        added("<cat-toy>", normalized=True),
        added("<Raw>", normalized=False),
        added("<S>", special=True, normalized=False),
    )
    assert (more.vocab_size, more.sot, more.eot, more.largest_word) == (49411, 49406, 49407, 49405)
    assert more("a <cat-toy>", 6).tolist() == [[49406, 320, 49408, 49407, 0, 0]]
    assert more("a <CAT-TOY>", 6).tolist() == [[49406, 320, 49408, 49407, 0, 0]]  # normalised like the text
    assert more(" A<Raw>cat &amp; <S>", 9).tolist() == [[49406, 320, 49409, 2368, 261, 49410, 49407, 0, 0]]
    assert more("<raw>", 5)[0, 1] == clip("<raw>", 5)[0, 1]  # found as it is written, or not at all
    assert (more(f"a {EOT} cat", 30) == more.eot).sum() == 1
    again = Tokenizer.load(more.save(tmp_path))
    for same in (again, pickle.loads(pickle.dumps(more))):
        np.testing.assert_array_equal(same("a <cat-toy> <Raw> <S>", 9), more("a <cat-toy> <Raw> <S>", 9))


def tables(clip, folder, **files):
    """CLIP's tokenizer as vocab.json and merges.txt, with further files."""
    folder.mkdir(exist_ok=True)
    model = json.loads(clip.save(folder).read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]), encoding="utf-8"
    )
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_added_tokens_of_old_files(clip, tmp_path):
    old = Tokenizer.load(tables(clip, tmp_path / "old", added_tokens={"<dog-toy>": 49409, "<cat-toy>": 49408}))
    assert old("a <dog-toy>", 5).tolist() == [[49406, 320, 49409, 49407, 0]]
    decoder = {"49408": {"content": "<Cat>", "normalized": True, "special": False}}
    files = dict(added_tokens={"<dog-toy>": 49409}, tokenizer_config={"added_tokens_decoder": decoder})
    newer = Tokenizer.load(tables(clip, tmp_path / "newer", **files))  # the decoder replaces added_tokens.json
    assert newer("a <cat>", 5).tolist() == [[49406, 320, 49408, 49407, 0]] and newer.vocab_size == 49409
    with pytest.raises(InputError, match="'<x>' has id 50000 in one file and would get 49408"):
        Tokenizer.load(tables(clip, tmp_path / "apart", added_tokens={"<x>": 50000}))


def test_the_map_counts_where_the_config_has_no_added_tokens(clip, tmp_path):
    """As in transformers: then what it says stands for what the config says."""
    end = dict(bos_token=SOT, eos_token=EOT, unk_token=EOT)
    stale = dict(special_tokens_map={**end, "pad_token": "!"})
    files = dict(tokenizer_config={**end, "pad_token": EOT}, **stale)
    assert Tokenizer.load(tables(clip, tmp_path / "map", **files))("a!", 4).tolist() == [[49406, 320, 0, 49407]]
    decoder = {"added_tokens_decoder": {"49406": {"content": SOT}, "49407": {"content": EOT}}}
    files = dict(tokenizer_config={**end, **decoder, "pad_token": EOT}, **stale)
    assert Tokenizer.load(tables(clip, tmp_path / "config", **files))("a!", 4).tolist() == [[49406, 320, 256, 49407]]


def test_further_special_tokens_get_ids(clip, tmp_path):
    about = dict(bos_token=SOT, eos_token=EOT, additional_special_tokens=["<x-y>"])
    more = Tokenizer.load(tables(clip, tmp_path / "more", tokenizer_config=about))
    assert more("a <x-y>", 5).tolist() == [[49406, 320, 49408, 49407, 0]] and more.vocab_size == 49409


def test_start_and_end_have_the_names_their_config_gives_them(clip, tmp_path):
    vocab = {"<bos>": 0, "<eos>": 1, "a</w>": 2, "b</w>": 3, "a": 4, "b": 5}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(InputError, match="no start and end token"):
        Tokenizer.load(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<bos>"}, "eos_token": "<eos>"})
    )
    named = Tokenizer.load(tmp_path)
    assert (named.sot, named.eot, named.largest_word) == (0, 1, 5)
    assert named("A b", 5).tolist() == [[0, 2, 3, 1, 0]]
    assert Tokenizer.load(named.save(tmp_path))("A b", 5).tolist() == [[0, 2, 3, 1, 0]]
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<end>"}))
    with pytest.raises(InputError, match="the vocabulary has no '<end>'"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_that_keeps_capitals_gets_them(clip, tmp_path):
    bpe = tokenizers.Tokenizer(
        tokenizers.models.BPE({"A</w>": 0, "a</w>": 1, SOT: 2, EOT: 3}, [], end_of_word_suffix="</w>")
    )
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    bpe.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path)("A a", 4).tolist() == [[2, 0, 1, 3]]


def test_a_tokenizer_on_which_the_library_panics_is_refused(clip, tmp_path):
    file = tmp_path / "tokenizer.json"
    clip._bpe.save(str(file))
    saved = json.loads(file.read_text())
    saved["post_processor"]["special_tokens"] = {}  # tokens that the template names
    file.write_text(json.dumps(saved))
    with pytest.raises(InputError, match="not readable as a tokenizer"):
        Tokenizer.load(file)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("tokenizer.json", '{"model": ', "not readable as a tokenizer"),
        ("tokenizer.json", "[]", "not readable as a tokenizer"),
        ("tokenizer.json", "", "not readable as a tokenizer"),
        ("vocab.json", '{"a": 1000000000}', "gives a token the id 1000000000: ids must be below 16,777,216"),
        ("vocab.json", '{"a": ', "cannot be read as JSON"),
        ("vocab.json", '["a"]', "holds a JSON list"),
        ("vocab.json", '{"a": "x"}', "each token another id"),
        ("vocab.json", '{"a": 1, "b": 1}', "each token another id"),
        ("merges.txt", "a b\na b c\n", "line 2: 'a b c' is not a pair"),
        ("merges.txt", "qqq zzz\n", "not readable as a tokenizer"),
        ("added_tokens.json", '{"<x>": "y"}', "'<x>' has id 'y'"),
        ("added_tokens.json", "[1]", "holds a JSON list"),
        ("tokenizer_config.json", '{"eos_token": 7}', "eos_token is 7"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder is"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder is"),
    ],
)
def test_damaged_files_are_refused_in_one_line(clip, tmp_path, name, text, complaint):
    tables(clip, tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"^[^\n]*{complaint}[^\n]*$"):
        Tokenizer.load(tmp_path)


def test_a_clip_tokenizer_that_open_clip_runs_through_transformers(clip, tmp_path):
    def named(**fields):
        about = {"model_cfg": {"text_cfg": {"hf_tokenizer_name": "x", **fields}}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
        return load_tokenizer(tmp_path)

    clip.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": EOT}))
    assert named(tokenizer_kwargs={"clean": "lower"}).pad == 0  # which a causal tower does not see
    tokenizer = named(no_causal_mask=True)
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    for one in (tokenizer, pickle.loads(pickle.dumps(tokenizer)), load_tokenizer(tmp_path / "saved")):
        assert one("", 4).tolist() == [[clip.sot, clip.eot, clip.eot, clip.eot]]
    for options in ({"clean": "canonicalize"}, {"strip_sep_token": True}, {"language": "de"}):
        with pytest.raises(InputError, match=rf"tokenizer_kwargs: .*{next(iter(options))}"):
            named(tokenizer_kwargs=options)
    with pytest.raises(InputError, match="tokenizer_mode is 'clips'"):
        named(tokenizer_mode="clips")
