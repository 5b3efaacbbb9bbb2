"""From pictures to rows, with a network small enough to work out by hand in place of Inception."""

import warnings
import zipfile
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from heirloom.common.errors import InputError, Remark
from heirloom.common.evaluate import generated
from heirloom.common.evaluate.extractor import Extractor
from heirloom.common.evaluate.fid import Gaussian, frechet_distance, inception_score
from heirloom.common.evaluate.generated import (
    Reference,
    check_reference,
    evaluate,
    measurer,
    read_images,
    read_reference,
)
from heirloom.common.evaluate.inception import ADM, Q8, Features, InceptionConfig
from heirloom.common.nn.dense import Dense
from heirloom.common.nn.functional import functional

POOL, SPATIAL = 3, 2


class Colours(nnx.Module):
    """Mean colours as the pooled features, the corner as the spatial ones."""

    def __init__(self, cfg: InceptionConfig, *, rngs: nnx.Rngs):
        self.fc = Dense("colour -> class", {"colour": 3, "class": cfg.classes}, bias=None, rngs=rngs)

    def __call__(self, images):
        x = images.astype(jnp.float32) / 255
        pooled = x.mean((1, 2))
        return Features(pooled, x[:, 0, 0, :SPATIAL], self.fc(pooled))


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    monkeypatch.setattr(generated, "POOL", POOL)
    monkeypatch.setattr(generated, "SPATIAL", SPATIAL)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh(
        (2, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:2]
    )


def extractor(cfg):
    model = functional(Colours, cfg)
    return Extractor(cfg, model, {"fc/kernel": np.random.default_rng(0).standard_normal((3, cfg.classes), np.float32)})


def pictures(count, seed, low=0):
    return np.random.default_rng(seed).integers(low, 256, (count, 4, 5, 3)).astype(np.uint8)


def cut(images, size):
    return [images[i : i + size] for i in range(0, len(images), size)]


def test_every_picture_counts_once_however_they_come(mesh):
    images = pictures(23, 0)
    measure = measurer(extractor(Q8), mesh, 6)
    whole, parts = measure([images]), measure(cut(images, 5))
    colours = images.mean((1, 2), dtype=np.float64) / 255
    for found in (whole, parts):
        assert (
            found.pooled.shape == (23, 3)
            and found.logits.shape == (23, 1001)
            and found.pool.count == found.spatial.count == 23
        )
        np.testing.assert_allclose(found.pooled, colours, rtol=1e-6)
        np.testing.assert_allclose(found.pool.gaussian().covariance, np.cov(colours, rowvar=False), rtol=1e-4)
        np.testing.assert_allclose(found.spatial.gaussian().mean, images[:, 0, 0, :2].mean(0) / 255, rtol=1e-6)
    np.testing.assert_array_equal(whole.pooled, parts.pooled)


def test_rows_against_stored_statistics_and_pictures(mesh, tmp_path):
    images, reference = pictures(40, 0), pictures(30, 1, low=40)
    stored = Gaussian(np.full(3, 0.5), 0.01 * np.eye(3)), Gaussian(np.full(2, 0.4), 0.1 * np.eye(2))
    arrays = {
        "mu": stored[0].mean,
        "sigma": stored[0].covariance,
        "mu_s": stored[1].mean,
        "sigma_s": stored[1].covariance,
    }
    np.savez_compressed(tmp_path / "ref.npz", arr_0=reference, **arrays)
    rows = evaluate(cut(images, 7), read_reference(tmp_path / "ref.npz"), extractor(ADM), mesh, size=8)
    assert {(row["n"], row["protocol"]) for row in rows} == {(40, "adm")}
    values = {row["metric"]: row["value"] for row in rows}
    assert list(values) == ["fid", "sfid", "inception_score", "precision", "recall", "kid", "kid_std"]
    ours = measurer(extractor(ADM), mesh, 8)([images])
    assert values["fid"] == pytest.approx(frechet_distance(ours.pool.gaussian(), stored[0]))
    assert values["sfid"] == pytest.approx(frechet_distance(ours.spatial.gaussian(), stored[1]))
    assert values["inception_score"] == pytest.approx(inception_score(ours.logits))

    # Another network has no use for these statistics: it takes its own, from the pictures.
    rows = evaluate([images], read_reference(tmp_path / "ref.npz"), extractor(Q8), mesh, size=8)
    theirs = measurer(extractor(Q8), mesh, 8)([reference])
    assert rows[0]["protocol"] == "inception-v3-q8"
    assert rows[0]["value"] == pytest.approx(frechet_distance(ours.pool.gaussian(), theirs.pool.gaussian()))

    np.savez(tmp_path / "whole.npz", **{key: arrays[key] for key in ("mu", "sigma")})
    left_out = (
        r"whole.npz has `mu` .* not sFID's .* `mu_s` and `sigma_s`: sFID is left out; .* ADM suite \(VIRTUAL_\*.npz\)"
        r" has both"
    )
    with pytest.warns(Remark, match=left_out) as said:
        rows = evaluate([images], read_reference(tmp_path / "whole.npz"), extractor(ADM), mesh)
    assert len(said) == 1 and [row["metric"] for row in rows] == ["fid", "inception_score"]
    with pytest.raises(InputError, match="has only statistics of 'adm'"):
        evaluate([images], read_reference(tmp_path / "whole.npz"), extractor(Q8), mesh)


