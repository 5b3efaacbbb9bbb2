import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from heirloom.common.data import preprocess
from heirloom.common.data.pictures import Box, decode
from heirloom.common.data.preprocess import (
    FILTERS,
    Preprocess,
    centre,
    denormalise,
    eval_image,
    normalise,
    random_box,
    train_image,
)
from heirloom.common.errors import InputError


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "L", "CMYK", "I;16", "RGB"])
def test_a_picture_that_becomes_rgb_last_is_resized_in_its_own_mode(mode, tmp_path):
    """As in open_clip's transforms: Resize, CenterCrop and RandomResizedCrop, then the conversion."""
    deep = Image.fromarray(np.random.default_rng(0).integers(0, 300, (50, 70)).astype(np.uint16))
    picture = deep if mode == "I;16" else noise(70, 50).convert(mode)
    if mode in ("RGBA", "LA"):
        picture.putalpha(Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 70), dtype=np.uint8)))
    picture.save(file := tmp_path / ("x.tiff" if mode == "CMYK" else "x.png"))
    pre = Preprocess(32, background="last")
    theirs = Image.open(file).resize((44, 32), Image.Resampling.BICUBIC).crop((6, 0, 38, 32)).convert("RGB")
    ours = centre(decode(file, "last"), pre)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    first = centre(decode(file), replace(pre, background="none"))
    assert (np.asarray(ours) != np.asarray(first)).any() == (mode in ("RGBA", "LA", "P", "1", "CMYK", "I;16"))
    crop = train_image(decode(file, "last"), pre, np.random.default_rng(0))
    assert crop.shape == (32, 32, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1"])
def test_a_padded_picture_becomes_rgb_before_the_padding(mode):
    pre = Preprocess(32, mode="longest", fill=9, background="last")
    picture = noise(64, 40).convert("RGBA").convert("RGB" if mode == "P" else mode).convert(mode)
    padded = np.asarray(centre(picture, pre))
    inside = np.asarray(picture.resize((32, 20), Image.Resampling.BICUBIC).convert("RGB"))
    np.testing.assert_array_equal(padded[6:26], inside)
    assert padded.shape == (32, 32, 3) and (padded[:6] == 9).all() and (padded[26:] == 9).all()


class Scripted:
    """A generator that says what it is told to."""

    def __init__(self, uniforms, integers=()):
        self._uniforms, self._integers = iter(uniforms), iter(integers)

    def uniform(self, low, high):
        return low + (high - low) * next(self._uniforms)

    def integers(self, high):
        value = next(self._integers)
        assert value < high
        return value


def test_normalisation_is_clips():
    pixels = normalise(Image.new("RGB", (2, 2), (255, 0, 128)), Preprocess())
    assert pixels.dtype == np.float32
    expected = [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, (128 / 255 - 0.40821073) / 0.27577711]
    np.testing.assert_allclose(pixels[1, 1], expected, rtol=1e-6)
    assert denormalise(pixels, Preprocess())[0, 0].tolist() == [255, 0, 128]


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [
        ((200, 200), (100, 100), (0, 0)),
        ((301, 200), (150, 100), (25, 0)),  # 150.5 is cut to 150
        ((306, 200), (153, 100), (26, 0)),  # 26.5 rounds to the even 26
        ((200, 310), (100, 155), (0, 28)),  # 27.5 rounds to the even 28
        ((50, 40), (125, 100), (12, 0)),  # small pictures grow; 12.5 rounds to 12
    ],
)
def test_evaluation_crop_is_torchvisions(size, resized, corner):
    picture, pre = noise(*size), Preprocess(size=100)
    expected = picture.resize(resized, Image.Resampling.BICUBIC).crop((*corner, corner[0] + 100, corner[1] + 100))
    np.testing.assert_array_equal(denormalise(eval_image(picture, pre), pre), np.asarray(expected))


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((1000, 10), Box(493, 0, 13, 10)),  # round(10 * 4/3) wide
        ((10, 1000), Box(0, 493, 10, 13)),
        ((200, 100), Box(33, 0, 133, 100)),  # 0.9 of the area never fits in the ratio
    ],
)
def test_without_a_fitting_crop_the_centre_is_taken(size, box):
    assert random_box(*size, (0.9, 1.0), np.random.default_rng(0)) == box


