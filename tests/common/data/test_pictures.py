import io
import struct
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from heirloom.common.data.pictures import decode, decode_record, several
from heirloom.common.errors import InputError


def encoded(picture: Image.Image, form: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()


def noise(*shape: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def palette() -> Image.Image:
    picture = Image.new("P", (2, 1))
    picture.putpalette([200, 100, 50, 0, 0, 0])
    picture.putpixel((1, 0), 1)
    return picture


@pytest.mark.parametrize(
    ("picture", "rgb"),
    [
        (Image.new("RGB", (3, 2), (10, 20, 30)), (10, 20, 30)),
        (Image.new("L", (3, 2), 77), (77, 77, 77)),
        (Image.new("1", (3, 2), 1), (255, 255, 255)),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 128)), (255, 0, 0)),  # alpha is dropped
        (Image.new("LA", (3, 2), (7, 51)), (7, 7, 7)),
        (Image.new("I;16", (3, 2), 9), (9, 9, 9)),
        (Image.new("I;16", (3, 2), 300), (255, 255, 255)),  # 16 bits are clipped, not scaled
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode_becomes_rgb(picture, rgb):
    result = decode(encoded(picture))
    assert (result.mode, result.size, result.getpixel((2, 1))) == ("RGB", (3, 2), rgb)


@pytest.mark.parametrize(
    ("picture", "rgb"),
    [
        (Image.new("RGB", (3, 2), (10, 20, 30)), (10, 20, 30)),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 128)), (255, 127, 127)),  # 255 * (1 - 128/255)
        (Image.new("RGBA", (3, 2), (9, 9, 9, 0)), (255, 255, 255)),
        (Image.new("LA", (3, 2), (0, 51)), (204, 204, 204)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_a_white_background_is_asked_for(picture, rgb):
    for form in (picture, encoded(picture)):
        assert decode(form, "white").getpixel((2, 1)) == rgb


def test_palettes_and_cmyk():
    transparent = encoded(palette(), transparency=1)
    assert np.asarray(decode(transparent)).tolist() == [[[200, 100, 50], [0, 0, 0]]]
    assert np.asarray(decode(transparent, "white")).tolist() == [[[200, 100, 50], [255, 255, 255]]]
    assert decode(encoded(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF")).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("background", ["none", "white"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "I;16", "1", "CMYK"])
def test_a_file_its_bytes_and_the_picture_are_the_same(mode, background, tmp_path):
    deep = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (5, 7)).astype(np.uint16))
    picture = (
        deep if mode == "I;16" else noise(5, 7, 4).convert("RGB" if mode in ("P", "CMYK") else "RGBA").convert(mode)
    )
    file = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    picture.save(file)
    ways = [file, str(file), file.read_bytes(), bytearray(file.read_bytes()), Image.open(file)]
    pixels = [np.asarray(decode(way, background)) for way in ways]
    for other in pixels:
        np.testing.assert_array_equal(other, pixels[0])
    if background == "none":
        np.testing.assert_array_equal(pixels[0], np.asarray(Image.open(file).convert("RGB")))


def test_the_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    noise(5, 7, 3).save(tmp_path / "x.jpg", exif=exif)
    assert decode(tmp_path / "x.jpg").size == (7, 5)


def test_what_does_not_decode_is_said():
    jpeg = encoded(noise(64, 64, 3), "JPEG")
    for broken in (b"", b"<html>404</html>", jpeg[: len(jpeg) // 2], encoded(noise(64, 64, 3))[:3000]):
        with pytest.raises(InputError, match=r"^this picture does not decode: [^\n]+$"):
            decode(broken)
    for floats in (Image.new("F", (2, 2), 0.5), encoded(Image.new("F", (2, 2), 0.5), "TIFF")):
        with pytest.raises(InputError, match="unknown"):
            decode(floats)
    with pytest.raises(InputError, match=r"uint8 \[h, w, 3\], not float32 \[2, 2, 3\]"):
        decode(np.zeros((2, 2, 3), np.float32))
    with pytest.raises(InputError, match="a uint8 array, not int"):
        decode(7)
    with pytest.raises(InputError, match="is empty: 0 x 3 pixels"):
        decode(Image.new("RGB", (0, 3)))


def test_an_open_file_is_one_picture(tmp_path):
    buffer = io.BytesIO()
    noise(5, 7, 3).save(buffer, "PNG")  # its position is the end
    (tmp_path / "x.png").write_bytes(buffer.getvalue())
    with open(tmp_path / "x.png", "rb") as file:
        for opened in (buffer, file):
            assert several(opened) == [opened]
            np.testing.assert_array_equal(np.asarray(decode(opened)), np.asarray(noise(5, 7, 3)))


def test_arrays_of_other_libraries_are_pictures():
    pixels = np.asarray(noise(5, 7, 3))
    for array in (jnp.asarray(pixels), np.ascontiguousarray(pixels)):
        assert len(several(array)) == 1 and len(several(array[None])) == 1
        np.testing.assert_array_equal(np.asarray(decode(several(array[None])[0])), pixels)
    with pytest.raises(InputError, match=r"^b\.png: no such file"):
        decode(several(np.array(["a.png", "b.png"]))[1])  # files, as a column of a table has them


@pytest.mark.parametrize(
    ("array", "steps"),
    [
        (lambda a: a / 255, ["(255 * a).round().astype(np.uint8)"]),
        (lambda a: a.astype(np.float32), ["a.astype(np.uint8)"]),
        (lambda a: a.astype(np.int64), ["a.astype(np.uint8)"]),
        (lambda a: a.transpose(2, 0, 1), ["np.moveaxis(a, 0, -1)"]),
        (lambda a: a.transpose(2, 0, 1) / 255, ["np.moveaxis(a, 0, -1)", "(255 * a).round().astype(np.uint8)"]),
        (lambda a: np.concatenate([a, a[..., :1]], -1), ["a[..., :3]"]),
        (lambda a: a[..., 0], ["np.stack([a] * 3, -1)"]),
        (lambda a: a[..., :1], ["np.repeat(a, 3, -1)"]),
        (lambda a: (a - 127.0) / 64, []),  # normalised by numbers that are unknown
        (lambda a: a[..., :2], []),
    ],
)
def test_the_conversion_of_an_array_is_said_and_makes_a_picture(array, steps):
    a = given = array(np.asarray(noise(5, 7, 3)))
    assert len(several(given)) == 1
    with pytest.raises(InputError, match=r"^a picture array must be uint8 \[h, w, 3\], not [^\n]+$") as error:
        decode(given)
    told = str(error.value).partition(": with numpy, a = ")[2]
    assert told == " and then ".join(steps)
    for step in steps:
        a = eval(step, {"np": np, "a": a})
    if steps:
        assert decode(a).size == (7, 5)


def test_a_dictionary_is_no_picture():
    (given,) = several({"bytes": b"", "path": None})
    with pytest.raises(InputError, match=r"not a dictionary \(bytes, path\): give one of its values"):
        decode(given)


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "cut.jpg").write_bytes(encoded(noise(64, 64, 3), "JPEG")[:900])
    for way in (tmp_path / "cut.jpg", str(tmp_path / "cut.jpg"), Image.open(tmp_path / "cut.jpg")):
        with pytest.raises(InputError, match=r"cut\.jpg does not decode: "):
            decode(way)
    with pytest.raises(InputError, match=r"nowhere\.png: no such file"):
        decode(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match=r"does not decode: .*directory"):
        decode(tmp_path)
    with pytest.raises(
        InputError,
        match=r"^shard\.tar:17: this picture does not decode: .*; replace the file or take it out of the set$",
    ):
        decode_record({"key": "shard.tar:17", "image": b"no picture"})


def test_an_enormous_picture_is_refused_in_one_line():
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(InputError, match=r"^this picture does not decode: [^\n]*2500000000 pixels[^\n]*$"):
        decode(bomb)
