"""The whole way from a prompt to a picture, against diffusers' PixArtSigmaPipeline at small size."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from small_pipeline import write_pipeline  # noqa: E402

import lit_jax  # noqa: E402
from heirloom.common.cli import main  # noqa: E402
from heirloom.common.errors import InputError, Remark  # noqa: E402
from lit_jax.denoiser import PromptConfig  # noqa: E402
from lit_jax.prompts import read_settings  # noqa: E402
from lit_jax.text_to_image import Request  # noqa: E402

AS_DIFFUSERS = dict(times="integer", null="own mask", letters="lower")
PROMPT = "Two red dogs on the table"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipeline") / "sigma")


@pytest.fixture(scope="module")
def pipe(folder):
    return lit_jax.load(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    pipeline = diffusers.PixArtSigmaPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("size", "negative", "guidance"), [((256, 256), "", 4.5), ((192, 320), "snow", 3.0), ((256, 256), "", 1.0)]
)
def test_the_latents_are_those_of_diffusers(pipe, theirs, size, negative, guidance):
    """Five steps from the same noise with the same rounding; relative to the largest latent."""
    noise = np.random.default_rng(0).standard_normal((1, size[0] // 8, size[1] // 8, 4)).astype(np.float32)
    sampling = PromptConfig(steps=5, guidance=guidance, **AS_DIFFUSERS)
    (ours,) = pipe.latents([Request(PROMPT, negative, size, 1, 0, noise)], sampling)
    expected = theirs(
        PROMPT,
        negative_prompt=negative,
        num_inference_steps=5,
        guidance_scale=guidance,
        height=size[0],
        width=size[1],
        latents=torch.from_numpy(noise).permute(0, 3, 1, 2),
        output_type="latent",
        clean_caption=False,
        use_resolution_binning=False,
    ).images
    expected = expected.permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - expected).max() / np.abs(expected).max() < 1e-3


def test_the_picture_is_that_of_diffusers(pipe, theirs):
    noise = np.random.default_rng(1).standard_normal((1, 32, 32, 4)).astype(np.float32)
    (ours,) = pipe.draw(PROMPT, size=(256, 256), steps=3, latents=noise, exact=True, **AS_DIFFUSERS)
    expected = theirs(
        PROMPT,
        num_inference_steps=3,
        height=256,
        width=256,
        latents=torch.from_numpy(noise).permute(0, 3, 1, 2),
        output_type="np",
        clean_caption=False,
        use_resolution_binning=False,
    ).images
    assert np.abs(np.asarray(ours) / 255 - expected[0]).max() < 0.02  # a rounding step is 0.004


def test_text_features_are_those_of_diffusers(pipe, theirs):
    features, mask = pipe.encode_text(["a red apple", ""])
    expected, their_mask, *_ = theirs.encode_prompt(["a red apple", ""], do_classifier_free_guidance=False)
    np.testing.assert_array_equal(mask, their_mask.bool().numpy())
    np.testing.assert_allclose(features[mask], expected.detach().numpy()[mask], atol=1e-4)


def test_pictures_depend_on_their_seed_and_number_alone(pipe):
    how = dict(steps=2, size=(256, 256))
    many = pipe.draw(["a red apple", "two dogs"], count=3, seed=5, batch=2, **how)
    assert len(many) == 6 and many[0].size == (256, 256)
    (one,) = pipe.draw("two dogs", seed=5, **how)
    assert np.abs(np.asarray(one, int) - np.asarray(many[3], int)).max() <= 1
    (other,) = pipe.draw("two dogs", seed=6, **how)
    assert np.abs(np.asarray(one, int) - np.asarray(other, int)).mean() > 1


def test_guidance_on_some_steps_alone_changes_the_picture_and_costs_less(pipe):
    sampling = PromptConfig(steps=4, guided_steps=(0.25, 0.75))
    assert [sampling.guides(i) for i in range(4)] == [False, True, True, False]
    request = [Request("a red apple", size=(256, 256))]
    (never,) = pipe.latents(request, PromptConfig(steps=4, guided_steps=(0.0, 0.0)))
    (none,) = pipe.latents(request, PromptConfig(steps=4, guidance=1.0))
    np.testing.assert_allclose(never, none, atol=1e-4 * np.abs(none).max())
    some, always = (pipe.latents(request, how)[0] for how in (sampling, PromptConfig(steps=4)))
    assert np.abs(some - none).max() > 1e-2 and np.abs(some - always).max() > 1e-2


def test_a_long_prompt_is_cut_and_said(pipe):
    with pytest.warns(Remark, match="tokens, and the model takes 300"):
        pipe.encode_text("red apple " * 400)


def test_the_command_writes_pictures_that_say_how_they_were_drawn(folder, tmp_path, capsys):
    out, report = tmp_path / "out", tmp_path / "r.json"
    arguments = ["sample", str(folder), "--prompt", "A red apple", "--steps", "2", "-n", "2", "--out", str(out)]
    assert main([*arguments, "--size", "300x300", "--seed", "3", "--json", str(report)]) == 0
    said = capsys.readouterr().out
    assert "300 x 300 pixels become 256 x 256" in said and "2 pictures" in said
    for stage in ("text encoder", "denoiser", "decoder"):
        assert stage in said
    found = json.loads(report.read_text())
    assert found["size"] == [256, 256] and found["stages"]["denoiser"]["seconds"] > 0
    settings = [read_settings(out / f"00000_a_red_apple_seed3_{i}.png") for i in range(2)]
    assert [s["number"] for s in settings] == [0, 1] and settings[0]["prompt"] == "A red apple"
    assert main([*arguments, "--size", "300x300", "--seed", "3"]) == 0
    assert "1 of 1 prompts are drawn" in capsys.readouterr().out
    assert main([*arguments, "--size", "300x300", "--seed", "3", "--dtype", "bfloat16"]) == 0
    assert "are drawn" not in capsys.readouterr().out  # what draws has changed


def test_a_file_of_prompts_in_the_layout_of_geneval(folder, tmp_path, capsys):
    lines = [{"tag": "single", "prompt": "a photo of a dog"}, {"tag": "colors", "prompt": "a green house"}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--layout", "geneval", "-n", "2", "--steps", "1", "--out", str(tmp_path / "g")]
    assert main(["sample", str(folder), "--prompts", str(tmp_path / "m.jsonl"), *arguments]) == 0
    files = sorted(str(p.relative_to(tmp_path / "g")) for p in (tmp_path / "g").rglob("*.*"))
    each = ["metadata.jsonl", "samples/00000.png", "samples/00001.png"]
    assert files == [f"{i:05d}/{name}" for i in range(2) for name in each]
    assert json.loads((tmp_path / "g/00001/metadata.jsonl").read_text())["tag"] == "colors"


def test_pipelines_are_converted_both_ways(folder, tmp_path, capsys):
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["convert", str(folder), str(ours)]) == 0
    said = capsys.readouterr().out
    assert said.count("verified against") == 3 and "diffusers" in said and "transformers" in said
    assert main(["convert", str(ours), str(back), "--to", "diffusers"]) == 0
    before = diffusers.PixArtSigmaPipeline.from_pretrained(folder)
    after = diffusers.PixArtSigmaPipeline.from_pretrained(back)
    for part in ("transformer", "vae", "text_encoder"):
        one, other = (getattr(p, part).state_dict() for p in (before, after))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    noise = np.random.default_rng(2).standard_normal((1, 32, 32, 4)).astype(np.float32)
    drawn = [lit_jax.load(f).draw("a cat", size=(256, 256), steps=2, latents=noise)[0] for f in (folder, ours)]
    assert np.abs(np.subtract(*map(lambda p: np.asarray(p, int), drawn))).max() <= 1


def test_a_student_finds_the_parts_of_its_donors_pipeline(folder, tmp_path, capsys):
    recipe = tmp_path / "small.py"
    recipe.write_text(
        "from lit_jax.pixart import PixArtConfig\n"
        "from lit_jax.text_recipe import Config\n\n\n"
        "def get_config() -> Config:\n"
        "    sizes = dict(size=32, width=96, layers=3, hidden=384, text_width=40, interpolation=0.5, cross_heads=4)\n"
        "    return Config(student=PixArtConfig(**sizes, attention='linear', heads=2))\n"
    )
    student = tmp_path / "lit"
    assert main(["inherit", str(recipe), str(student), "--donor", str(folder)]) == 0
    record = json.loads((student / "provenance.json").read_text())
    fresh = {path for path, leaf in record["parameters"].items() if leaf["fraction"] == 0}
    projections = {f"blocks/attn/{name}/{leaf}" for name in ("query", "key", "value") for leaf in ("kernel", "bias")}
    assert fresh == projections | {"blocks/attn/depthwise/kernel", "blocks/attn/depthwise/bias"}
    assert 0.8 < record["fraction"] < 1
    out = tmp_path / "out"
    assert (
        main(
            [
                "sample",
                str(student),
                "--prompt",
                "a cat",
                "--steps",
                "1",
                "--size",
                "192x320",
                "--exact",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    (file,) = out.iterdir()
    assert Image.open(file).size == (320, 192)
    assert main(["train", str(recipe), "--run", str(tmp_path / "run")]) == 2
    assert "give --data.path: pictures with captions, or a cache of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], 'give --prompt "TEXT"'),
        (["--prompt", "a", "--class", "3"], "draws from text"),
        (["--prompt", "a", "--size", "300x300", "--exact"], "no multiple of 16"),
        (["--prompt", "a", "--size", "banana"], "HEIGHTxWIDTH"),
        (["--prompt", "a", "--steps", "0"], "between 1 and 1000"),
        (["--prompt", "a", "--stepz", "3"], "steps"),
        (["--prompt", "a", "--null", "none"], "prompt mask"),
        (["--prompt", "a", "-n", "0"], "1 or more"),
        (["--prompt", "a", "--seed", "-1"], "seed -1"),
        (["--prompt", "a", "--out", "x.png"], "give the name of a folder"),
        (["--prompt", "a", "--pipeline", "nowhere"], "nowhere"),
        (["--prompt", "a", "--guided-steps", "0.9", "0.1"], "guided_steps"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(folder), *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert says in said and len(said.splitlines()) == 1, said
    assert not list(tmp_path.rglob("*.png"))


def broken(folder, tmp_path, change):
    copy = tmp_path / "broken"
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def test_parts_that_are_missing_or_do_not_fit_are_named(folder, tmp_path, capsys):
    cases = [
        (lambda f: shutil.rmtree(f / "text_encoder"), "sub-folder text_encoder/ is missing"),
        (lambda f: shutil.rmtree(f / "vae"), "sub-folder vae/ is missing"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "no tokenizer"),
        (lambda f: shutil.rmtree(f / "transformer"), "sub-folder transformer/ is missing"),
    ]
    for i, (change, says) in enumerate(cases):
        copy = broken(folder, tmp_path / str(i), change)
        assert main(["sample", str(copy), "--prompt", "a", "--out", str(tmp_path / "o")]) == 2
        said = capsys.readouterr().err.strip()
        assert says in said and len(said.splitlines()) == 1, said


def test_a_value_that_is_not_finite_names_the_stage(folder, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    for part, name, says in (
        ("text_encoder", "model.safetensors", "text encoder"),
        ("transformer", "diffusion_pytorch_model.safetensors", "the denoiser's output"),
        ("vae", "diffusion_pytorch_model.safetensors", "the decoder's output"),
    ):
        copy = broken(folder, tmp_path / part, lambda f: None)
        tensors = load_file(copy / part / name)
        key = next(
            k
            for k in reversed(tensors)
            if (k.endswith("weight") and "encoder.conv" not in k and "decoder" in k) or part != "vae"
        )
        tensors[key] = torch.full_like(tensors[key], float("nan"))
        save_file(tensors, copy / part / name, {"format": "pt"})
        out = tmp_path / f"{part}_out"
        assert main(["sample", str(copy), "--prompt", "a cat", "--steps", "1", "--out", str(out)]) == 2
        assert says in capsys.readouterr().err and not list(out.glob("*.png"))


def test_the_python_interface_refuses_what_it_does_not_know(pipe):
    with pytest.raises(InputError, match="no setting 'step'"):
        pipe.draw("a", step=3)
    with pytest.raises(InputError, match="count"):
        pipe.draw("a", count=0)


def test_a_narrow_transformer_draws_nearly_the_same(folder, pipe):
    """bfloat16 has eight bits: errors of a few per cent after three steps, and float32 results."""
    request, how = [Request("two dogs", size=(256, 256))], PromptConfig(steps=3)
    (wide,) = pipe.latents(request, how)
    (narrow,) = lit_jax.load(folder, dtype="bfloat16").latents(request, how)
    assert narrow.dtype == np.float32 and 1e-5 < np.abs(narrow - wide).mean() / np.abs(wide).mean() < 0.1
