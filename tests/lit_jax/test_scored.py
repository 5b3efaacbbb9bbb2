"""Scores of a trained run: drawn, interrupted, compared with a reference, or refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from heirloom.common.cli import main
from heirloom.common.evaluate import generated
from heirloom.common.evaluate.extractor import Extractor
from heirloom.common.evaluate.inception import Features, InceptionConfig
from heirloom.common.files import read_json
from heirloom.common.nn.dense import Dense
from heirloom.common.nn.functional import functional
from lit_jax import evaluate
from lit_jax.decode import PictureDecoder
from lit_jax.zoo import open_dit


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


def test_scores_need_features_and_a_reference(distilled, capsys):
    assert main(["eval", str(distilled), "--data", "emoji"]) == 2
    assert "give --features" in capsys.readouterr().err
    assert main(["eval", str(distilled), "--features", "x"]) == 2
    assert "give --data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "emoji", "--task", "zeroshot"], "draws pictures of classes, and --task is for other models"),
        (["--data", "emoji", "--text", "title"], "--text is for other models: leave it out"),
        (["--data", "x.npz", "--split", "test"], "x.npz has neither splits nor columns, and --split chooses one"),
    ],
)
def test_flags_without_effect_are_refused(flags, words, capsys):
    assert main(["eval", "embedded:digits_dit", "--features", "x", *flags]) == 2
    assert words in capsys.readouterr().err


def test_saved_pictures_are_of_one_decoder(tmp_path):
    file, donor = tmp_path / "vae.safetensors", open_dit("embedded:digits_dit")
    found = []
    for content in ("one", "two"):
        file.write_text(content)
        decoder = PictureDecoder(lambda x: x, file=file)
        found.append(evaluate.sampling_settings(donor, decoder, evaluate.EvalConfig(save="x.npz")))
    assert found[0] | {"decoder": None} == found[1] | {"decoder": None} and found[0] != found[1]
    assert "decoder" not in evaluate.sampling_settings(donor, PictureDecoder(lambda x: x), evaluate.EvalConfig())
