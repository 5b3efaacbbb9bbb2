"""Sizes, prompt files and folders of pictures."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from heirloom.common.errors import InputError
from heirloom.common.mesh import start
from lit_jax.aspect import nearest_size, parse_size, trained_sizes
from lit_jax.denoiser import PromptConfig
from lit_jax.pixart import PixArtConfig
from lit_jax.prompted import _about, _folder
from lit_jax.prompts import Album, Prompt, read_prompts, read_settings
from lit_jax.text_to_image import Request, TextToImage


def test_there_are_forty_sizes_of_about_one_area():
    for latent, side in ((32, 256), (64, 512), (128, 1024), (256, 2048)):
        sizes = trained_sizes(latent)
        assert len(sizes) == len(set(sizes)) == 40 and (side, side) in sizes
        assert all(h % (side // 16) == 0 and w % (side // 16) == 0 for h, w in sizes)
        assert all(0.8 < h * w / side**2 < 1.02 for h, w in sizes)
    assert trained_sizes(48) == []


@pytest.mark.parametrize(
    ("latent", "asked", "drawn"),
    [
        (64, (512, 512), (512, 512)),
        (64, (1000, 1000), (512, 512)),
        (64, (512, 768), (416, 608)),
        (128, (768, 512), (1216, 832)),
        (128, (100, 4000), (512, 2048)),
        (256, (3000, 3000), (2048, 2048)),
        (48, (100, 200), (100, 200)),
    ],
)
def test_a_size_becomes_the_nearest_ratio(latent, asked, drawn):
    assert nearest_size(latent, *asked) == drawn


def test_sizes_are_read_as_height_and_width():
    assert parse_size("512x768") == (512, 768) and parse_size("256") == (256, 256)
    for wrong in ("", "x", "512x", "512x512x3", "-5", "1e3", "0x512", "9999999"):
        with pytest.raises(InputError, match="HEIGHTxWIDTH"):
            parse_size(wrong)


def test_what_a_picture_is_drawn_from_is_checked():
    donor, autoencoder = SimpleNamespace(cfg=PixArtConfig(size=64)), SimpleNamespace(cfg=SimpleNamespace(factor=8))
    model = TextToImage(donor, None, start(), None, autoencoder)
    for how, words in (
        (dict(prompts=5), "prompts must be a string or a list of strings"),
        (dict(prompts=["a", None]), "prompts must be a string or a list of strings"),
        (dict(prompts="a", size=64), r"size is 64: give height and width in pixels, such as \(512, 768\)"),
        (dict(prompts="a", count=1.5), "count is 1.5: choose a whole number, 1 or more"),
        (dict(prompts="a", latents=np.zeros((1, 4, 64, 64))), r"latents have the shape \[1, 4, 64, 64\]: give \[1, 64"),
    ):
        with pytest.raises(InputError, match=words):
            model.draw(**how)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A red apple!", "a_red_apple"),
        ("赤いリンゴ", "赤いリンゴ"),
        ("Ein Bär, grün", "ein_bär_grün"),
        ("\N{RED APPLE}", "prompt"),
        ("", "unconditional"),
    ],
)
def test_pictures_are_named_after_their_prompt(tmp_path, text, name):
    (file,) = Album(tmp_path, "plain", 1).files(0, Prompt(text))
    assert file.name == f"00000_{name}_seed0_0.png"


@pytest.mark.parametrize("text", ['"a cat"\n"a dog"', "1. a cat\n2. a dog", "prompt\na cat", "- a cat\n- a dog"])
def test_prompts_with_more_than_their_text_are_refused(tmp_path, text):
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(InputError, match="give one prompt a line and nothing else"):
        read_prompts(tmp_path / "p.txt", "plain")
    (tmp_path / "p.txt").write_text("1 cat on a mat")
    assert [p.text for p in read_prompts(tmp_path / "p.txt", "plain")] == ["1 cat on a mat"]


@pytest.mark.parametrize(("factor", "drawn"), [(8, (416, 608)), (16, (512, 768))])
def test_trained_sizes_are_known_for_autoencoders_that_shrink_eight_times(remarks, factor, drawn):
    """Those of PixArt: nothing is known of a model with latents of another factor."""
    donor, autoencoder = SimpleNamespace(cfg=PixArtConfig(size=64)), SimpleNamespace(cfg=SimpleNamespace(factor=factor))
    model = TextToImage(donor, None, start(), None, autoencoder)
    assert model.fitting((512, 768), exact=False) == drawn
    assert any("was trained on" in said for said in remarks()) == (factor == 8)
    assert model.fitting((512, 768), exact=True) == (512, 768)
    assert any("this model was not trained on pictures of" in said for said in remarks()) == (factor == 8)


def test_prompts_are_read_from_all_three_kinds_of_files(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffa red apple\r\n\r\n  two dogs \n".encode())  # as Windows writes it
    assert [p.text for p in read_prompts(tmp_path / "a.txt", "plain")] == ["a red apple", "two dogs"]
    lines = [{"tag": "counting", "prompt": "four cats"}, {"tag": "colors", "prompt": "a blue cow"}]
    (tmp_path / "g.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read_prompts(tmp_path / "g.jsonl", "geneval")
    assert [p.text for p in found] == ["four cats", "a blue cow"] and found[1].about["tag"] == "colors"
    (tmp_path / "dpg").mkdir()
    for name in ("10", "2"):
        (tmp_path / "dpg" / f"{name}.txt").write_text(f"prompt {name}\n")
    assert [(p.name, p.text) for p in read_prompts(tmp_path / "dpg", "dpg")] == [("10", "prompt 10"), ("2", "prompt 2")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.json", '[\n "a red apple",\n "[V] two dogs"\n]'),
        ("p.jl", '{"prompt": "a red apple"}\n{"prompt": "[V] two dogs"}'),
        ("p.txt", "a red apple\n[V] two dogs"),
        ("p.txt", '["a red apple", "[V] two dogs"]'),
    ],
)
def test_json_is_read_as_such_whatever_the_name_of_its_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert [p.text for p in read_prompts(tmp_path / name, "plain")] == ["a red apple", "[V] two dogs"]


@pytest.mark.parametrize(
    ("name", "content", "layout", "says"),
    [
        ("p.json", '{\n"prompts": ["a"]\n}', "plain", "other JSON than a list of texts; give one prompt a line"),
        ("p.json", '[{"prompt": "a"}]', "plain", "is not a list of strings"),
        ("parti.tsv", "Prompt\tCategory\na cow\tAnimals", "plain", "is a table; give one prompt a line"),
        ("parti.txt", "a cow\tAnimals", "plain", "is a table"),
        ("p.csv", "prompt\na cow", "plain", "is a table"),
        ("none.txt", None, "plain", "cannot be read"),
        ("empty.txt", "\n \n", "plain", "holds no prompts"),
        ("bad.jsonl", '{"prompt": "a"}\nnot', "plain", "line 2: not JSON"),
        ("field.jsonl", '{"text": "a"}', "geneval", 'line 1: has no text field "prompt"'),
        ("a.txt", "a", "geneval", "evaluation_metadata.jsonl"),
        ("a.txt", "a", "dpg", "folder of .txt"),
    ],
)
def test_a_wrong_prompt_file_is_one_line(tmp_path, name, content, layout, says):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=says) as error:
        read_prompts(tmp_path / name, layout)
    assert "\n" not in str(error.value)


PICTURES = np.random.default_rng(0).integers(0, 256, (4, 8, 12, 3)).astype(np.uint8)
SETTINGS = [{"prompt": "ein Äpfelchen", "seed": 3, "number": i, "guided_steps": (0.0, 1.0)} for i in range(4)]


def test_a_picture_says_how_it_was_drawn(tmp_path):
    album = Album(tmp_path, "plain", 4, seed=3)
    prompt = Prompt("ein Äpfelchen")
    files = album.write(7, prompt, PICTURES, SETTINGS)
    assert files[2].name == "00007_ein_äpfelchen_seed3_2.png"
    np.testing.assert_array_equal(np.asarray(Image.open(files[2])), PICTURES[2])
    assert read_settings(files[2]) == json.loads(json.dumps(SETTINGS[2]))
    assert album.has(7, prompt, SETTINGS)
    assert not album.has(7, prompt, [{**s, "seed": 4} for s in SETTINGS]) and not album.has(6, prompt, SETTINGS)


def test_the_layouts_of_the_benchmarks(tmp_path):
    Album(tmp_path / "g", "geneval", 4).write(
        2, Prompt("a cow", about={"prompt": "a cow", "tag": "x"}), PICTURES, SETTINGS
    )
    assert json.loads((tmp_path / "g" / "00002" / "metadata.jsonl").read_text()) == {"prompt": "a cow", "tag": "x"}
    assert sorted(p.name for p in (tmp_path / "g/00002/samples").iterdir()) == [f"{i:05d}.png" for i in range(4)]
    album = Album(tmp_path / "d", "dpg", 4)
    album.write(0, Prompt("a cow", name="COCOval2014_3"), PICTURES, SETTINGS)
    whole = np.asarray(Image.open(tmp_path / "d" / "COCOval2014_3.png"))
    assert whole.shape == (16, 24, 3)
    np.testing.assert_array_equal(whole[8:, 12:], PICTURES[3])
    assert album.has(0, Prompt("a cow", name="COCOval2014_3"), SETTINGS)


def test_a_layout_without_a_name_is_refused(tmp_path):
    with pytest.raises(InputError, match="--layout t2i: choose plain, geneval, dpg"):
        Album(tmp_path, "t2i", 1)


def test_pictures_depend_on_the_weights_of_the_text_encoder(tmp_path):
    (tmp_path / "text").mkdir()
    files = [tmp_path / "model.safetensors", tmp_path / "text" / "model.safetensors"]
    for file in files:
        file.write_text("weights")
    model = SimpleNamespace(path=tmp_path, file=files[0])
    parts = [SimpleNamespace(text=place) for place in (files[1].parent, files[1])]
    pipes = [SimpleNamespace(donor=model, autoencoder=model, components=one, dtype="float32") for one in parts]
    before = [_about(pipe, Request("a cow"), PromptConfig(), 0) for pipe in pipes]
    files[1].write_text("other weights")
    for pipe, old in zip(pipes, before, strict=True):
        new = _about(pipe, Request("a cow"), PromptConfig(), 0)
        assert {name for name in new if new[name] != old[name]} == {"text_encoder"}


def test_half_a_character_in_a_prompt_is_replaced_before_anything_is_drawn(tmp_path):
    """JSON and terminals may have them; UTF-8, in which a picture keeps its prompt, has not."""
    request = Request("a \ud83d\ude00", negative="\ud83d cat", count=1)
    assert (request.prompt, request.negative) == ("a \N{GRINNING FACE}", "\N{REPLACEMENT CHARACTER} cat")


def test_a_folder_of_pictures_may_have_a_dot_in_its_name(tmp_path):
    assert _folder(tmp_path / "cfg4.5").is_dir()
    (tmp_path / "apples.png").mkdir()
    assert _folder(tmp_path / "apples.png").is_dir()
    (tmp_path / "file").touch()
    for name in ("a.png", "a.JPG", "file"):
        with pytest.raises(InputError, match=f"{name}: pictures of prompts go into a folder; give the name of a"):
            _folder(tmp_path / name)
