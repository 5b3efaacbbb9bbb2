"""Cached latents: what is kept, what comes back through the pipeline, and what a draw from it is."""

import importlib
import json
import re
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from heirloom.common.checkpoint.convert import open_donor
from heirloom.common.cli import main, script
from heirloom.common.data.labelled import open_labelled, read_labels
from heirloom.common.data.pictures import decode
from heirloom.common.data.pipeline import PipelineConfig, training_batches
from heirloom.common.data.sources import SourceConfig, open_source
from heirloom.common.errors import InputError
from heirloom.common.mesh import start
from heirloom.common.paths import place
from lit_jax.autoencoder import AutoencoderConfig
from lit_jax.autoencoder_layouts import FAMILY
from lit_jax.data import adm_crop, is_latent, latents
from lit_jax.latents import cache_latents, cache_origin, data_origin, sample_cached
from lit_jax.origin import Origin, autoencoder_origin, compare_latents, copy_origin, read_origin, write_origin

GOLDEN = Path(__file__).parents[1] / "golden" / "autoencoder"


class Pictures:
    """Eleven seeded pictures, 30 x 24, and their labels."""

    def __len__(self):
        return 11

    def __getitem__(self, index):
        image = np.random.default_rng(index).integers(0, 256, (30, 24, 3)).astype(np.uint8)
        return {
            "key": f"picture {index}",
            "image": image,
            "label": np.int32(index % 3),
            "text": "a picture",
            "name": "x",
        }


@pytest.fixture(scope="module")
def donor():
    return open_donor(GOLDEN, [FAMILY])


@pytest.fixture(scope="module")
def params(donor):
    # The golden's logvar is spread on purpose; here it shall be that of a trained model, far from its limits.
    values = {path: np.array(view) for path, view in donor.source.values.items()}
    values["quant/kernel"][..., 4:] /= 12
    return values


