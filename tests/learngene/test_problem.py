"""Classifiers whose outputs are no logits of one class of several: said, carried, and given no probabilities."""

import shutil

import numpy as np
import pytest

import learngene
from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.cli import main
from heirloom.common.errors import InputError
from heirloom.common.files import read_json, write_json
from heirloom.common.nn.functional import functional
from heirloom.common.vit.model import Vit, VitConfig
from learngene.config import Config
from learngene.problem import problem_of
from learngene.train import loss_fn
from learngene.zoo import FAMILY

KIND = "multi_label_classification"
SMALL = VitConfig(size=8, patch=4, width=16, layers=1, heads=2, hidden=32, classes=1)
PICTURE = np.zeros((8, 8, 3), np.uint8)


@pytest.fixture
def theirs(golden, tmp_path):
    """`theirs(kind)`: the folder of a ViT of transformers, or of another golden, with this problem_type."""

    def make(kind, name="hf_vit"):
        folder = shutil.copytree(golden[0] / name, tmp_path / "theirs")
        write_json(folder / "config.json", read_json(folder / "config.json") | {"problem_type": kind})
        return folder

    return make


@pytest.mark.parametrize("name", ["hf_vit", "timm_cls"])
def test_the_kind_goes_through_our_format_and_back(theirs, name, tmp_path, remarks):
    donor = open_donor(theirs(KIND, name), [FAMILY])
    convert(donor, tmp_path / "ours", "heirloom", verify=False)
    assert any(f"problem_type is '{KIND}': a picture may have several classes" in text for text in remarks())
    convert(open_donor(tmp_path / "ours", [FAMILY]), tmp_path / "back", donor.format, verify=False)
    assert read_json(tmp_path / "back" / "config.json")["problem_type"] == KIND
    assert problem_of(open_donor(tmp_path / "back", [FAMILY])) == KIND
    assert main(["expand", str(tmp_path / "ours"), str(tmp_path / "same"), "--depth", "2"]) == 0
    assert main(["expand", str(tmp_path / "ours"), str(tmp_path / "fresh"), "--depth", "2", "--classes", "3"]) == 0
    kinds = {name: problem_of(open_donor(tmp_path / name, [FAMILY])) for name in ("same", "fresh")}
    assert kinds == {"same": KIND, "fresh": ""}


@pytest.mark.parametrize("kind", [KIND, "regression"])
def test_such_a_model_has_neither_probabilities_nor_accuracy(theirs, kind, tmp_path, capsys, one_device):
    folder = theirs(kind)
    vit = learngene.load(folder)
    with pytest.raises(InputError, match=f"problem_type is '{kind}'.*; probabilities need one class of several"):
        vit.predict(PICTURE)
    with pytest.raises(InputError, match="accuracy needs one class"):
        learngene.evaluate(vit, tmp_path)
    vit.save(tmp_path / "saved")
    assert learngene.load(tmp_path / "saved").problem == learngene.expand(vit, 2).problem == kind
    assert main(["eval", str(folder), "--data", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{folder}: problem_type is '{kind}'" in said and said.count("\n") == 1
    student = open_donor(folder, [FAMILY]).cfg
    with pytest.raises(InputError, match="distillation needs one class of several"):
        loss_fn(Config(student=student), functional(Vit, student), open_donor(folder, [FAMILY]))


def test_one_output_is_a_number(folder_of, theirs, one_device):
    with pytest.raises(InputError, match="problem_type is 'regression': the outputs are numbers, not logits"):
        learngene.load(folder_of(SMALL)).predict(PICTURE)
    assert problem_of(open_donor(theirs("single_label_classification"), [FAMILY])) == ""


def test_a_kind_that_is_not_known_is_refused(theirs):
    with pytest.raises(InputError, match="problem_type is 'ranking'; only single_label_classification, multi_label"):
        problem_of(open_donor(theirs("ranking"), [FAMILY]))
