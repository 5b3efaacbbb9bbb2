"""Preprocessing in the files of transformers, open_clip and timm: read in full or refused, and written back."""

import json
from dataclasses import replace
from typing import get_args

import pytest

from heirloom.common.data.pictures import Background
from heirloom.common.data.preprocess import Preprocess
from heirloom.common.data.preprocess_formats import Found, find, write
from heirloom.common.errors import InputError

OWN = Preprocess(32)
CLIP = dict(
    image_processor_type="CLIPImageProcessor",
    image_mean=[0.1, 0.2, 0.3],
    image_std=[0.4, 0.5, 0.6],
    size={"shortest_edge": 32},
    crop_size={"height": 32, "width": 32},
)
VIT = CLIP | dict(image_processor_type="ViTImageProcessor", size={"height": 32, "width": 32}, crop_size=None)
HALF = (0.5, 0.5, 0.5)


def read(folder, format="hf", size=32, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return find(folder, format, size, OWN.at(size), "CLIP's own")


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (CLIP, {}),
        (
            CLIP
            | {
                "size": 32,
                "crop_size": 32,
                "image_processor_type": None,
                "feature_extractor_type": "CLIPFeatureExtractor",
            },
            {},
        ),
        (
            CLIP | {"image_processor_type": "CLIPImageProcessorFast", "crop_size": [32, 32], "resample": 1},
            {"interpolation": "lanczos"},
        ),
        (CLIP | {"size": {"shortest_edge": 40, "longest_edge": None}}, {"resize": 40}),
        (CLIP | {"size": {"height": 40, "width": 40}}, {"resize": 40, "mode": "squash"}),
        (CLIP | {"do_convert_rgb": False}, {"background": "none"}),
        (VIT, {"mode": "squash", "interpolation": "bilinear", "background": "none"}),
        (VIT | {"size": 32, "resample": 3, "do_convert_rgb": True}, {"mode": "squash"}),
        (
            VIT | {"size": 36, "default_to_square": False, "crop_size": 32, "do_center_crop": True, "resample": 3},
            {"resize": 36, "background": "none"},
        ),
        (
            VIT | {"image_processor_type": "DeiTFeatureExtractor", "size": 40, "crop_size": 32},
            {"resize": 40, "mode": "squash", "background": "none"},
        ),
        (VIT | {"image_processor_type": "SiglipImageProcessor"}, {"mode": "squash"}),
        (CLIP | {"image_mean": 0.5, "image_std": [0.25]}, {"mean": HALF, "std": (0.25,) * 3}),
        (CLIP | {"do_normalize": False}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
        (
            CLIP | {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]},
            {"mean": HALF, "std": HALF},
        ),
        (CLIP | {"do_rescale": False, "image_mean": 127.5, "image_std": 255.0}, {"mean": HALF, "std": (1.0,) * 3}),
        (
            CLIP
            | {
                "do_pad": False,
                "pad_size": {"height": 99, "width": 99},
                "processor_class": "CLIPProcessor",
                "_valid": [],
            },
            {},
        ),
    ],
)
def test_transformers_file_is_read_in_full(theirs, expected, tmp_path):
    found = read(tmp_path, preprocessor_config=theirs)
    base = Preprocess(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), resize=32, corner="down", background="white")
    assert (found.pre, found.origin, found.note) == (replace(base, **expected), "preprocessor_config.json", "")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"image_mean": "0.5"}, "image_mean is '0.5', and must be 1 or 3 finite numbers"),
        ({"image_mean": [0.5, 0.5]}, "must be 1 or 3 finite numbers"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "must be 1 or 3 finite numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "finite numbers above 0"),
        ({"image_std": [0.5, True, 0.5]}, "finite numbers above 0"),
        ({"resample": 9}, "resample is 9, and must be from 0 to 5"),
        ({"resample": "best"}, "resample is 'best', and must be a whole number"),
        ({"size": {"longest_edge": 32}}, "size is {'longest_edge': 32}"),
        (
            {"size": {"shortest_edge": 32, "longest_edge": 64}},
            "size is .*it must be a number of pixels, shortest_edge, or",
        ),
        ({"size": {"height": 32, "width": 40}}, "only squares"),
        ({"size": {"shortest_edge": -32}}, "size: shortest_edge is -32, and must be from 1"),
        ({"size": [32]}, r"size is \[32\]"),
        ({"size": "32"}, "size is '32'"),
        ({"size": {"shortest_edge": 31}}, "resize is 31 and size 32"),
        ({"crop_size": {"height": 48, "width": 48}, "size": 48}, "crop_size is .* the model takes 32 x 32 pixels"),
        ({"crop_size": {"height": 32, "width": 30}}, "crop_size is .* only squares"),
        ({"crop_size": 1.5}, "crop_size is 1.5"),
        ({"do_center_crop": False}, "do_center_crop is False; the model needs square pictures"),
        ({"do_resize": False}, "do_resize is False"),
        ({"do_resize": "no"}, "do_resize is 'no', and must be true or false"),
        ({"do_pad": True}, "do_pad is True; this processing is not supported"),
        ({"crop_pct": 0.9}, "crop_pct is 0.9; this processing is not supported"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order is True"),
        ({"rescale_factor": 0}, "rescale_factor is 0, and must be a finite number above 0"),
        (
            {"image_processor_type": "BlipImageProcessor"},
            "'BlipImageProcessor'; only processors of CLIP, ViT, DeiT, Bit, Siglip can be read",
        ),
        (  # which processor it is before what that processor has
            {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.875},
            "'ConvNextImageProcessor'; only processors of CLIP, ViT, DeiT, Bit, Siglip can be read",
        ),
        (
            {"image_processor_type": None},
            "'resample' is missing; add it, or the image_processor_type that it depends on",
        ),
    ],
)
def test_what_transformers_file_asks_for_and_is_not_honoured_is_refused(change, complaint, tmp_path):
    with pytest.raises(InputError, match=rf"^[^\n]*preprocessor_config\.json: [^\n]*{complaint}[^\n]*$"):
        read(tmp_path, preprocessor_config=CLIP | change)