@pytest.fixture(scope="module")
def cache(donor, params, tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "cache"
    cache_latents(donor.cfg, donor.model, params, Pictures(), path, start(), size=16, batch=8)
    return path


def read(path):
    return open_source(SourceConfig(str(path), image="", text="", columns=("moments", "label")))


def test_moments_of_both_views_are_kept(cache, donor, params):
    """By hand for picture 9, in the second batch, which is short: half precision keeps eleven bits."""
    source = read(cache)
    assert len(source) == 11 and sorted(p.name for p in cache.iterdir()) == [
        "autoencoder.json",
        "label.npy",
        "moments.npy",
    ]
    image = adm_crop(decode(Pictures()[9]["image"]), 16).astype(np.float32) / 127.5 - 1
    assert -1 <= image.min() < -0.8 and 0.8 < image.max() <= 1
    views = np.stack([image, image[:, ::-1]])
    mean, logvar = jax.jit(partial(donor.model.apply, method="encode"))(params, views)
    record = source[9]
    assert record["label"] == 0 and record["moments"].dtype == np.float16 and record["moments"].shape == (2, 4, 4, 8)
    np.testing.assert_allclose(record["moments"], np.concatenate([mean, logvar], -1), rtol=2e-3, atol=1e-3)
    assert cache_origin(cache) == Origin(donor.cfg)


def test_the_pipeline_reads_it_by_index_in_every_worker(cache):
    want = read(cache)
    for workers in (0, 2):
        batches = training_batches(read(cache), PipelineConfig(batch=4, workers=workers), latents)
        batch = next(batches)
        batches.close()
        assert batch["moments"].shape == (4, 2, 4, 4, 8) and batch["moments"].dtype == np.float16
        rows = [next(i for i in range(11) if np.array_equal(want[i]["moments"], m)) for m in batch["moments"]]
        assert len(set(rows)) == 4 and batch["label"].tolist() == [i % 3 for i in rows]


def test_a_cache_in_a_bucket_is_one_too(cache, donor):
    for file in cache.iterdir():
        place(f"memory://latents/cache/{file.name}").write_bytes(file.read_bytes())
    cfg = SourceConfig("memory://latents/cache", image="", text="", columns=("moments", "label"))
    assert is_latent(cfg) and not is_latent(SourceConfig("memory://latents"))
    assert data_origin(cfg, cfg) == cache_origin(place(cfg.path)) == Origin(donor.cfg)
    local, remote = read(cache)[10], open_source(cfg)[10]
    assert np.array_equal(local["moments"], remote["moments"]) and local["label"] == remote["label"]


def test_a_draw_is_scaled_and_takes_either_view():
    cfg = AutoencoderConfig(scaling_factor=0.5)
    mean = jnp.stack([jnp.full((400, 2, 2, 4), 2.0), jnp.full((400, 2, 2, 4), -2.0)], 1)
    moments = jnp.concatenate([mean, jnp.full_like(mean, -30)], -1).astype(jnp.float16)
    drawn = sample_cached(cfg, moments, jax.random.key(0))
    assert drawn.shape == (400, 2, 2, 4) and drawn.dtype == jnp.float32
    np.testing.assert_allclose(jnp.abs(drawn), 1, rtol=1e-5)
    mirrored = (drawn < 0).all((1, 2, 3))
    assert (mirrored | (drawn > 0).all((1, 2, 3))).all()  # never half a picture
    assert 160 < mirrored.sum() < 240  # 200, standard deviation 10
    assert (sample_cached(cfg, moments, jax.random.key(0), flips=0.0) > 0).all()
    noisy = sample_cached(cfg, jnp.zeros((400, 2, 2, 2, 8)), jax.random.key(1))
    assert abs(float(noisy.std()) - 0.5) < 0.02


def test_nothing_stands_under_the_name_unless_it_is_whole(donor, params, tmp_path):
    spoilt = params | {"quant/bias": np.full(8, 1e6, np.float32)}
    arguments = (Pictures(), tmp_path / "cache", start())
    with pytest.raises(InputError, match=r"^picture 0 has moments that float16 cannot hold$"):
        cache_latents(donor.cfg, donor.model, spoilt, *arguments, size=16, batch=8)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "cache").mkdir()
    with pytest.raises(InputError, match=r"cache exists"):
        cache_latents(donor.cfg, donor.model, params, *arguments, size=16, batch=8)


def test_a_recipe_is_cached_as_it_will_be_read(tmp_path, capsys, monkeypatch):
    """The command encodes at the size that the student takes, and training reads what it wrote; so does the script."""
    for name in ("ape", "bee"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.fromarray(Pictures()[len(name)]["image"]).save(tmp_path / "pictures" / name / "0.png")
    flags = ["--student.size", "4", "--student.channels", "4", "--student.classes", "2", "--autoencoder", str(GOLDEN)]
    flags += ["--data.path", str(tmp_path / "pictures")]
    assert main(["cache", "lit/s_2_256", str(tmp_path / "cache"), *flags]) == 0
    assert "2 records encoded by" in capsys.readouterr().out
    source = read(tmp_path / "cache")
    assert [source[i]["label"] for i in range(2)] == [0, 1] and source[0]["moments"].shape == (2, 4, 4, 8)
    words = [str(tmp_path / "pictures"), str(tmp_path / "script"), "--size", "16", "--autoencoder", str(GOLDEN)]
    monkeypatch.setattr(sys, "argv", ["cache_latents.py", *words])
    importlib.import_module("cache_latents").main()
    assert "class 0 is ape, class 1 is bee (labels.json)" in capsys.readouterr().out
    assert all(read_labels(tmp_path / name) == ("ape", "bee") for name in ("cache", "script"))
    cached = SourceConfig(str(tmp_path / "script"), image="", text="")
    with pytest.raises(InputError, match=r"script has 2 classes \(ape, bee\), the model 1000"):
        open_labelled(cached, "label", 1000)
    assert open_labelled(cached, "label", 3, ("bee", "cow", "ape"))[0]["label"] == 2
    same = read(tmp_path / "script")[1]["moments"], source[1]["moments"]
    np.testing.assert_allclose(*same, rtol=2e-3, atol=1e-4)  # half precision, of batches of other sizes
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["cache_latents.py", *words, "--classes", "3"])
    assert script("cache_latents", importlib.import_module("cache_latents").main) == 2
    assert re.fullmatch(r"cache_latents: .*has 2 classes .*, the model 3: give.*\n", capsys.readouterr().err)
    assert main(["cache", "lit/s_2_256", str(tmp_path / "other"), *flags[:-1], str(tmp_path / "cache")]) == 2
    assert "is a latent cache already" in capsys.readouterr().err
    flags[3] = "3"
    assert main(["cache", "lit/s_2_256", str(tmp_path / "other"), *flags]) == 2
    assert "has 4 channels, and the student takes 3" in capsys.readouterr().err


