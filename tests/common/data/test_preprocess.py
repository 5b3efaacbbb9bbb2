import io

import numpy as np
import pytest
from PIL import Image

from common.data.pictures import Box, decode
from common.data.preprocess import Preprocess, denormalise, eval_image, normalise, random_box, train_image
from common.errors import InputError


def encoded(picture: Image.Image, form: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


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


@pytest.mark.parametrize(
    ("picture", "rgb"),
    [
        (Image.new("RGB", (3, 2), (10, 20, 30)), (10, 20, 30)),
        (Image.new("L", (3, 2), 77), (77, 77, 77)),
        (Image.new("1", (3, 2), 1), (255, 255, 255)),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 128)), (255, 127, 127)),  # 255 * (1 - 128/255)
        (Image.new("RGBA", (3, 2), (9, 9, 9, 0)), (255, 255, 255)),
        (Image.new("LA", (3, 2), (0, 51)), (204, 204, 204)),
        (Image.new("I;16", (3, 2), 257 * 7), (7, 7, 7)),
        (Image.new("I;16", (3, 2), 65535), (255, 255, 255)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode_becomes_rgb(picture, rgb):
    result = decode(encoded(picture))
    assert (result.mode, result.size, result.getpixel((2, 1))) == ("RGB", (3, 2), rgb)


def test_palettes_and_cmyk():
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 100, 50, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    assert np.asarray(decode(encoded(palette, transparency=1))).tolist() == [[[200, 100, 50], [255, 255, 255]]]
    assert decode(encoded(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF")).getpixel((0, 0)) == (255, 0, 0)


def test_what_does_not_decode_is_said():
    jpeg = encoded(noise(64, 64), "JPEG")
    for broken in (b"", b"<html>404</html>", jpeg[: len(jpeg) // 2], encoded(noise(64, 64))[:3000]):
        with pytest.raises(InputError, match="does not decode"):
            decode(broken)
    with pytest.raises(InputError, match="unknown"):
        decode(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))
    with pytest.raises(InputError, match=r"uint8 \[h, w, 3\], not float32 \[2, 2, 3\]"):
        decode(np.zeros((2, 2, 3), np.float32))


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
    # 120 x 100: area 10,800, ratio 1.2: 113.84 x 94.87. The draw before it, ratio 4/3 of the whole, is too wide and is thrown away.
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
    expected = picture.crop((box.left, box.top, box.left + box.width, box.top + box.height)).resize((64, 64), Image.Resampling.BICUBIC)
    pixels = train_image(picture, pre, np.random.default_rng(7))
    assert (pixels.dtype, pixels.shape) == (np.float32, (64, 64, 3))
    np.testing.assert_array_equal(denormalise(pixels, pre), np.asarray(expected))


def test_preprocess_is_saved_and_read_back(tmp_path):
    pre = Preprocess(size=64, interpolation="bilinear", scale=(0.5, 1.0))
    pre.save(tmp_path)
    assert Preprocess.load(tmp_path) == Preprocess.load(tmp_path / "preprocess.json") == pre
    (tmp_path / "preprocess.json").write_text('{"sise": 64}')
    with pytest.raises(InputError, match="did you mean 'size'"):
        Preprocess.load(tmp_path)
    with pytest.raises(InputError, match="did you mean 'bicubic'"):
        Preprocess(interpolation="bicubik")
    with pytest.raises(InputError, match="nowhere"):
        Preprocess.load(tmp_path / "nowhere")
