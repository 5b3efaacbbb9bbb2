from pathlib import Path

import numpy as np
import pytest

import lit_jax
from heirloom.common import config
from heirloom.common.data import icons
from lit_jax.icon_scores import Icons, Judge, ink_of, mean_colours, read_icons

ICONS = Path(lit_jax.__file__).parent / "icons"


@pytest.fixture(scope="module")
def train():
    return read_icons("train")


def test_the_held_out_pairs_are_new_but_their_objects_and_colours_are_not(train):
    test = read_icons("test")
    assert len(train) == 700 and len(test) == 300
    seen, unseen = (set(zip(i.objects, i.colours, strict=True)) for i in (train, test))
    assert len(unseen) == 300 and not seen & unseen
    assert set(test.objects) == set(train.objects) and set(test.colours) == set(train.colours)
    assert icons.PATH.stat().st_size < 2e6


def test_the_judge_is_right_about_real_icons_it_has_not_seen(train):
    test = read_icons("test")
    assert Judge(train).scores(test.pictures, test.objects, test.colours) == {"object": 1, "colour": 1, "both": 1}


def test_object_and_colour_are_judged_apart(train):
    icons = train.some(4, seed=0)
    inverted = icons.pictures[:, ::-1]  # upside down: the same colour, another outline
    judge = Judge(train)
    found = judge.scores(inverted, icons.objects, icons.colours)
    assert found["colour"] == 1 and found["object"] < 1 and found["both"] == found["object"]
    assert judge.scores(icons.pictures[[1, 0, 3, 2]], icons.objects, icons.colours)["object"] == 0


def test_ink_and_colour_by_hand():
    picture = np.full((1, 2, 2, 3), 255, np.uint8)
    picture[0, 0, 0] = (255, 0, 0)
    picture[0, 1, 1] = (255, 155, 155)  # 100 of 255 from white in two channels: an ink of 100 / 255
    np.testing.assert_allclose(ink_of(picture)[0], [1, 0, 0, 100 / 255])
    np.testing.assert_array_equal(mean_colours(picture), [[255, 0, 0]])
    np.testing.assert_array_equal(mean_colours(np.full((1, 2, 2, 3), 255, np.uint8)), [[255, 255, 255]])


def test_some_are_drawn_without_repetition():
    five = Icons(tuple("abcde"), tuple("abcde"), ("red",) * 5, np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 2, 2, 3))
    some = five.some(3, seed=1)
    assert len(set(some.prompts)) == 3
    assert [five.prompts.index(p) for p in some.prompts] == [int(p[0, 0, 0]) // 12 for p in some.pictures]


def test_the_embedded_autoencoder_keeps_object_and_colour(train):
    autoencoder = lit_jax.load("embedded:icons_autoencoder")
    assert autoencoder.cfg == config.load("lit/icons_autoencoder").student
    assert (ICONS / "autoencoder" / "model.safetensors").stat().st_size < 2e6
    icons = read_icons("test").some(40, seed=0)
    latents = np.asarray(autoencoder.encode(icons.pictures))
    assert latents.shape == (40, 16, 16, 4) and 0.8 < latents.std() < 1.1
    restored = autoencoder.decode(latents)
    psnr = 10 * np.log10(255**2 / np.square(restored - icons.pictures.astype(np.float64)).mean())
    assert psnr > 31
    assert Judge(train).scores(restored, icons.objects, icons.colours) == {"object": 1, "colour": 1, "both": 1}