def test_the_identity_is_of_the_encoder_in_half_precision(donor):
    """Two decoders of one encoder share their latents, as sd-vae-ft-ema and -mse do; so does a copy in half
    precision.
    """
    known = autoencoder_origin(donor, "here")
    assert known.cfg == donor.cfg and known.source == "here" and len(known.encoder) == 64

    def with_values(change):
        values = {path: np.array(view) for path, view in donor.source.values.items()}
        return replace(donor, source=replace(donor.source, values=change(values)))

    half = with_values(lambda values: {path: value.astype(np.float16) for path, value in values.items()})
    decoder = with_values(lambda values: values | {"decoder/output/bias": values["decoder/output/bias"] + 1})
    encoder = with_values(lambda values: values | {"encoder/output/bias": values["encoder/output/bias"] + 1})
    assert (
        autoencoder_origin(half, "here")
        == autoencoder_origin(decoder, "here")
        == known
        != autoencoder_origin(encoder, "here")
    )


def test_autoencoders_that_do_not_fit_are_refused_or_said():
    ours, sdxl = Origin(AutoencoderConfig(), "ema", "1" * 64), AutoencoderConfig(scaling_factor=0.13025)
    words = r"the cache has latents of ema with scaling_factor 0.18215, the run of xl with 0.13025: use the same"
    with pytest.raises(InputError, match=words):
        compare_latents(ours, Origin(sdxl, "xl", "1" * 64), "the cache", "the run")
    with pytest.raises(InputError, match=r"with latent 4, the run of xl with 16"):
        compare_latents(ours, Origin(AutoencoderConfig(latent=16), "xl"), "the cache", "the run")
    assert compare_latents(ours, Origin(AutoencoderConfig(), "mse", "1" * 64), "the cache", "the run") == ""
    other = compare_latents(ours, Origin(AutoencoderConfig(), "mine", "2" * 64), "the cache", "the run")
    assert other.endswith(
        "of mine (scaling_factor 0.18215): their encoders have other weights, and latents may not fit"
    )
    assert compare_latents(ours, Origin(AutoencoderConfig()), "the cache", "the run").startswith(
        "the run does not say which autoencoder"
    )


def test_identities_on_disk(tmp_path):
    origin = Origin(AutoencoderConfig(channels=(32, 64)), "ema", "1" * 64)
    (tmp_path / "new").mkdir()
    write_origin(tmp_path, None)
    copy_origin(tmp_path, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == [] and read_origin(tmp_path) is None
    with pytest.raises(InputError, match=r"holds latents without autoencoder.json"):
        cache_origin(tmp_path)
    write_origin(tmp_path, origin)
    copy_origin(tmp_path, tmp_path / "new")
    assert read_origin(tmp_path / "new") == origin
    # A cache of an earlier version: the config alone.
    (tmp_path / "autoencoder.json").write_text(json.dumps(asdict(origin.cfg)))
    assert read_origin(tmp_path) == Origin(origin.cfg)