@pytest.mark.parametrize("kind", ["CLIP", "ViT", "DeiT", "Bit", "Siglip"])
def test_the_mean_is_that_of_the_processor_where_its_file_has_none(kind, tmp_path):
    about = dict(image_processor_type=f"{kind}ImageProcessor", size={"height": 32, "width": 32}, crop_size=32)
    pre = read(tmp_path, preprocessor_config=about).pre
    expected = (OWN.mean, OWN.std) if kind in ("CLIP", "Bit") else (HALF, HALF)
    assert (pre.mean, pre.std) == expected


def test_of_transformers_two_files_the_newer_is_taken(tmp_path):
    newer = {"image_processor": CLIP | {"image_mean": HALF}, "processor_class": "CLIPProcessor"}
    found = read(tmp_path, preprocessor_config=CLIP, processor_config=newer)
    assert (found.pre.mean, found.origin) == (HALF, "processor_config.json")
    found = read(tmp_path, preprocessor_config=CLIP, processor_config={"processor_class": "CLIPProcessor"})
    assert (found.pre.mean, found.origin) == ((0.1, 0.2, 0.3), "preprocessor_config.json")
    with pytest.raises(InputError, match=r"processor_config\.json: image_processor is 7"):
        read(tmp_path, processor_config={"image_processor": 7})


def test_the_model_says_which_processor_it_is_where_its_file_does_not(tmp_path):
    old = {name: value for name, value in VIT.items() if name != "image_processor_type"} | {"size": 32}
    assert read(tmp_path, preprocessor_config=old, config={"model_type": "vit"}).pre.mode == "squash"
    old |= {"crop_size": 32}
    assert read(tmp_path, preprocessor_config=old, config={"model_type": "clip"}).pre.mode == "shortest"


def test_a_size_that_is_not_said_is_the_models_and_that_is_said(tmp_path, remarks):
    found = read(tmp_path, preprocessor_config={name: value for name, value in CLIP.items() if "size" not in name})
    assert (found.pre.size, found.pre.resize) == (
        32,
        32,
    ) and "has no size; the size of the model, 32, is assumed" in found.note
    assert found.announced() == found.pre and remarks() == [found.note]


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        ({}, {}),
        (
            {"size": 32, "mode": "RGB", "mean": HALF, "std": HALF, "resize_mode": "shortest"},
            {"mean": HALF, "std": HALF},
        ),
        (
            {"size": [32, 32], "interpolation": "bilinear", "resize_mode": "squash"},
            {"interpolation": "bilinear", "mode": "squash"},
        ),
        ({"interpolation": "random", "resize_mode": "longest", "fill_color": 7}, {"mode": "longest", "fill": 7}),
    ],
)
def test_open_clips_file_is_read_in_full(theirs, expected, tmp_path):
    found = read(tmp_path, "open_clip", open_clip_config={"preprocess_cfg": theirs})
    assert found == Found(replace(OWN, resize=32, background="last", **expected), "open_clip_config.json")


