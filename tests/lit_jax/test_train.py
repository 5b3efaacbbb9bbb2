"""LiT from the command line at toy size: train, stop, resume, inherit, distil, sample, score."""

import json
import os
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.checkpoint.weights import open_safetensors, read_json
from heirloom.common.cli import main
from heirloom.common.data import emoji
from heirloom.common.data.labelled import open_labelled
from heirloom.common.data.sources import SourceConfig
from heirloom.common.errors import InputError
from heirloom.common.evaluate import generated
from heirloom.common.evaluate.extractor import Extractor
from heirloom.common.evaluate.inception import Features, InceptionConfig
from heirloom.common.nn.dense import Dense
from heirloom.common.nn.functional import functional
from heirloom.common.train.loop import Run
from heirloom.common.train.mesh import MeshConfig, start
from lit_jax import autoencoder_layouts, evaluate, progress, train
from lit_jax.data import Pixels, adm_crop
from lit_jax.decode import PictureDecoder, pictures_of
from lit_jax.dit import Dit, DitConfig
from lit_jax.latents import data_origin
from lit_jax.origin import autoencoder_origin, read_origin, write_origin
from lit_jax.pretrained import load
from lit_jax.zoo import FAMILY

SIZES = [
    "--student.size",
    "8",
    "--student.width",
    "16",
    "--student.hidden",
    "32",
    "--student.layers",
    "2",
    "--student.heads",
    "2",
]
SHORT = [
    "--pipeline.batch",
    "8",
    "--steps",
    "6",
    "--log-every",
    "1",
    "--eval-every",
    "3",
    "--save-every",
    "2",
    "--optim.warmup",
    "2",
]
TINY = [
    *SIZES,
    *SHORT,
    "--samples",
    "2",
    "--sample.steps",
    "2",
    "--data.path",
    "emoji:noto",
    "--held-out.path",
    "emoji:noto",
]


def weights_of(run):
    return {path: np.array(value) for path, value in open_safetensors(run / "model" / "model.safetensors").items()}


@pytest.fixture(scope="module")
def donor(one_device, tmp_path_factory, draw):
    """A softmax DiT."""
    folder = tmp_path_factory.mktemp("donor") / "model"
    cfg = DitConfig(size=8, channels=3, patch=4, width=16, layers=2, heads=4, hidden=32, classes=9)
    folder.mkdir()
    weights.write_params(folder, draw(functional(Dit, cfg).spec))
    weights.write_config(folder, "lit", cfg)
    return str(folder)


@pytest.fixture(scope="module")
def distilled(donor, tmp_path_factory):
    """A LiT that inherits and is distilled."""
    run = tmp_path_factory.mktemp("lit") / "run"
    assert main(["train", "lit/smoke", "--run", str(run), *TINY, "--donor", donor, "--teacher", donor]) == 0
    return run