def test_an_empty_batch_of_pictures_is_no_reference(tmp_path):
    """Also next to statistics, which score without pictures only where there never were any."""
    np.savez(tmp_path / "empty.npz", arr_0=np.zeros((0, 256, 256, 3), np.uint8))
    empty = read_reference(tmp_path / "empty.npz")
    for reference in (empty, replace(empty, pool=Gaussian(np.zeros(3), np.eye(3)))):
        with pytest.raises(InputError, match=r"empty.npz: 0 pictures are too few for a score: 10 at least"):
            check_reference(reference, extractor(ADM))


def test_statistics_without_spatial_ones_are_remarked_where_they_are_used():
    """sFID is then of the pictures; without a need for the statistics, or with all of them, there is no remark."""
    pool, spatial = Gaussian(np.zeros(3), np.eye(3)), Gaussian(np.zeros(2), np.eye(2))
    mixed = Reference("mixed.npz", pool, None, 1200, lambda rows: iter(()))
    with pytest.warns(Remark, match=r"mixed.npz has .*: sFID is measured against its 1,200 pictures instead"):
        check_reference(mixed, extractor(ADM))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_reference(mixed, extractor(Q8))
        check_reference(replace(mixed, spatial=spatial), extractor(ADM))
        check_reference(replace(mixed, pool=None), extractor(ADM))


def test_the_same_pictures_score_perfectly(mesh, tmp_path):
    images = pictures(30, 0)
    np.savez(tmp_path / "same.npz", images)
    values = {
        row["metric"]: row["value"]
        for row in evaluate([images], read_reference(tmp_path / "same.npz"), extractor(Q8), mesh)
    }
    assert values["fid"] == pytest.approx(0, abs=1e-7) and values["sfid"] == pytest.approx(0, abs=1e-7)
    assert values["precision"] == values["recall"] == 1


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_pictures_are_read_in_parts(save, tmp_path):
    images = pictures(11, 0)
    save(tmp_path / "some.npz", images)
    parts = list(read_images(tmp_path / "some.npz", 4))
    assert [len(part) for part in parts] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate(parts), images)


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"images": np.zeros((2, 2))}, "has images; a reference batch needs"),
        ({}, "has nothing"),
        ({"mu": np.zeros(3)}, "has no `sigma`"),
        ({"mu": np.zeros(4), "sigma": np.eye(4)}, r"`mu` is float64 \[4\], and must be \[3\] finite numbers"),
        ({"mu": np.zeros(3), "sigma": -np.eye(3)}, "`sigma` is not a covariance"),
        ({"mu": np.zeros(3), "sigma": np.eye(3) + np.eye(3, k=1)}, "`sigma` is not a covariance"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "`sigma`.*finite"),
        ({"mu": np.array(["a"], object), "sigma": np.eye(3)}, "cannot be read"),
        ({"arr_0": np.zeros((5, 4, 4, 3))}, r"`arr_0` is float64 \[5, 4, 4, 3\]"),
        ({"arr_0": np.zeros((5, 4, 4, 4), np.uint8)}, r"uint8 \[5, 4, 4, 4\]"),
        ({"arr_0": np.asfortranarray(np.zeros((5, 4, 4, 3), np.uint8))}, "Fortran"),
    ],
)
def test_a_wrong_reference_is_one_line(arrays, why, tmp_path):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=why) as caught:
        read_reference(tmp_path / "bad.npz")
    assert "\n" not in str(caught.value) and "bad.npz" in str(caught.value)