def test_open_clips_size_is_the_models(tmp_path):
    found = read(tmp_path, "open_clip", open_clip_config={"preprocess_cfg": {"size": 48}})
    assert found.pre.size == 32 and "is for pictures of 48 pixels; the size of the model, 32, is used" in found.note


@pytest.mark.parametrize(
    ("theirs", "complaint"),
    [
        ({"resize_mode": "crop"}, "resize_mode is 'crop'; only 'shortest', 'squash', 'longest' can be read"),
        ({"interpolation": "lanczos"}, "interpolation is 'lanczos'; only 'bicubic', 'bilinear', 'random' can be read"),
        ({"mean": "imagenet"}, "mean is 'imagenet'"),
        ({"fill_color": [1, 2, 3]}, "fill_color is .1, 2, 3., and must be a whole number"),
        ({"mode": "L"}, "mode is 'L'"),
        ({"crop": 1}, "the field 'crop' .1. is not known here and may change what the model sees"),
        ([], "preprocess_cfg is"),
    ],
)
def test_what_open_clips_file_asks_for_and_is_not_honoured_is_refused(theirs, complaint, tmp_path):
    with pytest.raises(InputError, match=rf"^[^\n]*open_clip_config\.json: [^\n]*{complaint}[^\n]*$"):
        read(tmp_path, "open_clip", open_clip_config={"preprocess_cfg": theirs})


IMAGENET = Preprocess(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize=36)


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        ({"crop_pct": 0.875}, {}),
        # what is left out is timm's: 0.875, bicubic, center
        ({"mean": HALF, "std": HALF}, {"mean": HALF, "std": HALF}),
        (
            {"crop_pct": 1.0, "interpolation": "bilinear", "crop_mode": "center"},
            {"resize": 32, "interpolation": "bilinear"},
        ),
        ({"crop_pct": 0.9, "crop_mode": "squash", "input_size": [3, 32, 32]}, {"resize": 35, "mode": "squash"}),
        ({"crop_pct": 0.875, "test_input_size": [3, 64, 64], "test_crop_pct": 1.0, "fixed_input_size": True}, {}),
    ],
)
def test_timms_file_is_read_in_full(theirs, expected, tmp_path):
    for about in ({"pretrained_cfg": theirs}, theirs):  # old files have the fields at the top
        found = read(tmp_path, "timm", config={"architecture": "vit_tiny_patch16_224"} | about)
        assert (found.pre, found.origin, found.note) == (replace(IMAGENET, **expected), "config.json", "")


@pytest.mark.parametrize(
    ("theirs", "complaint"),
    [
        ({"crop_mode": "border"}, "crop_mode is 'border'; only 'center', 'squash' can be read"),
        ({"crop_mode": "middle"}, "crop_mode is 'middle'; only 'center', 'squash' can be read"),
        ({"interpolation": "random"}, "interpolation is 'random'; only 'nearest'"),  # timm evaluates with none
        ({"crop_pct": "0.9"}, "crop_pct is '0.9'"),
        ({"crop_pct": 1.2}, "crop_pct is 1.2, and must be a finite number above 0 and at most 1"),
        ({"mean": [0.5, 0.5]}, "must be 1 or 3 finite numbers"),
        ({"crop_pct": 0.9, "input_size": 32}, "input_size is 32, and must be a list of 3 positive whole numbers"),
        ({"crop_pct": 0.9, "crop_border_pixels": 2}, "crop_border_pixels is 2"),
    ],
)
def test_what_timms_file_asks_for_and_is_not_honoured_is_refused(theirs, complaint, tmp_path):
    with pytest.raises(InputError, match=rf"^[^\n]*config\.json: [^\n]*{complaint}[^\n]*$"):
        read(tmp_path, "timm", config={"architecture": "vit", "pretrained_cfg": theirs})


