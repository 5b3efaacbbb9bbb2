"""The network's counts and pieces by hand, and the files its weights come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heirloom.common.checkpoint import weights
from heirloom.common.errors import InputError
from heirloom.common.evaluate.extractor import METHOD, fold, open_extractor
from heirloom.common.evaluate.inception import ADM, Q8, Conv, ConvRelu, Inception, Pool, legacy_bilinear, pool
from heirloom.common.files import write_json
from heirloom.common.nn.functional import functional
from heirloom.common.surgery.layout import Tensor

STEM = "Conv2d_1a_3x3"


def by_hand(images, side):
    """TensorFlow 1's `resize_bilinear`, one pixel at a time."""
    height, width = images.shape[1:3]
    out = np.zeros((len(images), side, side, images.shape[3]))
    for i in range(side):
        for j in range(side):
            y, x = i * height / side, j * width / side
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = images[:, top, left] * (1 - x + left) + images[:, top, right] * (x - left)
            lower = images[:, bottom, left] * (1 - x + left) + images[:, bottom, right] * (x - left)
            out[:, i, j] = upper * (1 - y + top) + lower * (y - top)
    return out


@pytest.mark.parametrize("size", [(5, 7), (9, 9), (32, 11)])  # up, as it is, and down without antialiasing
def test_resize_is_the_legacy_one(size):
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3)).astype(np.uint8)
    got = jax.jit(legacy_bilinear, static_argnums=1)(images, 9)
    assert got.dtype == jnp.float32
    # 255 grey levels times the rounding of coordinates, which are f32 in TensorFlow too.
    np.testing.assert_allclose(got, by_hand(images.astype(np.float64), 9), atol=1e-3)
    if size == (9, 9):
        np.testing.assert_array_equal(got, images)


@pytest.mark.parametrize(("cfg", "classes", "kernels"), [(ADM, 1008, 23_815_520), (Q8, 1001, 23_801_184)])
def test_counts_and_shapes(cfg, classes, kernels):
    model = functional(Inception, cfg)
    convs = [path for path in model.spec if path.endswith("/bias")]
    assert len(convs) == 94
    assert sum(leaf.count for path, leaf in model.spec.items() if path.endswith("kernel")) == kernels
    found = jax.eval_shape(model.apply, model.spec, jax.ShapeDtypeStruct((2, 64, 48, 3), jnp.uint8))
    assert [leaf.shape for leaf in found] == [(2, 2048), (2, 2023), (2, classes)]
    assert {leaf.dtype for leaf in found} == {jnp.dtype(jnp.float32)}


