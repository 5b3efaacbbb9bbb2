"""Preprocessing and tokenizer of a CLIP: found, assumed and said, or refused; and what `load` takes."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

import tinyclip_jax
from heirloom.common.checkpoint import weights
from heirloom.common.cli import main
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.text import Tokenizer
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from tinyclip_jax.inputs import _check_teacher, check_tokenizer, own_tokenizer, preprocess_of, tokenizer_of
from tinyclip_jax.model import Clip, ClipConfig, ImageConfig, TextConfig
from tinyclip_jax.pretrained import Pretrained, inherit_from
from tinyclip_jax.zoo import open_clip_model

CFG = ClipConfig(
    ImageConfig(size=16, patch=8, width=32, layers=1, heads=1, hidden=32),
    TextConfig(context=8, vocab=540, width=32, layers=1, heads=1, hidden=32),
    joint=16,
)
TOKENIZER = Tokenizer.train(["a photo of a cat", "a photo of a dog"], 540)


@pytest.fixture(scope="module")
def clip():
    model = functional(Clip, CFG)
    return Pretrained(CFG, model, model.init(jax.random.key(0)), Preprocess(16), TOKENIZER)


@pytest.fixture
def folder(clip, tmp_path):
    clip.save(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, mode in zip(paths, ("RGB", "RGBA", "L"), strict=True):
        Image.fromarray(rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)).convert(mode).save(path)
    return paths


def test_pictures_come_in_any_form(clip, files):
    expected = np.asarray(clip.encode_image([str(file) for file in files]))
    assert expected.shape == (3, 16)
    forms = [
        tuple(files),
        (file for file in files),
        [file.read_bytes() for file in files],
        [Image.open(file) for file in files],
        [np.asarray(Image.open(file).convert("RGB")) for file in files],
        np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]),
    ]
    for form in forms:
        np.testing.assert_array_equal(clip.encode_image(form), expected)
    for one in (
        files[1],
        str(files[1]),
        files[1].read_bytes(),
        Image.open(files[1]),
        np.asarray(Image.open(files[1]).convert("RGB")),
    ):
        np.testing.assert_allclose(clip.encode_image(one), expected[1:2], atol=1e-6)


def test_the_background_is_the_checkpoints(clip, files):
    white = replace(clip, pre=replace(clip.pre, background="white"))
    picture = Image.open(files[1])
    laid = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    np.testing.assert_array_equal(white.encode_image(files[1]), clip.encode_image(laid))
    assert np.abs(white.encode_image(files[1]) - clip.encode_image(files[1])).max() > 1e-3


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        (["0.png", "cut.png"], r"picture number 1, counted from 0: .*cut\.png does not decode"),
        ("cut.png", r"cut\.png does not decode"),
        (["nowhere.png"], r"nowhere\.png: no such file"),
        ([b"no picture"], "picture number 0, counted from 0: this picture does not decode"),
        (
            [None],
            (
                "picture number 0, counted from 0: a picture must be a file name, bytes, a PIL image or a uint8 array,"
                " not NoneType"
            ),
        ),
        (7, "images is of type int"),
        ([], "list of pictures is empty"),
    ],
)
def test_a_picture_that_cannot_be_read_is_named(clip, files, images, complaint, monkeypatch):
    monkeypatch.chdir(files[0].parent)
    (files[0].parent / "cut.png").write_bytes(files[0].read_bytes()[:200])
    with pytest.raises(InputError, match=rf"^[^\n]*{complaint}[^\n]*$"):
        clip.encode_image(images)


def test_captions_come_one_or_several(clip):
    expected = np.asarray(clip.encode_text(["a cat", "a dog"]))
    for form in (("a cat", "a dog"), iter(["a cat", "a dog"])):
        np.testing.assert_array_equal(clip.encode_text(form), expected)
    np.testing.assert_allclose(clip.encode_text("a dog"), expected[1:], atol=1e-6)
    wrong = (
        ([], "list of captions is empty"),
        (7, "captions must be strings, not int"),
        (["a", 7], "caption 1, counted from 0, is int"),
    )
    for form, complaint in wrong:
        with pytest.raises(InputError, match=complaint):
            clip.encode_text(form)


def test_what_is_assumed_is_said_once(folder, tmp_path, capsys, remarks):
    tinyclip_jax.load(str(folder))
    assert remarks() == []
    (folder / "preprocess.json").unlink()
    tinyclip_jax.load(str(folder))
    (said,) = remarks()
    assert said.startswith("preprocessing: none with") and "CLIP's own is assumed" in said
    assert main(["eval", str(folder), "--data", "emoji:noto"]) == 0
    assert capsys.readouterr().out.count("CLIP's own is assumed") == 1
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "open_clip", "--no-verify"]) == 0
    assert capsys.readouterr().out.count("CLIP's own is assumed") == 1
    assert preprocess_of(open_clip_model(str(tmp_path / "out"))).note == ""


def test_what_a_format_cannot_express_stops_the_conversion(folder, tmp_path, capsys):
    Preprocess(16, resize=18).save(folder)
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "open_clip", "--no-verify"]) == 2
    assert "resizes to 18 and crops 16" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_preprocessing_of_another_size_is_refused(folder):
    Preprocess(24).save(folder)
    with pytest.raises(InputError, match=r"preprocess\.json: size is 24, and the model takes 16 x 16"):
        tinyclip_jax.load(str(folder))


def test_a_student_keeps_the_margin_of_its_donor(clip):
    donor = replace(clip, pre=Preprocess(16, mode="squash", resize=20, corner="down", background="white"))
    student = inherit_from(donor, replace(CFG, image=replace(CFG.image, size=8)))
    assert student.pre == Preprocess(8, mode="squash", resize=10, corner="down", background="white")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (dict(vocab=520), "the tokenizer has 523 ids, text.vocab is 520"),
        (dict(eot=530), "ends captions with id 522, text.eot is 530"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(text, complaint):
    with pytest.raises(InputError, match=rf"^here: .*{complaint}"):
        check_tokenizer(TOKENIZER, replace(CFG.text, **text), "here")


def test_the_end_token_is_where_the_tower_pools(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    early = Tokenizer.load(tmp_path)
    check_tokenizer(early, replace(CFG.text, eot=1), "here")
    with pytest.raises(
        InputError, match=r"ids of words go up to 2; this text tower pools at the largest id: set text\.eot to 1"
    ):
        check_tokenizer(early, CFG.text, "here")


def test_a_tokenizer_that_does_not_fit_is_not_replaced(tmp_path, remarks):
    big = replace(CFG, text=replace(CFG.text, vocab=49408))
    folder = tmp_path / "clip"
    folder.mkdir()
    model = functional(Clip, big)
    weights.write_params(
        folder, {path: np.zeros(leaf.shape, np.float32) for path, leaf in model.spec.items()}, spec=model.spec
    )
    weights.write_config(folder, "tinyclip", big)
    assert tokenizer_of(open_clip_model(str(folder))).vocab_size == 49408
    assert remarks() == [f"tokenizer: {folder} has none; CLIP's is assumed, because the vocabulary has its size"]
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(InputError, match=r"needs a tokenizer\.json, or a vocab\.json and a merges\.txt"):
        tokenizer_of(open_clip_model(str(folder)))
    (folder / "vocab.json").rename(folder / "spiece.model")
    assert tokenizer_of(open_clip_model(str(folder))) is None
    with pytest.raises(InputError, match="this model has no tokenizer"):
        tinyclip_jax.load(str(folder)).encode_text("a cat")


def test_a_live_teacher_without_tokenizer_gets_the_students_tokens(folder, remarks):
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
    teacher = open_clip_model(str(folder))
    assert own_tokenizer(teacher) is None
    _check_teacher(teacher, TOKENIZER, Preprocess(16))
    assert remarks() == [f"the teacher {folder} has no tokenizer that heirloom can use; the student's is used"]
    longer = Tokenizer.train(["quick brown foxes", "jump over some lazy dogs", "without any haste"], 541)
    with pytest.raises(InputError, match=r"clip: the tokenizer has 541 ids, text\.vocab is 540"):
        _check_teacher(teacher, longer, Preprocess(16))


def test_a_stored_teacher_is_known_by_its_whole_preprocessing():
    from tinyclip_jax.cache import _of_model

    class Two:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {"key": f"{index}", "text": "a cat"}

    about = _of_model(Two(), Preprocess(16, mode="squash", resize=20, background="white"), TOKENIZER)
    assert (about["mode"], about["resize"], about["background"], about["mean"]) == (
        "squash",
        20,
        "white",
        list(Preprocess().mean),
    )