def test_timms_other_input_size_is_said(tmp_path):
    found = read(
        tmp_path, "timm", config={"architecture": "vit", "pretrained_cfg": {"mean": HALF, "input_size": [3, 224, 224]}}
    )
    assert (found.pre.size, found.pre.resize) == (
        32,
        36,
    ) and "is for pictures of 224 x 224; the size of the model, 32" in found.note


def test_a_checkpoint_without_preprocessing_says_whose_is_assumed(tmp_path, remarks):
    found = read(
        tmp_path, "timm", config={"architecture": "vit", "pretrained_cfg": {"num_classes": 5}}, open_clip_config={}
    )
    assert (found.pre, found.origin) == (OWN, "")
    found.announced()
    (said,) = remarks()
    assert said.startswith(f"preprocessing: none with {tmp_path}; CLIP's own is assumed (mean 0.481/0.458/0.408")


def test_our_file_goes_first_and_the_formats_own_second(tmp_path):
    files = dict(preprocessor_config=CLIP, open_clip_config={"preprocess_cfg": {"mean": HALF}})
    assert read(tmp_path, "hf", **files).pre.mean == (0.1, 0.2, 0.3)
    assert read(tmp_path, "open_clip").pre.mean == HALF
    replace(OWN, mean=(0.7,) * 3).save(tmp_path)
    assert read(tmp_path, "hf").pre.mean == (0.7,) * 3
    with pytest.raises(InputError, match=r"preprocess\.json: size is 32, and the model takes 48 x 48"):
        read(tmp_path, "hf", 48)


OTHER = Preprocess(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", resize=32)


@pytest.mark.parametrize(
    ("format", "change"),
    [
        *[(format, {}) for format in ("hf", "open_clip", "timm", "heirloom", "original")],
        *[(format, {"mode": "squash"}) for format in ("hf", "open_clip", "timm", "heirloom")],
        *[(format, {"resize": side}) for format in ("hf", "timm", "heirloom") for side in (33, 36, 37, 50)],
        *[(format, {"resize": 37, "mode": "squash"}) for format in ("hf", "timm", "heirloom")],
        *[(format, {"mode": "longest", "fill": 9}) for format in ("open_clip", "heirloom")],
        *[(format, {"interpolation": "lanczos"}) for format in ("hf", "timm", "heirloom")],
    ],
)
def test_preprocessing_travels_there_and_back(format, change, tmp_path):
    pre = replace(OTHER, **change)
    (tmp_path / "open_clip_config.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"architecture": "vit"}')
    write(pre, tmp_path, format)
    found = read(tmp_path, format)
    own = {"hf": dict(corner="down", background="white"), "open_clip": dict(background="last")}  # the library's rules
    assert found.pre == replace(pre, **own.get(format, {})) and found.origin


@pytest.mark.parametrize(
    ("format", "change", "complaint"),
    [
        ("hf", {"mode": "longest"}, "transformers' image processors .* do not pad"),
        ("timm", {"mode": "longest"}, "timm pads with the mean colour only"),
        ("open_clip", {"resize": 36}, "resizes to 36 and crops 32"),
        ("open_clip", {"interpolation": "box"}, "bicubic or bilinear interpolation, this model's preprocessing by box"),
    ],
)
def test_what_a_format_cannot_express_is_not_written(format, change, complaint, tmp_path):
    with pytest.raises(InputError, match=complaint):
        write(replace(OTHER, **change), tmp_path, format)
    assert not list(tmp_path.iterdir())


def test_a_background_is_said_where_it_is_lost(tmp_path, remarks):
    (tmp_path / "open_clip_config.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    said = {
        "open_clip": ("last", "open_clip resizes before it drops alpha, and this model "),
        "timm": ("none", "timm drops alpha before it resizes, and this model "),
        "hf": ("white", "transformers puts transparent pictures on white, and this model "),
    }
    for format, (own, words) in said.items():
        for background in get_args(Background):
            write(replace(OTHER, background=background), tmp_path, format)
            lost = remarks()
            assert lost == [] if background == own else len(lost) == 1 and lost[0].startswith(words)
    write(replace(OTHER, background="last"), tmp_path, "heirloom")
    assert remarks() == [] and Preprocess.load(tmp_path).background == "last"
