"""Ids of captions against live transformers and open_clip: SigLIP's, SigLIP 2's and MetaCLIP 2's tokenizers."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from small_tokenizers import CAPTIONS, SPECIAL, metaclip2, siglip, siglip2
from torchvision_stand_in import installed

from heirloom.common.data.text import clean
from heirloom.common.data.tokenizer_files import load_tokenizer
from heirloom.common.files import write_json
from tinyclip_jax.inputs import sidecars
from tinyclip_jax.model import ClipConfig, TextConfig

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::heirloom.common.errors.Remark")]
spiece = pytest.mark.skipif(not find_spec("sentencepiece"), reason="SiglipTokenizer needs sentencepiece")
KINDS = {"siglip": siglip, "siglip2": siglip2, "metaclip2": metaclip2}
MODELS = {"siglip": "siglip", "siglip2": "siglip", "metaclip2": "metaclip_2"}
CONTEXT = 20


@pytest.fixture(params=[pytest.param("siglip", marks=spiece), "siglip2", "metaclip2"])
def kind(request):
    return request.param


@pytest.fixture
def get_tokenizer():
    """open_clip's."""
    pytest.importorskip("torch")
    if not find_spec("open_clip"):
        pytest.skip("open_clip is not installed")
    with installed():
        from open_clip import get_tokenizer

        yield get_tokenizer


def ids_of(tokenizer, captions, **options):
    options = dict(padding="max_length", max_length=CONTEXT, truncation=True) | options
    return np.asarray(tokenizer(captions, **options)["input_ids"])


def folder_of(kind, folder):
    write_json(folder / "config.json", {"model_type": MODELS[kind]})
    return KINDS[kind](folder)


def test_ids_are_those_of_the_class_that_transformers_takes(kind, tmp_path):
    folder = folder_of(kind, tmp_path)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    names = {"siglip": "SiglipTokenizer", "siglip2": "Siglip2Tokenizer", "metaclip2": "XLMRobertaTokenizer"}
    assert type(theirs).__name__ == names[kind]
    for caption in CAPTIONS:
        assert ours(caption, CONTEXT)[0].tolist() == ids_of(theirs, [caption])[0].tolist(), caption
    if kind != "metaclip2":  # whose Unigram model finds "</s>" in a text; there no caption ends early here
        for caption in SPECIAL:
            expected = ids_of(theirs, [caption], split_special_tokens=True)[0].tolist()
            assert ours(caption, CONTEXT)[0].tolist() == expected, caption


def test_what_transformers_saves_is_read(kind, tmp_path):
    (tmp_path / "first").mkdir()
    theirs = transformers.AutoTokenizer.from_pretrained(folder_of(kind, tmp_path / "first"))
    theirs.save_pretrained(tmp_path / "saved")
    ours = load_tokenizer(tmp_path / "saved")
    np.testing.assert_array_equal(ours(CAPTIONS, CONTEXT), ids_of(theirs, CAPTIONS))


def written(kind, folder, format):
    """The tokenizer of a checkpoint in transformers' format, written as another format."""
    for name in ("theirs", "out"):
        (folder / name).mkdir()
    text = dict(eot=2) if kind == "metaclip2" else dict(pool="last", causal=False)
    cfg = ClipConfig(text=TextConfig(context=CONTEXT, vocab=400, **text), logit_bias=kind != "metaclip2")
    donor = SimpleNamespace(folder=folder_of(kind, folder / "theirs"), format="hf", cfg=cfg)
    if format == "open_clip":
        write_json(folder / "out" / "open_clip_config.json", {"model_cfg": {"text_cfg": {"context_length": CONTEXT}}})
    sidecars(donor, folder / "out", format)
    return load_tokenizer(folder / "theirs"), folder / "out"


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_makes_the_same_ids_of_what_is_written(kind, tmp_path):
    """Of SigLIP too, whose spiece.model became a tokenizer.json: it needs no sentencepiece."""
    ours, out = written(kind, tmp_path, "hf")
    write_json(out / "config.json", {"model_type": MODELS[kind]})
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    np.testing.assert_array_equal(ids_of(theirs, CAPTIONS), ours(CAPTIONS, CONTEXT))
    assert theirs.model_max_length == CONTEXT and set(theirs("a")) == {"input_ids"}
    np.testing.assert_array_equal(load_tokenizer(out)(CAPTIONS + SPECIAL, CONTEXT), ours(CAPTIONS + SPECIAL, CONTEXT))
    if kind != "metaclip2":
        processor = transformers.SiglipProcessor.from_pretrained(out)
        made = processor(text=CAPTIONS, padding="max_length", max_length=CONTEXT, truncation=True)["input_ids"]
        np.testing.assert_array_equal(made, ours(CAPTIONS, CONTEXT))


@pytest.mark.parametrize("cleaning", ["canonicalize", "lower", "whitespace"])
def test_ids_are_those_of_open_clip(cleaning, get_tokenizer, tmp_path):
    siglip2(tmp_path, "TokenizersBackend", add_eos_token=True)
    options = dict(context_length=CONTEXT, hf_tokenizer_name="x", tokenizer_kwargs={"clean": cleaning})
    write_json(tmp_path / "open_clip_config.json", {"model_cfg": {"embed_dim": 8, "text_cfg": options}})
    theirs, ours = get_tokenizer(f"local-dir:{tmp_path}"), load_tokenizer(tmp_path)
    np.testing.assert_array_equal(ours(CAPTIONS, CONTEXT), theirs(CAPTIONS).numpy())
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["pad_token"] == "<pad>"


@pytest.mark.parametrize("kind", KINDS)
def test_open_clip_takes_the_tokenizer_that_is_written_for_it(kind, get_tokenizer, tmp_path):
    ours, out = written(kind, tmp_path, "open_clip")
    theirs = get_tokenizer(f"local-dir:{out}")
    plain = [text for text in CAPTIONS if text == clean(text, lower=False)]  # open_clip repairs the others
    assert len(plain) >= 12
    np.testing.assert_array_equal(theirs(plain).numpy(), ours(plain, CONTEXT))
    np.testing.assert_array_equal(load_tokenizer(out)(CAPTIONS, CONTEXT), theirs(CAPTIONS).numpy())