def test_training_crop_is_torchvisions():
    # 120 x 100: area 10,800, ratio 1.2: 113.84 x 94.87. The draw before it, ratio 4/3 of all, is too wide.
    ratio = np.log(1.2 / 0.75) / np.log(16 / 9)
    rng = Scripted([1.0, 1.0, 0.0, ratio], integers=[5, 3])
    assert random_box(120, 100, (0.9, 1.0), rng) == Box(left=3, top=5, width=114, height=95)


def test_training_crops_are_spread_as_they_should_be():
    rng = np.random.default_rng(1)
    boxes = [random_box(1000, 1000, (0.25, 0.36), rng) for _ in range(4000)]
    share = np.array([b.width * b.height for b in boxes]) / 1e6
    ratio = np.log([b.width / b.height for b in boxes])
    assert share.min() > 0.2495 and share.max() < 0.3605 and abs(share.mean() - 0.305) < 0.002
    assert np.abs(ratio).max() < np.log(4 / 3) + 0.003 and abs(ratio.mean()) < 0.01
    assert abs(ratio.std() - np.log(16 / 9) / 12**0.5) < 0.005  # uniform in the logarithm
    left = np.array([b.left / (1000 - b.width) for b in boxes])
    assert abs(left.mean() - 0.5) < 0.02 and left.min() == 0.0 and left.max() == 1.0


def test_training_image_is_the_resized_crop():
    picture, pre = noise(120, 100), Preprocess(size=64)
    box = random_box(120, 100, pre.scale, np.random.default_rng(7))
    expected = picture.crop((box.left, box.top, box.left + box.width, box.top + box.height)).resize(
        (64, 64), Image.Resampling.BICUBIC
    )
    pixels = train_image(picture, pre, np.random.default_rng(7))
    assert (pixels.dtype, pixels.shape) == (np.float32, (64, 64, 3))
    np.testing.assert_array_equal(denormalise(pixels, pre), np.asarray(expected))


def test_preprocess_is_saved_and_read_back(tmp_path):
    pre = Preprocess(
        size=64, interpolation="bilinear", scale=(0.5, 1.0), resize=70, mode="squash", corner="down", background="white"
    )
    pre.save(tmp_path)
    assert Preprocess.load(tmp_path) == Preprocess.load(tmp_path / "preprocess.json") == pre
    (tmp_path / "preprocess.json").write_text('{"sise": 64}')
    with pytest.raises(InputError, match="did you mean 'size'"):
        Preprocess.load(tmp_path)
    with pytest.raises(InputError, match="did you mean 'bicubic'"):
        Preprocess(interpolation="bicubik")
    with pytest.raises(InputError, match="nowhere"):
        Preprocess.load(tmp_path / "nowhere")