def test_padding_is_not_in_the_average():
    x = np.random.default_rng(0).standard_normal((1, 4, 5, 2)).astype(np.float32)
    around = [[x[0, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean((0, 1)) for j in range(5)] for i in range(4)]
    np.testing.assert_allclose(pool(x, Pool("average"))[0], around, atol=1e-6)
    largest = [[x[0, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].max((0, 1)) for j in range(5)] for i in range(4)]
    np.testing.assert_array_equal(pool(x, Pool("max"))[0], largest)
    assert pool(x, Pool("max", 2)).shape == (1, 1, 2, 2)


def test_convolution_by_hand():
    layer = functional(lambda conv, rngs: ConvRelu(conv, 3, rngs=rngs), Conv("c", 4, 1, 3, 2, "VALID"))
    params = layer.init(jax.random.key(0)) | {"bias": jnp.arange(-2.0, 2.0)}
    x = np.random.default_rng(0).standard_normal((2, 5, 7, 3)).astype(np.float32)
    kernel = np.asarray(params["kernel"])[0]
    want = [[np.einsum("bkc,kcf->bf", x[:, i, j : j + 3], kernel) for j in (0, 2, 4)] for i in (0, 2, 4)]
    want = np.maximum(np.transpose(want, (2, 0, 1, 3)) + np.arange(-2.0, 2.0), 0)
    np.testing.assert_allclose(layer.apply(params, x), want, atol=1e-5)


@pytest.fixture(scope="module")
def foreign():
    """Tensors in pytorch-fid's names: a kernel [out, in, row, col] and four vectors per convolution."""
    spec = functional(Inception, ADM).spec
    rng = np.random.default_rng(0)
    found = {"fc.weight": rng.standard_normal((1008, 2048), np.float32), "fc.bias": np.ones(1008, np.float32)}
    for path in (path for path in spec if path.endswith("/bias")):
        key = path.removesuffix("/bias").removeprefix("stem/").replace("/", ".")
        rows, cols, channels, width = spec[path.replace("bias", "kernel")].shape
        found[f"{key}.conv.weight"] = rng.standard_normal((width, channels, rows, cols), np.float32)
        for name in ("weight", "bias", "running_mean", "running_var"):
            found[f"{key}.bn.{name}"] = rng.uniform(0.5, 2, width).astype(np.float32)
        found[f"{key}.bn.num_batches_tracked"] = np.zeros((), np.int64)
    return found


def test_batch_norms_are_folded(foreign):
    params = fold(foreign, functional(Inception, ADM).spec, "here")
    np.testing.assert_array_equal(params["fc/kernel"], foreign["fc.weight"].T)
    key = "Mixed_6b.branch7x7_2"
    patch = np.random.default_rng(1).standard_normal((7, 128))  # what a 1 x 7 kernel sees
    before = np.einsum("kc,fck->f", patch, foreign[f"{key}.conv.weight"][:, :, 0].astype(np.float64))
    norm = {
        name: foreign[f"{key}.bn.{name}"].astype(np.float64)
        for name in ("weight", "bias", "running_mean", "running_var")
    }
    want = (before - norm["running_mean"]) / np.sqrt(norm["running_var"] + 0.001) * norm["weight"] + norm["bias"]
    got = np.einsum("kc,kcf->f", patch, params["Mixed_6b/branch7x7_2/kernel"][0]) + params["Mixed_6b/branch7x7_2/bias"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_a_wrong_file_is_one_line(foreign):
    spec = functional(Inception, ADM).spec
    for broken, why in (
        (
            {k: v for k, v in foreign.items() if k != f"{STEM}.bn.running_var"},
            r"'Conv2d_1a_3x3.bn.running_var' is missing",
        ),
        (foreign | {"fc.weight": np.zeros((1000, 2048), np.float32)}, r"'fc.weight' has shape \(1000, 2048\)"),
        (foreign | {"Mixed_8.conv.weight": np.zeros(1)}, "'Mixed_8.conv.weight' is not part"),
    ):
        with pytest.raises(InputError, match=why) as caught:
            fold(broken, spec, "weights.safetensors")
        assert "\n" not in str(caught.value) and str(caught.value).startswith("weights.safetensors: ")


def test_the_same_weights_from_a_file_and_from_a_folder(foreign, tmp_path):
    with weights.create_safetensors(
        tmp_path / "fid.safetensors", {k: Tensor(v.shape, v.dtype) for k, v in foreign.items()}
    ) as out:
        for key, value in foreign.items():
            out[key][...] = value
    found = open_extractor(tmp_path / "fid.safetensors")
    assert found.cfg == ADM
    folder = tmp_path / "folder"
    folder.mkdir()
    weights.write_params(folder, found.params)
    weights.write_config(folder, METHOD, found.cfg)
    again = open_extractor(folder)
    assert again.cfg == ADM
    for path, value in found.params.items():
        np.testing.assert_array_equal(again.params[path], value)
    with pytest.raises(InputError, match="no such file"):
        open_extractor(tmp_path / "absent")
    weights.write_config(folder, "tinyclip", found.cfg)
    with pytest.raises(InputError, match="not an Inception"):
        open_extractor(folder)
    write_json(folder / "config.json", {"format": "heirloom", "method": METHOD, "model": {"depth": 3}})
    with pytest.raises(InputError, match=r"config.json.*depth"):
        open_extractor(folder)
