"""LiT from the command line at toy size: train, stop, resume, inherit, distil, sample."""

import json
import os
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from heirloom.common.checkpoint import weights
from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.checkpoint.weights import open_safetensors
from heirloom.common.cli import main
from heirloom.common.data.sources import SourceConfig
from heirloom.common.errors import InputError
from heirloom.common.files import read_json
from heirloom.common.mesh import start
from heirloom.common.train.loop import Run
from lit_jax import autoencoder_layouts, progress, train
from lit_jax.decode import PictureDecoder, pictures_of
from lit_jax.dit import DitConfig
from lit_jax.latents import data_origin
from lit_jax.origin import autoencoder_origin, read_origin, write_origin
from lit_jax.pretrained import load
from lit_jax.zoo import FAMILY
from tests.lit_jax.conftest import GOLDEN, SHORT, SIZES, TINY


def weights_of(run):
    return {path: np.array(value) for path, value in open_safetensors(run / "model" / "model.safetensors").items()}


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

    tiny = [flag for flag in TINY if not flag.startswith("--sample.")]
    arguments = ["train", "lit/smoke", "--run", str(run), *tiny, "--samples", "0", "--donor", donor, "--teacher", donor]
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
    assert record["first_format"] == "heirloom"
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
    assert "decode them with --autoencoder" in capsys.readouterr().err
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
    donor, mesh = open_donor(distilled / "model", [FAMILY]), start()
    assert pictures_of(donor, "", mesh) is not None and remarks() == []
    assert pictures_of(replace(donor, format="diffusers"), "", mesh) is not None
    assert "its 3 channels are taken for pixels" in remarks()[0]


def test_an_autoencoder_of_another_scale_than_a_foreign_models_is_said(tmp_path, remarks):
    donor, mesh = open_donor(GOLDEN, [FAMILY]), start()
    assert pictures_of(donor, str(AUTOENCODER), mesh) is not None
    assert not any("scaling_factor" in said for said in remarks())
    assert pictures_of(donor, other_factor(tmp_path), mesh) is not None
    assert any("other has latents with scaling_factor 0.5, and published models" in said for said in remarks())


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


def test_a_grids_name_may_have_a_dot(distilled, tmp_path):
    out = tmp_path / "cfg4.5"
    assert main(["sample", str(distilled), "--out", str(out), "--class", "1", "--count", "1", "--steps", "2"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


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