def test_damaged_and_absent_files_are_one_line(tmp_path):
    with pytest.raises(InputError, match=r"absent.npz: not a .npz"):
        read_reference(tmp_path / "absent.npz")
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(InputError, match=r"not a \.npy but a \.npz with pictures"):
        read_reference(tmp_path / "single.npy")
    np.savez(tmp_path / "torn.npz", pictures(5000, 0))
    data = bytearray((tmp_path / "torn.npz").read_bytes())
    data[200_000:200_100] = bytes(100)
    (tmp_path / "torn.npz").write_bytes(data)
    with pytest.raises(InputError, match="cut short"):
        list(read_images(tmp_path / "torn.npz"))
    np.savez(tmp_path / "plain.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(InputError, match="has no pictures"):
        next(read_images(tmp_path / "plain.npz"))


@pytest.mark.parametrize("name", ["arr_0", "mu"])
@pytest.mark.parametrize("damage", ["data", "encrypted", "compression"])
def test_a_damaged_compressed_file_is_one_line(tmp_path, name, damage):
    file = tmp_path / "torn.npz"
    arrays = {"mu": np.random.default_rng(0).standard_normal(2048), "sigma": np.eye(2048, dtype=np.float32)}
    np.savez_compressed(file, **({"arr_0": pictures(5000, 0)} if name == "arr_0" else arrays))
    data = bytearray(file.read_bytes())
    entry = data.index(b"PK\x01\x02")  # in the directory at the end
    if damage == "data":
        data[2000:2100] = bytes(100)
    else:
        data[entry + (8 if damage == "encrypted" else 10)] = 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"torn.npz: .*; fetch it again$"):
        list(read_reference(file).read(100))


def test_the_reference_is_measured_before_a_picture_is_asked_for(mesh, tmp_path):
    np.savez(tmp_path / "torn.npz", pictures(5000, 0))
    data = bytearray((tmp_path / "torn.npz").read_bytes())
    data[200_000:200_100] = bytes(100)
    (tmp_path / "torn.npz").write_bytes(data)

    def never():
        raise AssertionError("drawn too early")
        yield

    with pytest.raises(InputError, match="cut short"):
        evaluate(never(), read_reference(tmp_path / "torn.npz"), extractor(Q8), mesh, size=500)


def test_damaged_features_are_no_score(mesh, tmp_path):
    np.savez(tmp_path / "ref.npz", pictures(10, 0))
    broken = extractor(Q8)
    broken.params["fc/kernel"][0, 0] = np.nan
    with pytest.raises(InputError, match="features of pictures are not finite"):
        evaluate([pictures(10, 1)], read_reference(tmp_path / "ref.npz"), broken, mesh)


def test_pictures_that_are_none_and_too_few(mesh, tmp_path):
    np.savez(tmp_path / "ref.npz", pictures(10, 0))
    with pytest.raises(InputError, match=r"pictures are float32 \[2, 4, 4, 3\]"):
        evaluate([np.zeros((2, 4, 4, 3), np.float32)], read_reference(tmp_path / "ref.npz"), extractor(Q8), mesh)
    with pytest.raises(InputError, match="9 pictures are too few"):
        evaluate([pictures(9, 0)], read_reference(tmp_path / "ref.npz"), extractor(Q8), mesh)
    np.savez(tmp_path / "few.npz", pictures(4, 0))
    with pytest.raises(InputError, match=r"few.npz: 4 pictures are too few"):
        evaluate([pictures(20, 0)], read_reference(tmp_path / "few.npz"), extractor(Q8), mesh)


@pytest.mark.parametrize("name", ["arr_0", "mu"])
def test_a_damaged_header_in_a_reference_is_one_line(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "ref.npz", "w") as archive:
        archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00\x0a\x00{'descr': \n" + bytes(64))
        archive.writestr(f"{'sigma' if name == 'mu' else 'other'}.npy", b"")
    with pytest.raises(InputError, match=r"ref.npz: .*its header is damaged.*; fetch it again"):
        read_reference(tmp_path / "ref.npz")
