"""Our pixels against those of transformers' own image processors, and theirs from the files we write."""

import numpy as np
import pytest
from PIL import Image

from heirloom.common.data.pictures import decode
from heirloom.common.data.preprocess import Preprocess, eval_image
from heirloom.common.data.preprocess_formats import find, write

transformers = pytest.importorskip("transformers")
CLIP = transformers.CLIPImageProcessorPil
VIT = transformers.ViTImageProcessorPil
DEIT = transformers.DeiTImageProcessorPil
SIZES = [(90, 60), (61, 97), (32, 32), (20, 41), (33, 32)]
SQUARE = {"height": 32, "width": 32}


def pictures():
    rng = np.random.default_rng(0)
    yield from (Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES)


def theirs(processor, picture):
    return np.asarray(processor(images=picture, return_tensors="np")["pixel_values"])[0].transpose(1, 2, 0)


@pytest.mark.parametrize(
    "processor",
    [
        CLIP(size={"shortest_edge": 32}, crop_size=SQUARE),
        CLIP(size={"shortest_edge": 37}, crop_size=SQUARE, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        CLIP(size=40, crop_size=32, rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3),
        CLIP(size=SQUARE, do_center_crop=False, resample=1),
        CLIP(size={"shortest_edge": 33}, crop_size=SQUARE, do_normalize=False),
        VIT(size=SQUARE),
        VIT(size=32, resample=0),
        VIT(size=SQUARE, do_rescale=False, image_mean=[127.5] * 3, image_std=[127.5] * 3),
        DEIT(size=37, crop_size=32),
    ],
    ids=str,
)
def test_pixels_are_those_of_the_processor(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    pre = find(tmp_path, "hf", 32, Preprocess(32), "").pre
    for picture in pictures():
        np.testing.assert_allclose(eval_image(decode(picture), pre), theirs(processor, picture), atol=1e-6)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "I;16"])
def test_modes_are_converted_as_by_the_processor(mode, tmp_path):
    rng = np.random.default_rng(0)
    deep = Image.fromarray(rng.integers(0, 65536, (50, 70)).astype(np.uint16))
    picture = (
        deep
        if mode == "I;16"
        else Image.fromarray(rng.integers(0, 256, (50, 70, 4), dtype=np.uint8)).convert("RGB").convert(mode)
    )
    if mode in ("RGBA", "LA"):
        picture.putalpha(Image.fromarray(rng.integers(0, 256, (50, 70), dtype=np.uint8)))
    processor = CLIP(size={"shortest_edge": 32}, crop_size=SQUARE)
    processor.save_pretrained(tmp_path)
    picture.save(tmp_path / "x.png")
    pre = find(tmp_path, "hf", 32, Preprocess(32), "").pre
    ours = eval_image(decode(tmp_path / "x.png", pre.background), pre)
    np.testing.assert_allclose(ours, theirs(processor, Image.open(tmp_path / "x.png")), atol=1e-6)


@pytest.mark.parametrize(
    "pre",
    [
        Preprocess(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", resize=32, corner="down"),
        Preprocess(32, resize=37, corner="down"),
        Preprocess(32, mode="squash", interpolation="lanczos"),
        Preprocess(32, mode="squash", resize=37, corner="down"),
    ],
)
def test_transformers_makes_our_pixels_from_our_file(pre, tmp_path):
    write(pre, tmp_path, "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for picture in pictures():
        np.testing.assert_allclose(theirs(processor, picture), eval_image(picture, pre), atol=1e-6)


def test_clips_processor_file_is_read(tmp_path):
    processor = CLIP(size={"shortest_edge": 36}, crop_size=SQUARE, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    tokenizer = transformers.CLIPTokenizer()
    transformers.CLIPProcessor(processor, tokenizer).save_pretrained(tmp_path)
    found = find(tmp_path, "hf", 32, Preprocess(32), "")
    assert (found.pre.mean, found.pre.std, found.pre.resize) == ((0.5,) * 3, (0.25,) * 3, 36)
    assert found.origin == "processor_config.json"
