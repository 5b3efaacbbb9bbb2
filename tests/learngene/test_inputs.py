"""Preprocessing of classifiers: what each format assumes, and what evaluation shows the model."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from heirloom.common import config
from heirloom.common.checkpoint.convert import convert, open_donor
from heirloom.common.cli import main
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.sources import SourceConfig
from heirloom.common.errors import InputError
from heirloom.common.files import read_json, write_json
from heirloom.common.nn.functional import functional
from heirloom.common.vit.model import Vit, VitConfig
from learngene.augment import AugmentConfig
from learngene.data import Example, evaluation
from learngene.inputs import IMAGENET, INCEPTION, preprocess_of
from learngene.train import Config, loss_fn, resolve
from learngene.trainer_arguments import preprocessing
from learngene.zoo import FAMILY, open_classifier


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of one wide picture each, with transparent pixels."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in "ab":
        (root / name).mkdir()
        Image.fromarray(rng.integers(0, 256, (20, 31, 4), dtype=np.uint8)).save(root / name / f"{name}.png")
    return root


@pytest.mark.parametrize(
    ("name", "mean", "shape", "whose"),
    [
        ("timm_cls", 0.485, ("shortest", 9, "bicubic"), "ImageNet's"),  # floor(8 / 0.875)
        ("hf_vit", 0.5, ("squash", 8, "bilinear"), "that of Google's ViTs"),
        ("hf_deit", 0.485, ("shortest", 9, "bicubic"), "ImageNet's"),
    ],
)
def test_what_a_format_assumes_is_said(golden, name, mean, shape, whose):
    found = preprocess_of(open_donor(golden[0] / name, [FAMILY]))
    assert (found.pre.mean[0], found.pre.mode, found.pre.resize, found.pre.interpolation) == (mean, *shape)
    assert f"; {whose} is assumed" in found.note and found.origin == ""


def test_an_old_folder_does_not_record_its_crop(folder_of, pictures, capsys):
    folder = folder_of(VitConfig(size=8, patch=4, width=16, layers=1, heads=2, hidden=32, classes=2))
    write_json(
        folder / "preprocess.json",
        dict(size=8, mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic", scale=[0.08, 1.0]),
    )
    found = preprocess_of(open_donor(folder, [FAMILY]))
    assert found.pre.resize == 9 and "does not record the crop; 0.875 of the side is assumed" in found.note
    command = ["eval", str(folder), "--data", str(pictures)]
    assert main(command) == 0 and capsys.readouterr().out.count("does not record the crop") == 1
    assert main([*command, "--crop", "0.5"]) == 0 and "crop" not in capsys.readouterr().out
    assert main([*command, "--crop", "1.5"]) == 2
    assert "crop is 1.5: choose a number from 0.01 to 1\n" in capsys.readouterr().err


def test_a_resize_counts_pixels_at_the_students_size():
    flags = ["--student.size", "384", "--preprocess.resize", "438"]
    with pytest.raises(InputError, match=r"preprocess.size is 224 and the .* 384; set --preprocess.size 384 too"):
        config.load("learngene/vit_s", flags)  # it would be scaled to 750
    assert config.load("learngene/vit_s", [*flags, "--preprocess.size", "384"]).pre.resize == 438
    assert config.load("learngene/vit_s", ["--preprocess.resize", "256"]).pre.resize == 256


@pytest.mark.parametrize(
    "pre",
    [
        Preprocess(8, resize=10),
        Preprocess(8, resize=8, mode="squash", interpolation="bilinear"),
        Preprocess(8, resize=11, mode="squash", corner="down"),
        Preprocess(8, resize=9, background="white"),
    ],
)
def test_evaluation_shows_what_the_checkpoint_was_trained_with(pre, pictures):
    batch = next(iter(evaluation(SourceConfig(str(pictures), text=""), "label", pre, 2, 2)))
    for image, name in zip(batch["image"], "ab", strict=True):
        picture = Image.open(pictures / name / f"{name}.png")
        if pre.background == "white":
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB")
        target = (pre.resize, pre.resize) if pre.mode == "squash" else (int(pre.resize * 31 / 20), pre.resize)
        resized = picture.resize(target, pre.filter)
        corner = [(side - 8) // 2 if pre.corner == "down" else round((side - 8) / 2) for side in target]
        np.testing.assert_array_equal(image, resized.crop((*corner, corner[0] + 8, corner[1] + 8)))


def test_training_crops_leave_the_margin_out(pictures):
    record = {"key": "a", "image": (pictures / "a" / "a.png").read_bytes(), "label": 0}
    rng = np.random.default_rng(0)
    seen = [
        Example(AugmentConfig(crop="shift"), pre, 2)(record, rng)["image"]
        for pre in (Preprocess(8), Preprocess(8, resize=12))
    ]
    np.testing.assert_array_equal(*seen)
    with pytest.raises(InputError, match=r"^a\.png: this picture does not decode"):
        Example(AugmentConfig(crop="shift"), Preprocess(8), 2)({"key": "a.png", "image": b"x", "label": 0}, rng)


def test_a_recipe_records_its_crop():
    cfg = Config(student=VitConfig(size=32, patch=8))
    assert cfg.pre == replace(IMAGENET, size=32, resize=36)
    assert replace(cfg, crop=1.0).pre.resize == 32
    assert replace(cfg, preprocess=Preprocess(224, resize=248)).pre.resize == 35  # its own margin goes first


@pytest.mark.parametrize("to", ["timm", "hf", "google"])
def test_every_format_keeps_the_preprocessing(golden, tmp_path, to):
    pre = Preprocess(8, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", resize=10, mode="squash")
    source = {"google": "hf_vit", "hf": "timm_cls"}.get(to, "timm_cls")
    convert(open_donor(golden[0] / source, [FAMILY]), tmp_path / "ours", "heirloom", verify=False)
    if to == "google":
        about = read_json(tmp_path / "ours" / "config.json")
        write_json(
            tmp_path / "ours" / "config.json",
            about | {"model": about["model"] | dict(activation="gelu_tanh", eps=1e-6)},
        )
    pre.save(tmp_path / "ours")
    convert(open_donor(tmp_path / "ours", [FAMILY]), tmp_path / "out", to, verify=False)
    found = preprocess_of(
        open_donor(tmp_path / "out", [FAMILY], **({"activation": "gelu_tanh"} if to == "google" else {}))
    ).pre
    same = replace(found, corner=pre.corner, background=pre.background)
    assert same == pre and found.corner == ("down" if to == "hf" else "round")


def test_a_wrong_file_stops_before_anything_is_written(golden, tmp_path):
    shutil.copytree(golden[0] / "hf_vit", tmp_path / "hf")
    write_json(tmp_path / "hf" / "preprocessor_config.json", dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, size=224))
    with pytest.raises(InputError, match=r"preprocessor_config\.json: size is 224; the model takes 8 x 8 pixels"):
        convert(open_donor(tmp_path / "hf", [FAMILY]), tmp_path / "ours", "heirloom", verify=False)
    assert not (tmp_path / "ours").exists()


def test_a_donor_whose_pictures_are_normalised_otherwise_is_remarked(folder_of, remarks):
    vit = VitConfig(size=8, patch=4, width=16, layers=2, heads=2, hidden=32, classes=3)
    folder, cfg, model = folder_of(vit), Config(student=vit, method="select"), functional(Vit, vit)
    INCEPTION.at(8).save(folder)
    donor = open_classifier(str(folder))
    resolve(cfg, model, donor)
    (said,) = remarks()
    assert said.startswith("the donor normalises pictures with mean [0.5, 0.5, 0.5] and std [0.5, 0.5, 0.5], the")
    resolve(replace(cfg, preprocess=INCEPTION), model, donor)
    assert remarks() == []
    other = replace(vit, activation="gelu_tanh")
    resolve(replace(cfg, preprocess=INCEPTION, student=other), functional(Vit, other), donor)
    (said,) = remarks()
    assert said.startswith("the donor's activation is 'gelu', the student's 'gelu_tanh'")


def test_a_normalisation_that_is_only_assumed_is_remarked_too(golden, remarks):
    donor = open_donor(golden[0] / "hf_vit", [FAMILY])  # without preprocessor_config.json
    cfg = Config(student=replace(donor.cfg, layers=2), method="stack")
    remarks()
    resolve(cfg, functional(Vit, cfg.student), donor)
    assumed, said = remarks()
    assert "that of Google's ViTs is assumed" in assumed
    assert said.startswith("the donor normalises pictures with mean [0.5, 0.5, 0.5] and std [0.5, 0.5, 0.5], the")
    student = functional(Vit, donor.cfg)
    loss_fn(replace(cfg, student=donor.cfg), student, donor)  # as a teacher
    assert "that of Google's ViTs is assumed" in "".join(remarks())


def test_what_timms_trainer_saved_is_assumed(folder_of, tmp_path):
    args = dict(mean=[0.5, 0.5, 0.5], std=[0.25], crop_pct=0.5, interpolation="bilinear", crop_mode=None)
    found, whose = preprocessing(dict(args=args), IMAGENET.at(8), "ImageNet's")
    assert found == replace(IMAGENET.at(8).cropped(0.5), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear")
    assert whose.startswith("ImageNet's, with mean, std, interpolation, crop_pct of the trainer's arguments next to")
    for nothing in (dict(), dict(args=dict(mean=None, interpolation="")), dict(hyper_parameters=dict(std=0.02))):
        assert preprocessing(nothing, IMAGENET, "ImageNet's") == (IMAGENET, "ImageNet's")
    with pytest.raises(InputError, match="the trainer's arguments next to the tensors: interpolation is 'random'"):
        preprocessing(dict(args=dict(interpolation="random")), IMAGENET, "ImageNet's")
    torch = pytest.importorskip("torch")
    sizes = dict(width=192, layers=1, heads=3, hidden=32, classes=5, tokens="cls", pool="cls")
    ours = open_donor(folder_of(VitConfig(size=8, patch=4, **sizes)), [FAMILY])
    convert(ours, tmp_path / "deit", "deit", verify=False)
    (tmp_path / "deit" / "preprocess.json").unlink()
    (file,) = (tmp_path / "deit").glob("*.pth")
    torch.save(torch.load(file) | {"args": args}, file)
    read = preprocess_of(open_donor(tmp_path / "deit", [FAMILY]))
    assert read.pre == found and "interpolation, crop_pct of the trainer's arguments" in read.note


def test_a_checkpoint_of_timms_own_trainer_has_timms_preprocessing():
    """timm's trainer takes the architecture's numbers where its arguments set none; DeiT's and MAE's ImageNet's."""
    unset = dict.fromkeys(("mean", "std", "crop_pct", "crop_mode"))

    def read(name, arch=None, **args):
        return preprocessing(dict(arch=arch, args=unset | dict(model=name) | args), IMAGENET.at(8), "ImageNet's")

    pre, whose = read("vit_tiny_patch16_224", "vit_tiny_patch16_224")
    assert pre == replace(IMAGENET.at(8), mean=(0.5,) * 3, std=(0.5,) * 3).cropped(0.9)
    assert whose == "timm's for vit_tiny_patch16_224"
    pre, whose = read("vit_tiny_patch16_224", "vit_tiny_patch16_224", std=[0.25], crop_mode="squash")
    assert (pre.mean, pre.std, pre.mode, pre.resize) == ((0.5,) * 3, (0.25,) * 3, "squash", 8)
    assert whose.startswith("timm's for vit_tiny_patch16_224, with std, crop_mode of the trainer's arguments next to")
    assert read("vit_base_patch16_224.mae", "vit_base_patch16_224.mae")[0].mean == IMAGENET.mean  # a tag with another
    assert read("vit_base_patch16_224.new", "vit_base_patch16_224.new")[0].mean[0] == 0.5
    for other in (read("vit_tiny_patch16_224"), read("my_vit", "my_vit"), read("vit_tiny_patch16_224", "vit_small")):
        assert other == (IMAGENET.at(8), "ImageNet's")