def test_a_run_leaves_curves_grids_and_weights(distilled):
    lines = [json.loads(line) for line in (distilled / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["loss"] > 0 and line["kd_noise"] >= 0 and line["mse"] > 0 for line in lines)
    assert [line["step"] for line in lines if "eval/mse" in line] == [3, 6]
    assert sorted(p.name for p in (distilled / "samples").iterdir()) == ["0000003.png", "0000006.png"]
    assert Image.open(distilled / "first_batch.png").size[0] >= 24
    assert read_json(distilled / "model" / "config.json")["model"]["attention"] == "linear"


def test_a_run_says_what_it_is_and_what_it_inherits(distilled, donor):
    about, inherited = read_json(distilled / "about.json"), read_json(distilled / "provenance.json")
    counts = {path: value.size for path, value in weights_of(distilled).items()}
    assert about["student"]["parameters"] == {"total": sum(counts.values())} and about["student"]["macs"] > 0
    (start,) = about["starts"]
    assert (start["step"], start["backend"], start["devices"]) == (0, "cpu", {"cpu": 8})
    assert start["versions"]["jax"] == jax.__version__
    fresh = [path for path, line in inherited["parameters"].items() if line["fraction"] == 0]
    assert inherited["source"] == donor and fresh and all("/attn/" in path for path in fresh)
    expected = 1 - sum(counts[path] for path in fresh) / sum(counts.values())
    assert inherited["fraction"] == pytest.approx(expected, abs=1e-6)
    assert main(["report", str(distilled)]) == 0
    page = (distilled / "report.html").read_text()
    assert f"{expected:.1%} of the student&#x27;s first weights come from {donor}." in page
    assert f"{sum(counts.values()):,} parameters" in page and page.count("<figcaption>step ") == 2


def test_stopped_and_resumed_it_is_the_same_run_to_the_bit(donor, distilled, tmp_path, monkeypatch):
    run, held_out = tmp_path / "run", train.held_out_loss

    def stops(*args):
        score = held_out(*args)

        def and_stop(params):
            os.kill(os.getpid(), signal.SIGTERM)
            return score(params)

        return and_stop

    arguments = ["train", "lit/smoke", "--run", str(run), *TINY, "--samples", "0", "--donor", donor, "--teacher", donor]
    monkeypatch.setattr(train, "held_out_loss", stops)
    assert main(arguments) == 75
    assert not (run / "model").exists()
    monkeypatch.setattr(train, "held_out_loss", held_out)
    assert main(arguments) == 0
    for path, value in weights_of(distilled).items():
        np.testing.assert_array_equal(weights_of(run)[path], value, err_msg=path)
    curves = [
        [json.loads(line)["loss"] for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (distilled, run)
    ]
    assert curves[0] == curves[1]


def test_inherit_writes_the_student_and_where_it_is_from(donor, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from dataclasses import replace\nfrom heirloom.common import config\n\n\ndef get_config():\n"
        "    cfg = config.load('lit/smoke')\n"
        "    student = replace(cfg.student, size=8, width=16, hidden=32)\n"
        f"    return replace(cfg, student=student, donor={donor!r}, keep='v')\n"
    )
    assert main(["inherit", str(recipe), str(tmp_path / "student"), "--json", str(tmp_path / "record.json")]) == 0
    record = read_json(tmp_path / "record.json")
    assert record["parameters"]["blocks/attn/value/kernel"]["fraction"] == 1
    assert record["parameters"]["blocks/attn/out/kernel"]["fraction"] == 0
    student, theirs = (open_safetensors(folder / "model.safetensors") for folder in (tmp_path / "student", Path(donor)))
    kernels = [np.asarray(weights["blocks/attn/value/kernel"]).reshape(2, 16, 16) for weights in (student, theirs)]
    np.testing.assert_array_equal(*kernels)


def test_a_trained_run_draws(distilled, tmp_path):
    out = tmp_path / "grid.png"
    command = [
        "sample",
        str(distilled),
        "--class",
        "3",
        "1",
        "--count",
        "3",
        "--steps",
        "2",
        "--sampler",
        "ddim",
        "--out",
        str(out),
    ]
    assert main([*command, "--json", str(tmp_path / "drawn.json")]) == 0
    assert read_json(tmp_path / "drawn.json")["labels"] == [3, 3, 3, 1, 1, 1]
    assert Image.open(out).size == (240, 160)  # 3 x 2 pictures of 8 px, enlarged ten times


AUTOENCODER = Path(__file__).parents[1] / "golden" / "autoencoder"


@pytest.fixture
def cache(tmp_path):
    """Random moments for latents of 8 x 8, by the golden autoencoder."""
    path, rng = tmp_path / "cache", np.random.default_rng(0)
    path.mkdir()
    np.save(path / "moments.npy", rng.standard_normal((12, 2, 8, 8, 8)).astype(np.float16))
    np.save(path / "label.npy", np.arange(12, dtype=np.int32) % 3)
    write_origin(path, autoencoder_origin(open_donor(AUTOENCODER, [autoencoder_layouts.FAMILY]), "golden"))
    return path


def other_factor(tmp_path):
    """The same autoencoder with another scaling factor."""
    folder = Path(shutil.copytree(AUTOENCODER, tmp_path / "other"))
    (folder / "config.json").write_text(json.dumps(read_json(AUTOENCODER / "config.json") | {"scaling_factor": 0.5}))
    return str(folder)


def test_a_run_on_latents_remembers_their_autoencoder(one_device, cache, tmp_path, capsys, remarks):
    data = ["--data.path", str(cache), "--data.image=", "--data.text=", "--data.split=", "--data.columns", "moments"]
    recipe = [
        "--held-out.path=",
        "--label",
        "label",
        "--student.channels",
        "4",
        "--student.classes",
        "3",
        "--samples",
        "0",
    ]
    run, command = tmp_path / "run", [*SIZES, *SHORT, *data, *recipe]
    wrong = other_factor(tmp_path)
    assert main(["train", "lit/smoke", "--run", str(run), *command, "--autoencoder", wrong]) == 2
    error = capsys.readouterr().err
    factor = read_json(AUTOENCODER / "config.json")["scaling_factor"]
    assert f"of golden with scaling_factor {factor:g}" in error and "with 0.5" in error and error.count("\n") == 1
    assert main(["train", "lit/smoke", "--run", str(run), *command]) == 0
    assert read_origin(run / "model") == read_origin(cache)
    assert main(["sample", str(run), "--class", "1", "--steps", "2", "--autoencoder", wrong]) == 2
    assert "use the same autoencoder for both" in capsys.readouterr().err

    pipeline = tmp_path / "pipeline"
    shutil.copytree(run / "model", pipeline / "transformer")
    assert main(["sample", str(pipeline), "--class", "1", "--steps", "2"]) == 2
    assert "give --autoencoder" in capsys.readouterr().err
    shutil.copytree(AUTOENCODER, pipeline / "vae")
    assert main(["sample", str(pipeline), "--class", "1", "--steps", "2", "--out", str(tmp_path / "a.png")]) == 0
    side = 8 * open_donor(AUTOENCODER, [autoencoder_layouts.FAMILY]).cfg.factor
    assert load(str(pipeline)).sample(1, steps=2).shape == (1, side, side, 3)

    cfg = train.Config(data=SourceConfig(str(cache)), held_out=SourceConfig(str(tmp_path / "held_out")))
    shutil.copytree(cache, tmp_path / "held_out")
    assert data_origin(cfg.data, cfg.held_out) == read_origin(cache) and remarks() == []
    old = asdict(read_origin(cache).cfg)  # as caches of an earlier version say it
    (cache / "autoencoder.json").write_text(json.dumps(old))
    assert data_origin(cfg.data, cfg.held_out).cfg == read_origin(tmp_path / "held_out").cfg
    assert "a cache of an earlier version, which does not say which autoencoder made it" in remarks()[0]
    (tmp_path / "held_out" / "autoencoder.json").write_text(json.dumps(old | {"scaling_factor": 0.5}))
    with pytest.raises(InputError, match=r"with scaling_factor .*held_out of an autoencoder with 0.5"):
        data_origin(cfg.data, cfg.held_out)


def test_three_channels_of_a_foreign_file_are_a_guess_that_is_said(distilled, remarks):
    donor, mesh = open_donor(distilled / "model", [FAMILY]), start(MeshConfig())
    assert pictures_of(donor, "", mesh) is not None and remarks() == []
    assert pictures_of(replace(donor, format="diffusers"), "", mesh) is not None
    assert "its 3 channels are taken for pixels" in remarks()[0]


def test_a_kernel_is_named_for_the_steps_and_for_nothing_else(one_device, tmp_path, monkeypatch):
    """Kernels refuse the f32 weights that are scored, drawn from and kept. No step is taken: the kernel is another
    device's.
    """

    def ends_at_once(_, state, *__, evaluate, on_finish, **___):
        assert evaluate(state)["mse"] > 0
        on_finish(state)

    monkeypatch.setattr(Run, "fit", ends_at_once)
    monkeypatch.setattr(train, "check_device", lambda *_: None)
    run = tmp_path / "run"
    assert main(["train", "lit/smoke", "--run", str(run), *TINY, "--student.implementation", "mosaic_tpu"]) == 0
    assert (run / "samples" / "0000000.png").exists()
    assert read_json(run / "model" / "config.json")["model"]["implementation"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "10"], "no class 10: this model has 0 to 8, and 9 for no class"),
        (["--stps", "3"], "--stps"),
        (["--class", "cat"], "invalid int value: 'cat'"),
        (["--class", "-1"], "no class -1"),
        (["--count", "0"], "--count 0: draw 1 picture of each class, or more"),
        (["--steps", "0"], "--steps 0 with ddpm: choose between 1 and 1000"),
        (["--guidance", "nan"], "guidance is nan"),
        (["--seed", "-3"], "seed -3: choose a whole number from 0"),
        (["--out", "x.jpg"], "the grid is a PNG; name it x.png"),
        (["--steps", "333", "--sampler", "ddim"], "no integer stride makes 333 steps"),
    ],
)
def test_mistakes_of_sampling_are_one_line(distilled, tmp_path, capsys, arguments, message):
    assert main(["sample", str(distilled), "--out", str(tmp_path / "x.png"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


class Colours(nnx.Module):
    """Mean colours as features: a network small enough for a test."""

    def __init__(self, cfg: InceptionConfig, *, rngs: nnx.Rngs):
        self.fc = Dense("colour -> class", {"colour": 3, "class": cfg.classes}, bias=None, rngs=rngs)

    def __call__(self, images):
        x = images.astype(jnp.float32) / 255
        return Features(x.mean((1, 2)), x[:, 0, 0, :2], self.fc(x.mean((1, 2))))


def test_a_trained_run_is_scored(distilled, tmp_path, monkeypatch):
    small_extractor(monkeypatch)
    saved, scores = tmp_path / "samples.npz", tmp_path / "scores.json"
    how = [
        "--samples",
        "22",
        "--batch",
        "8",
        "--sample.steps",
        "2",
        "--sample.sampler",
        "ddim",
        "--labels",
        "balanced",
        "--save",
        str(saved),
    ]
    command = ["eval", str(distilled), "--data", "emoji:noto", "--split", "test", "--features", "colours", *how]
    assert main([*command, "--json", str(scores)]) == 0
    rows = {row["metric"]: row for row in read_json(scores)["rows"]}
    assert set(rows) == {"fid", "sfid", "inception_score", "precision", "recall", "kid", "kid_std"}
    assert all(
        row["n"] == 22 and row["protocol"] == "colours; ddim 2 steps, guidance 1 on first three, balanced labels"
        for row in rows.values()
    )
    drawn = np.load(saved)["arr_0"]
    assert drawn.shape == (22, 8, 8, 3) and drawn.dtype == np.uint8
    # The samples against themselves: no distance.
    assert (
        main(["eval", str(distilled), "--data", str(saved), "--features", "colours", *how[:-2], "--json", str(scores)])
        == 0
    )
    rows = {row["metric"]: row["value"] for row in read_json(scores)["rows"]}
    assert abs(rows["fid"]) < 1e-6 and rows["precision"] == rows["recall"] == 1


def small_extractor(monkeypatch):
    monkeypatch.setattr(generated, "POOL", 3)
    monkeypatch.setattr(generated, "SPATIAL", 2)
    params = {"fc/kernel": np.random.default_rng(0).standard_normal((3, 4), np.float32)}
    cfg = InceptionConfig("colours", 4, "average")
    monkeypatch.setattr(evaluate, "open_extractor", lambda path: Extractor(cfg, functional(Colours, cfg), params))


def test_a_killed_evaluation_continues(distilled, tmp_path, monkeypatch, capsys):
    small_extractor(monkeypatch)
    np.savez(tmp_path / "ref.npz", arr_0=np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3)).astype(np.uint8))
    how = ["--samples", "12", "--sample.steps", "2", "--sample.sampler", "ddim", "--features", "colours"]
    command = ["eval", str(distilled), "--data", str(tmp_path / "ref.npz"), *how]
    assert main([*command, "--batch", "8", "--save", str(tmp_path / "whole.npz")]) == 0

    draw_batches, seen = evaluate.draw_batches, []

    def killed(*args):
        for i, part in enumerate(draw_batches(*args)):
            if i == 2:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(evaluate, "draw_batches", killed)
    assert main([*command, "--batch", "4", "--save", str(tmp_path / "cut.npz")]) == 130
    monkeypatch.setattr(evaluate, "draw_batches", lambda *args: seen.append(args[-1]) or draw_batches(*args))
    assert main([*command, "--batch", "4", "--save", str(tmp_path / "cut.npz")]) == 0
    assert seen == [8] and "8 of 12 pictures" in capsys.readouterr().out
    whole, cut = (np.load(tmp_path / name)["arr_0"].astype(int) for name in ("whole.npz", "cut.npz"))
    assert np.abs(whole - cut).max() <= 1  # a picture is the same in any batch; rounding may differ


def test_a_reference_of_another_size_is_remarked(distilled, tmp_path, monkeypatch, capsys):
    small_extractor(monkeypatch)
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "ref.npz", arr_0=images)
    monkeypatch.setattr(evaluate, "draw_batches", lambda *_: iter([images]))
    command = ["eval", str(distilled), "--data", str(tmp_path / "ref.npz"), "--features", "colours", "--samples", "12"]
    assert main(command) == 0
    assert "its pictures are 16 x 8, and the model draws 8 x 8" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("absent.npz", "absent.npz: not a .npz"),
        ("float.npz", "`arr_0` is float32"),
        ("few.npz", "5 pictures are too few"),
        ("cut.npz", "cut"),
        ("x.npy", "not a .npy but a .npz"),
        ("nofolder", "nofolder"),
        ("empty", "empty"),
        ("torn", "torn.png"),
    ],
)
def test_a_reference_that_cannot_be_used_is_said_before_drawing(
    distilled, tmp_path, monkeypatch, capsys, reference, words
):
    small_extractor(monkeypatch)
    monkeypatch.setattr(evaluate, "draw_batches", lambda *_: pytest.fail("drawn too early"))
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "float.npz", arr_0=images.astype(np.float32))
    np.savez(tmp_path / "few.npz", arr_0=images[:5])
    np.save(tmp_path / "x.npy", images)
    np.savez(tmp_path / "whole.npz", arr_0=images)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:2000])
    for name in ("empty", "torn"):
        (tmp_path / name).mkdir()
    for i, picture in enumerate(images):
        Image.fromarray(picture).save(tmp_path / "torn" / f"{i}.png")
    (tmp_path / "torn" / "torn.png").write_bytes((tmp_path / "torn" / "3.png").read_bytes()[:60])
    how = ["--features", "colours", "--samples", "12", "--sample.steps", "2"]
    assert main(["eval", str(distilled), "--data", str(tmp_path / reference), *how]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_sample_that_is_not_finite_stops_command_and_training_grid(distilled, tmp_path, capsys, monkeypatch):
    broken = tmp_path / "broken"
    broken.mkdir()
    values = weights_of(distilled)
    values["final/bias"][..., 0] = np.inf
    weights.write_params(broken, values)
    (broken / "config.json").write_bytes((distilled / "model" / "config.json").read_bytes())
    out = tmp_path / "x.png"
    assert (
        main(
            [
                "sample",
                str(broken),
                "--class",
                "0",
                "--count",
                "2",
                "--steps",
                "2",
                "--sampler",
                "ddim",
                "--out",
                str(out),
            ]
        )
        == 2
    )
    assert "picture 0: the model's output is not finite" in capsys.readouterr().err and not out.exists()
    cfg = train.Config(student=DitConfig(classes=2), samples=3)
    monkeypatch.setattr(progress, "drawer", lambda *_: lambda *_: np.array([0.0, np.nan, 0.0]).reshape(3, 1, 1, 1))
    with pytest.raises(InputError, match="samples at step 50: picture 1: the model's output is not finite"):
        progress.grids(cfg, None, PictureDecoder(lambda x: x), None)({}, 50, tmp_path)


def test_scores_need_features_and_a_reference(distilled, capsys):
    assert main(["eval", str(distilled), "--data", "emoji"]) == 2
    assert "give --features" in capsys.readouterr().err
    assert main(["eval", str(distilled), "--features", "x"]) == 2
    assert "give --data" in capsys.readouterr().err


def test_names_of_classes_become_numbers_in_alphabetical_order():
    source = open_labelled(SourceConfig("emoji:noto", split="test"), "group", 9)
    groups = sorted(
        {
            "activities",
            "animals-nature",
            "flags",
            "food-drink",
            "objects",
            "people-body",
            "smileys-emotion",
            "symbols",
            "travel-places",
        }
    )
    assert source.classes == tuple(groups) and len(source) == 300 and emoji.STYLES[0] == "noto"
    record = source[7]
    assert groups[record["label"]] == record["group"]
    with pytest.raises(InputError, match=r"has 9 classes .* the model 10"):
        open_labelled(SourceConfig("emoji:noto"), "group", 10)
    with pytest.raises(InputError, match="no column 'grp'"):
        open_labelled(SourceConfig("emoji:noto"), "grp", 9)


def test_pixels_are_cropped_flipped_and_centred_on_zero():
    ramp = np.broadcast_to(np.arange(16, dtype=np.uint8)[None, :, None] * 16, (16, 16, 3)).copy()
    plain = Pixels(16, flips=0.0)({"image": ramp, "label": 3}, np.random.default_rng(0))
    np.testing.assert_allclose(plain["image"][0, :, 0], np.arange(16) * 16 / 127.5 - 1, atol=1e-6)
    assert plain["label"] == 3 and plain["label"].dtype == np.int32
    mirrored = Pixels(16, flips=1.0)({"image": ramp, "label": 3}, np.random.default_rng(0))
    np.testing.assert_array_equal(mirrored["image"], plain["image"][:, ::-1])
    rng = np.random.default_rng(1)
    share = np.mean([Pixels(16, flips=0.5)({"image": ramp, "label": 0}, rng)["image"][0, 0, 0] > 0 for _ in range(300)])
    assert 0.4 < share < 0.6


def test_the_crop_of_guided_diffusion():
    """Halved by boxes while the short side is twice the size, then bicubic: by its steps, in PIL's own words."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 130, 3)).astype(np.uint8))
    by_hand = picture.resize((65, 37), Image.Resampling.BOX).resize((32, 18), Image.Resampling.BOX)
    by_hand = by_hand.resize((round(32 * 16 / 18), 16), Image.Resampling.BICUBIC)
    left = (by_hand.width - 16) // 2
    np.testing.assert_array_equal(adm_crop(picture, 16), np.asarray(by_hand)[:, left : left + 16])
    assert adm_crop(picture, 16).shape == (16, 16, 3) and jax.device_count() >= 1