def test_an_old_file_means_what_it_meant(tmp_path):
    old = (
        '{"size": 60, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic", "scale": [0.9,'
        " 1.0]}"
    )
    (tmp_path / "preprocess.json").write_text(old)
    pre = Preprocess.load(tmp_path)
    assert pre == Preprocess(60, (0.5,) * 3, (0.25,) * 3)
    assert (pre.resize, pre.mode, pre.corner, pre.background) == (None, "shortest", "round", "none")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"mean": "imagenet"}', "mean is 'imagenet': give 3 finite numbers"),
        ('{"mean": [0.5, 0.5]}', "give 3 finite numbers"),
        ('{"mean": [0.5, 0.5, NaN]}', "give 3 finite numbers"),
        ('{"std": [0.5, 0.5, 0]}', "std is .* above 0"),
        ('{"size": [224, 224]}', r"size is \(224, 224\): give pixels"),
        ('{"size": -1}', "size is -1: give pixels"),
        ('{"size": 224.5}', "give pixels, a whole number"),
        ('{"size": 64, "resize": 60}', "resize is 60 and size 64"),
        ('{"mode": "border"}', "no mode 'border'.*shortest, squash, longest"),
        ('{"background": "black"}', "no background 'black'.*none, white"),
        ('{"interpolation": 3}', "no interpolation 3"),
        ('{"scale": [0, 1]}', "scale is"),
        ('{"fill": 300, "mode": "longest"}', "fill is 300"),
        ("[1]", "holds a JSON list"),
        ('{"size": 22', "cannot be read as JSON"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(text, complaint, tmp_path):
    (tmp_path / "preprocess.json").write_text(text)
    with pytest.raises(InputError, match=rf"^[^\n]*preprocess\.json[^\n]*{complaint}[^\n]*$"):
        Preprocess.load(tmp_path)


def test_the_margin_follows_the_size():
    pre = Preprocess(224, resize=256)
    assert pre.at(384).resize == 438 == Preprocess(384).cropped(0.875).resize  # timm: floor(384 / 0.875)
    assert (pre.at(384).size, pre.cropped(1.0).resize, Preprocess(224).at(32).resize) == (384, 224, None)
    with pytest.raises(InputError, match=r"crop is 1\.5"):
        pre.cropped(1.5)


def test_a_picture_may_be_resized_wider_than_its_crop():
    picture = noise(90, 70)
    expected = picture.resize((51, 40), Image.Resampling.BICUBIC)  # int(40 * 90 / 70)
    for corner, left in (("round", 10), ("down", 9)):  # of a margin of 19
        crop = centre(picture, Preprocess(32, resize=40, corner=corner))
        np.testing.assert_array_equal(crop, expected.crop((left, 4, left + 32, 36)))


def test_a_picture_may_be_squashed():
    picture = noise(90, 70)
    np.testing.assert_array_equal(
        centre(picture, Preprocess(32, mode="squash")), picture.resize((32, 32), Image.Resampling.BICUBIC)
    )
    wider = picture.resize((40, 40), Image.Resampling.BICUBIC).crop((4, 4, 36, 36))
    np.testing.assert_array_equal(centre(picture, Preprocess(32, mode="squash", resize=40)), wider)


def test_a_picture_may_be_padded():
    for size, resized, corner in (((90, 70), (32, 25), (0, 3)), ((33, 100), (11, 32), (10, 0))):
        expected = Image.new("RGB", (32, 32), (9, 9, 9))
        expected.paste(noise(*size).resize(resized, Image.Resampling.BICUBIC), corner)
        np.testing.assert_array_equal(centre(noise(*size), Preprocess(32, mode="longest", fill=9)), expected)
    with pytest.raises(InputError, match="900 x 2 pixels is too thin"):
        centre(noise(900, 2), Preprocess(32, mode="longest"))


@pytest.mark.parametrize("interpolation", list(FILTERS))
@pytest.mark.parametrize("size", [(3, 900), (900, 3)])
def test_a_thin_picture_is_cropped_as_if_it_had_been_resized_whole(size, interpolation, monkeypatch):
    pre = Preprocess(32, interpolation=interpolation, resize=36)
    whole = np.asarray(centre(noise(*size), pre), int)
    monkeypatch.setattr(preprocess, "AFFORDABLE", 0)
    part = np.asarray(centre(noise(*size), pre), int)
    assert part.shape == (32, 32, 3) and np.abs(part - whole).max() <= 1


def test_a_thin_picture_takes_little_memory():
    picture = noise(10_000, 1)
    tracemalloc.start()
    pixels = centre(picture, Preprocess(224))
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    middle = np.asarray(picture)[0, 4998:5002].astype(int)
    # 224 of 2,240,000 columns: one pixel of the source and its neighbours
    shown = np.asarray(pixels)[100, [0, 112, 223]].astype(int)
    assert pixels.size == (224, 224) and middle.min() - 60 <= shown.min() and shown.max() <= 255
