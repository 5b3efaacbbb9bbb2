"""Class names travel with a classifier, in the order of its logits, whatever the format calls them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.cli import main
from heirloom.common.data.labelled import read_labels, write_labels
from heirloom.common.data.pipeline import PipelineConfig
from heirloom.common.data.sources import SourceConfig
from heirloom.common.errors import InputError
from heirloom.common.files import read_json, write_json
from heirloom.common.mesh import start
from heirloom.common.train.parts import Opened
from heirloom.common.vit.model import VitConfig
from learngene import train
from learngene.config import Config
from learngene.labels import labels_of
from learngene.zoo import FAMILY

NAMES = ("zebra", "apple", "moon", "crane", "crane")  # not in alphabetical order, and ImageNet has two cranes
BY_NUMBER = {str(i): name for i, name in enumerate(NAMES)}
TURNED = dict(label_names=list(reversed(NAMES)), input_size=[3, 8, 8], num_classes=5)
CFG = VitConfig(size=8, patch=4, width=16, layers=2, heads=2, hidden=32, classes=5, tokens="cls", pool="cls")


@pytest.fixture
def folder(golden, tmp_path):
    """`folder(name, **fields)`: a copy of a golden whose config.json has these fields."""

    def make(name, **fields):
        copy = shutil.copytree(golden[0] / name, tmp_path / "theirs")
        write_json(copy / "config.json", read_json(copy / "config.json") | fields)
        return copy

    return make


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        # label2id has LABEL_0 and so on
        ("hf_vit", dict(id2label={str(i): name for i, name in reversed(list(enumerate(NAMES)))})),
        ("hf_vit", dict(id2label=BY_NUMBER, label2id=dict(zebra=0, apple=1, moon=2, crane=4))),
        ("hf_vit", dict(id2label=BY_NUMBER, label2id=dict(zebra="0", apple="1", moon="2", crane="4"))),
        ("timm_cls", dict(label_names=list(NAMES))),
        ("timm_cls", dict(label_names={str(i): name for i, name in enumerate(NAMES)})),
        ("timm_cls", dict(pretrained_cfg=dict(label_names=list(NAMES), input_size=[3, 8, 8], num_classes=5))),
    ],
)
def test_names_are_read_carried_and_written_back(folder, tmp_path, name, fields):
    donor = open_donor(folder(name, **fields), [FAMILY])
    assert labels_of(donor) == NAMES
    convert(donor, tmp_path / "ours", "heirloom", verify=False)
    assert (
        json.loads((tmp_path / "ours" / "labels.json").read_text())
        == list(NAMES)
        == list(read_labels(tmp_path / "ours"))
    )
    convert(open_donor(tmp_path / "ours", [FAMILY]), tmp_path / "back", donor.format, verify=False)
    assert labels_of(open_donor(tmp_path / "back", [FAMILY])) == NAMES
    config = read_json(tmp_path / "back" / "config.json")
    assert donor.format != "hf" or config["id2label"] == {str(i): name for i, name in enumerate(NAMES)}


def test_a_file_without_a_place_for_names_has_them_next_to_it(folder_of, tmp_path):
    pytest.importorskip("torch")  # a file of torch is written
    ours = folder_of(
        VitConfig(size=8, patch=4, width=192, layers=1, heads=3, hidden=32, classes=5, tokens="cls", pool="cls")
    )
    write_labels(ours, NAMES)
    convert(open_donor(ours, [FAMILY]), tmp_path / "deit", "deit", verify=False)
    assert labels_of(open_donor(tmp_path / "deit", [FAMILY])) == NAMES


def test_numbered_labels_are_no_names(golden, tmp_path):
    donor = open_donor(golden[0] / "hf_vit", [FAMILY])
    assert read_json(golden[0] / "hf_vit" / "config.json")["id2label"]["4"] == "LABEL_4" and labels_of(donor) is None
    convert(donor, tmp_path / "ours", "heirloom", verify=False)
    assert not (tmp_path / "ours" / "labels.json").exists()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("hf_vit", dict(id2label={"0": "ant", "1": "bee"}), "config.json has 2 class names, and the model 5 classes"),
        ("hf_vit", dict(id2label={"0": "ant", "2": "bee"}), "id2label: its numbers are not 0 to 1"),
        (
            "hf_vit",
            dict(id2label={"0": "LABEL_0", "1": "LABEL_1"}),
            "config.json has 2 class names, and the model 5 classes",
        ),
        ("hf_vit", dict(id2label=list(NAMES)), "id2label is .*, and must be an object from numbers to names"),
        ("hf_vit", dict(id2label=None), "id2label is None, and must be an object"),
        ("hf_vit", dict(id2label={}), "id2label is {}, and must be an object"),
        (
            "hf_vit",
            dict(id2label=BY_NUMBER, label2id=dict.fromkeys(NAMES, 0)),
            "id2label and label2id contradict each other about 'apple'",
        ),
        (
            "hf_vit",
            dict(id2label=BY_NUMBER, label2id=dict(zebra=0, apple=1, moon=2)),
            "contradict each other about 'crane'",
        ),
        (
            "hf_vit",
            dict(label2id=dict(zebra=0, apple=1, moon=2, crane=3, ant=4)),
            "contradict each other about 'zebra'",
        ),
        ("hf_vit", dict(label2id=list(NAMES)), "label2id must be an object from names to whole numbers"),
        (
            "timm_cls",
            dict(label_names=list(NAMES), pretrained_cfg=TURNED),
            "and pretrained_cfg: label_names name the classes diff",
        ),
        ("timm_cls", dict(label_names=list(NAMES) * 2), "config.json has 10 class names, and the model 5 classes"),
        ("timm_cls", dict(label_names=["ant", 2, "c", "d", "e"]), "label_names: class names are texts"),
    ],
)
def test_names_that_are_not_those_of_the_classes_are_refused(folder, tmp_path, name, fields, message):
    donor = open_donor(folder(name, **fields), [FAMILY])
    with pytest.raises(InputError, match=message):
        convert(donor, tmp_path / "ours", "heirloom", verify=False)
    assert not (tmp_path / "ours").exists()


def test_a_descendant_keeps_the_names_with_the_head(folder_of, tmp_path):
    ours = folder_of(CFG)
    write_labels(ours, NAMES)
    assert main(["expand", str(ours), str(tmp_path / "same"), "--depth", "2", "--size", "16"]) == 0
    assert read_labels(tmp_path / "same") == NAMES
    assert main(["expand", str(ours), str(tmp_path / "other"), "--depth", "2", "--classes", "3"]) == 0
    assert read_labels(tmp_path / "other") is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depth", "2", "--classes", "-2"], "classes is -2: choose 1 or more"),
        (["--depth", "2", "--classes", "0"], "classes is 0: choose 1 or more"),
        (["--depth", "2", "--size", "0"], "size is 0: choose 1 or more"),
        (["--depth", "2", "--size", "1000000000"], "size is 1000000000: choose 16384 or less"),
        (["--depth", "2", "--size", "6"], "patches of 4 px do not fill pictures of 6 px"),
        (["--depth", "0"], "depth is 0: choose 1 or more"),
        (["--depth", "-1"], "depth is -1: choose 1 or more"),
        (["--depth", "1000000"], "layers is 1000000: choose 1000 or less"),
        (["--depth", "2", "--map", "0,x"], "--map is '0,x': write whole numbers separated by commas"),
        (["--depth", "2", "--map", "0,-1"], "the map names stage -1: choose stages 0 to 1"),
        (["--depth", "2", "--map", "0"], "the map has 1 layers, the student 2"),
        (["--depth", "2", "--map", ","], "--map is ','"),
    ],
)
def test_expand_refuses_numbers_that_make_no_model(folder_of, tmp_path, capsys, gene, flags, message):
    assert main(["expand", str(folder_of(gene)), str(tmp_path / "out"), *flags]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and message in said[0] and not (tmp_path / "out").exists()


def test_labels_are_numbered_as_the_teachers_logits(folder_of, one_device, tmp_path):
    names, colours = ("red", "blue", "green"), dict(red=0, green=1, blue=2)
    for split, found in (("train", names), ("test", names[:2])):
        for name in found:
            (tmp_path / split / name).mkdir(parents=True)
            pixels = np.full((8, 8, 3), 40, np.uint8)
            pixels[..., colours[name]] = 255
            Image.fromarray(pixels).save(tmp_path / split / name / "0.png")
    teacher = folder_of(replace(CFG, classes=3), "teacher")
    write_labels(teacher, names)
    data = SourceConfig(str(tmp_path / "train"), text="")
    cfg = Config(student=replace(CFG, classes=3), data=data, held_out=replace(data, path=str(tmp_path / "test")))
    cfg = replace(cfg, crop=1.0, teacher=str(teacher), storage="device", pipeline=PipelineConfig(batch=3))
    opened = Opened(mesh=start(), donor=None, teacher=open_donor(teacher, [FAMILY]))
    batch = next(iter(train.batches(cfg, opened)))
    seen = {names[label]: colours[names[label]] for label in np.asarray(batch["label"])}
    for picture, label in zip(np.asarray(batch["image"]), np.asarray(batch["label"]), strict=True):
        assert picture[4, 4].argmax() == colours[names[label]]
    assert seen == colours
    train.sidecars(cfg, opened, tmp_path)
    assert read_labels(tmp_path) == names  # not in alphabetical order: `heirloom eval` must know
    pictures = train.held_out(cfg, names=train.labelled(cfg, opened, cfg.data).classes)
    assert [int(pictures.source[i]["label"]) for i in range(2)] == [1, 0]  # blue, red: green has no picture
    (tmp_path / "train" / "green").rename(tmp_path / "train" / "teal")
    with pytest.raises(InputError, match="its class 'teal' does not match exactly one of the 3 known"):
        train.labelled(cfg, opened, cfg.data)


def test_labels_are_numbered_as_the_logits_of_an_inherited_head(folder_of, one_device, tmp_path):
    names, size = ("red", "blue", "green"), replace(CFG, classes=3)
    for i, name in enumerate(names):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), 80 * i, np.uint8)).save(tmp_path / "train" / name / "0.png")
    donor, teacher = folder_of(size, "donor"), folder_of(size, "teacher")
    write_labels(donor, names)
    write_labels(teacher, ("green", "blue", "red"))
    cfg = Config(student=size, data=SourceConfig(str(tmp_path / "train"), text=""), head="inherit")
    opened = Opened(mesh=start(), donor=open_donor(donor, [FAMILY]), teacher=None)
    numbers = lambda cfg: list(train.labelled(cfg, opened, cfg.data).numbers.values())  # of blue, green, red  # noqa: E731
    assert numbers(cfg) == [1, 2, 0]
    train.sidecars(cfg, opened, tmp_path)
    assert read_labels(tmp_path) == names
    assert numbers(replace(cfg, head="fresh")) == [0, 1, 2]
    opened = replace(opened, teacher=open_donor(teacher, [FAMILY]))  # read by `numbers`, too
    with pytest.raises(InputError, match="class 0 is 'green' for the teacher and 'red' for the donor"):
        numbers(cfg)


@pytest.fixture
def trained(folder_of, one_device, tmp_path):
    """`trained(train, test, **fields)`: the folder of a model after one step, with its data in folders or by number."""

    def data(split, names):
        (tmp_path / split).mkdir()
        rows = [f"{split}-{name}.png,{name}" for name in names]
        for i, row in enumerate(rows):
            Image.fromarray(np.full((8, 8, 3), 60 * i, np.uint8)).save(tmp_path / split / row.partition(",")[0])
        (tmp_path / split / "a.csv").write_text("\n".join(["image,label", *rows]))
        return SourceConfig(str(tmp_path / split / "a.csv"), text="")

    def train_once(shown, test, **fields):
        cfg = Config(student=replace(CFG, classes=3), data=data("train", shown), held_out=data("test", test), **fields)
        cfg = replace(cfg, crop=1.0, storage="device", pipeline=PipelineConfig(batch=3), steps=1, eval_every=1)
        cfg.train(tmp_path / "run")
        return tmp_path / "run" / "model"

    return train_once


def test_names_in_alphabetical_order_are_saved(trained, tmp_path, capsys):
    model = trained(("ant", "bee", "cat"), ("cat", "ant"))
    assert read_labels(model) == ("ant", "bee", "cat")
    (tmp_path / "other.csv").write_text("image,label\n" + "\n".join(f"train/train-ant.png,{n}" for n in ("bee", "cow")))
    assert main(["eval", str(model), "--data", str(tmp_path / "other.csv")]) == 2
    assert "its class 'cow' does not match exactly one of the 3 known" in capsys.readouterr().err


def test_numbers_of_a_donors_classes_keep_its_names(trained, folder_of):
    donor, names = folder_of(replace(CFG, classes=3), "donor"), ("red", "blue", "green")
    write_labels(donor, names)
    model = trained((0, 1, 2), ("blue", "red"), donor=str(donor), method="select")  # held-out data has the names
    assert read_labels(model) == names


@pytest.mark.parametrize(("shown", "test"), [((0, 1, 2), ("cat", "ant", "bee")), (("cat", "ant", "bee"), (0, 1, 2))])
def test_numbers_of_unknown_classes_next_to_names_are_remarked(one_device, tmp_path, remarks, shown, test):
    for split, labels in (("train", shown), ("test", test)):
        rows = "".join(f"{label}.png,{label}\n" for label in labels)
        (tmp_path / f"{split}.csv").write_text(f"image,label\n{rows}")
        for label in labels:
            Image.new("RGB", (8, 8)).save(tmp_path / f"{label}.png")
    data, held_out = (SourceConfig(str(tmp_path / f"{split}.csv"), text="") for split in ("train", "test"))
    cfg = Config(student=replace(CFG, classes=3), data=data)
    opened = Opened(mesh=start(), donor=None, teacher=None)
    train.evaluator(replace(cfg, held_out=held_out), opened)
    names, numbers = (held_out, data) if 0 in shown else (data, held_out)
    said = f"{names.path} has names of classes: the numbers of {numbers.path} are taken for its classes in their order"
    assert remarks() == [said]
    train.evaluator(replace(cfg, held_out=data), opened)
    assert remarks() == []
