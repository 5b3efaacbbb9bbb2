"""Accuracy of a classifier: by which names, over which labels, and of which weights there is none."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from heirloom.common.checkpoint import weights
from heirloom.common.cli import main
from heirloom.common.data.labelled import write_labels
from heirloom.common.errors import InputError
from heirloom.common.nn.functional import functional
from heirloom.common.vit.model import Vit, VitConfig
from learngene.evaluate import normalised
from learngene.inputs import IMAGENET
from learngene.pretrained import load

CFG = VitConfig(size=8, patch=4, width=16, layers=1, heads=2, hidden=32, classes=3)
NAMES = ("zebra", "apple", "moon")


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(3).choice(np.uint8([0, 255]), (24, 2, 2, 3)).repeat(4, axis=1).repeat(4, axis=2)


@pytest.fixture(scope="module")
def drawn(pictures, draw):
    """Parameters, and the logits of the pictures, whose mean is the same for each class."""
    vit = functional(Vit, CFG)
    params, pixels = draw(vit.spec), normalised(pictures.astype(np.float32) / 255, replace(IMAGENET, size=8))
    shift = np.asarray(vit.apply(params, pixels)).mean(0)
    params["head/bias"] = params["head/bias"] - shift
    return params, np.asarray(vit.apply(params, pixels))


@pytest.fixture(scope="module")
def model(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("model") / "vit"
    folder.mkdir()
    weights.write_params(folder, drawn[0])
    weights.write_config(folder, "learngene", CFG)
    return folder


def scores(model, data, out, *options):
    assert main(["eval", str(model), "--data", str(data), "--crop", "1", "--json", str(out), *options]) == 0
    return {row["metric"]: row["value"] for row in json.loads(out.read_text())["rows"]}


def test_folders_by_the_models_names_count_as_those(model, pictures, drawn, tmp_path, capsys):
    """Alphabetical order would be another one."""
    guesses = drawn[1].argmax(1)
    assert set(guesses) == {0, 1, 2}
    for i, number in enumerate(guesses):
        (tmp_path / "d" / NAMES[number]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures[i]).save(tmp_path / "d" / NAMES[number] / f"{i}.png")
    alphabetical = scores(model, tmp_path / "d", tmp_path / "e.json")["top1"]
    write_labels(model, NAMES)
    try:
        assert scores(model, tmp_path / "d", tmp_path / "e.json")["top1"] == 100 > alphabetical
        assert "note:" not in capsys.readouterr().out
        write_labels(model, ("one", "two", "three"))
        assert scores(model, tmp_path / "d", tmp_path / "e.json")["top1"] == alphabetical
        assert "class names do not match ('apple' is not one of one, two, three)" in capsys.readouterr().out
        write_labels(model, ("apple", "two"))
        assert main(["eval", str(model), "--data", str(tmp_path / "d")]) == 2
        said = (
            f"heirloom: {model / 'labels.json'} has 2 class names, and the model 3 classes: give one for each, or"
            " none\n"
        )
        assert capsys.readouterr().err == said
    finally:
        (model / "labels.json").unlink()


@pytest.mark.parametrize(
    ("labels", "message"), [((1, 2, 3), "label is 3"), ((-1, 0, 1), "label is -1"), ((0, 1.5, 2), "label is '0.0'")]
)
def test_labels_that_are_no_class_are_refused(model, pictures, tmp_path, capsys, labels, message):
    with open(tmp_path / "a.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label"])
        for i, label in enumerate(labels):
            Image.fromarray(pictures[i]).save(tmp_path / f"{i}.png")
            rows.writerow([f"{i}.png", label])
    assert main(["eval", str(model), "--data", str(tmp_path / "a.csv")]) == 2
    said = capsys.readouterr().err
    assert message in said and ".png: its label" in said and said.count("\n") == 1


def test_options_of_clips_are_refused(model, pictures, capsys):
    assert main(["eval", str(model), "--data", str(pictures), "--task", "zeroshot"]) == 2
    assert "is a classifier, and --task is for other models: leave it out" in capsys.readouterr().err


def test_a_picture_that_does_not_decode_is_named(model, pictures, tmp_path, capsys):
    for name in "abc":
        (tmp_path / name).mkdir()
        Image.fromarray(pictures[0]).save(tmp_path / name / "0.png")
    (tmp_path / "a" / "broken_17.png").write_bytes(b"\x89PNG no more")
    assert main(["eval", str(model), "--data", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'a' / 'broken_17.png'}: this picture does not decode" in said and said.count("\n") == 1


def test_weights_of_nan_have_no_score(tmp_path, drawn, pictures, capsys):
    params = drawn[0] | {"head/bias": np.full(3, np.nan, np.float32)}
    for name in ("vit", "d/a", "d/b", "d/c"):
        (tmp_path / name).mkdir(parents=True)
    weights.write_params(tmp_path / "vit", params)
    weights.write_config(tmp_path / "vit", "learngene", CFG)
    for name in "abc":
        Image.fromarray(pictures[0]).save(tmp_path / "d" / name / "0.png")
    assert main(["eval", str(tmp_path / "vit"), "--data", str(tmp_path / "d")]) == 2
    said = capsys.readouterr().err
    assert "this model's logits are NaN or infinite for 3 of 3 pictures" in said and said.count("\n") == 1


def test_a_model_of_grey_pictures_is_not_given_the_sum_of_three_channels(tmp_path, pictures, draw, capsys):
    cfg = replace(CFG, channels=1)
    for name in ("vit", "d/a", "d/b", "d/c"):
        (tmp_path / name).mkdir(parents=True)
    weights.write_params(tmp_path / "vit", draw(functional(Vit, cfg).spec))
    weights.write_config(tmp_path / "vit", "learngene", cfg)
    for name in "abc":
        Image.fromarray(pictures[0]).save(tmp_path / "d" / name / "0.png")
    assert main(["eval", str(tmp_path / "vit"), "--data", str(tmp_path / "d")]) == 2
    said = capsys.readouterr().err
    assert "pictures have 3 channels, and the model reads 1: take a model" in said and said.count("\n") == 1
    with pytest.raises(InputError, match="pictures have 3 channels"):
        load(tmp_path / "vit").predict(pictures[0])
