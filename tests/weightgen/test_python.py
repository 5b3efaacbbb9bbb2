"""The verbs of weightgen in Python: a zoo, a generator, and networks for pictures in memory."""

import numpy as np
import pytest

import weightgen
from heirloom.common.errors import InputError


@pytest.fixture(scope="module")
def pictures():
    """Five classes of coloured noise, nine pictures each."""
    rng = np.random.default_rng(0)
    return {
        name: [np.uint8(45 * i) + rng.integers(0, 40, (20, 20, 3)).astype(np.uint8) for _ in range(9)]
        for i, name in enumerate(("black", "dark", "grey", "light", "white"))
    }


@pytest.fixture(scope="module")
def trained(one_device, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weightgen")
    zoo = weightgen.train("weightgen/smoke", folder / "zoo", members=40, chunk=40, net={"features": 16})
    short = dict(steps=4, log_every=2, batch=8, latent=8, optim={"warmup": 1}, gate={"force": True})
    small = {"width": 16, "layers": 1, "heads": 2, "hidden": 16}
    return zoo, weightgen.train("weightgen/generator", folder / "run", zoo=zoo.folder / "zoo", denoiser=small, **short)


def test_a_zoo_is_a_run_without_a_model(trained):
    zoo, run = trained
    assert zoo.metrics[-1]["step"] == 40 and 0.2 < zoo.metrics[-1]["accuracy"] < 1
    with pytest.raises(InputError, match="has no model: its recipe trains none"):
        zoo.model  # noqa: B018
    assert run.curve()[0].tolist() == [2, 4]


def test_networks_are_drawn_for_pictures_in_memory(trained, pictures):
    generator = trained[1].model
    networks = generator.generate(pictures, n=3, steps=2)
    assert len(networks) == 3 and networks.names == tuple(pictures)
    assert {path: value.shape for path, value in networks.params.items()} == {
        "out/bias": (3, 5),
        "out/kernel": (3, 16, 5),
    }
    found = networks.predict(pictures["black"])
    assert found.shape == (3, 9) and found.min() >= 0 and found.max() < 5
    one = networks.average()
    np.testing.assert_allclose(one.params["out/kernel"][0], networks.params["out/kernel"].mean(0), atol=1e-6)
    assert one.predict(pictures["black"][0]).shape == (1, 1)
    assert networks.scores["chance"] == 0.2 and networks.scores["prototype"] > 0.9
    # The same seed gives the same networks, and more of them do not change the first.
    np.testing.assert_allclose(generator.generate(pictures, n=1, steps=2).tokens, networks.tokens[:1], atol=1e-5)
    assert repr(networks).splitlines() == [
        "3 networks of 85 weights",
        "  classes: black, dark, grey, light, white",
        "  condition: 5 pictures of each class, no gradient step",
    ]


@pytest.mark.parametrize(
    ("change", "how", "words"),
    [
        (lambda p: dict(list(p.items())[:4]), {}, "the dictionary of pictures has 4 classes, these are 5-way networks"),
        (lambda p: p | {"grey": []}, {}, "the dictionary of pictures: grey has no picture"),
        (lambda p: p | {"grey": [b"?"]}, {}, "grey, number 0: this picture does not decode"),
        (lambda p: p, dict(stepz=3), "no setting 'stepz'; did you mean 'steps'"),
        (lambda p: p, dict(task="cats"), "give pictures, or a task in words, and not both"),
        (lambda p: None, dict(task="cats"), "takes pictures, not words"),
    ],
)
def test_mistakes_are_one_line(trained, pictures, change, how, words):
    with pytest.raises(InputError, match=words):
        trained[1].model.generate(change(pictures), n=1, **how)


def test_a_saved_generator_draws_the_same(trained, pictures, tmp_path):
    generator = trained[1].model
    generator.save(tmp_path / "generator")
    how = dict(n=1, steps=2)
    again = weightgen.load(tmp_path / "generator").generate(pictures, **how)
    np.testing.assert_array_equal(again.tokens, generator.generate(pictures, **how).tokens)
