"""Quantised kernels: half a step, products, transformations, and which parameters are quantised."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from qwix import QArray, dequantize

from heirloom.common.nn.block import each, scan, stack
from heirloom.common.nn.dense import Dense
from heirloom.common.nn.functional import functional
from heirloom.common.nn.precision import convolve, product
from heirloom.common.nn.quantized import quantizable, quantize, quantized, scale_shape
from heirloom.common.surgery.axes import Axes, Leaf


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def leaf(axes, *shape, **ragged):
    return Leaf(Axes.parse(axes), shape, np.dtype(np.float32), ragged)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_values_are_off_by_half_a_step_of_their_channel_at_most(dtype):
    kernel = (normal(64, 3, 5) * np.logspace(-6, 3, 15).reshape(3, 5)).astype(dtype)
    found = quantize(kernel, scale_shape(leaf("embed -> head head_dim", 64, 3, 5)))
    assert found.qvalue.dtype == np.int8 and found.scale.dtype == np.float32 and found.scale.shape == (1, 3, 5)
    exact = kernel.astype(np.float64)
    largest = np.abs(exact).max(0, keepdims=True)
    np.testing.assert_allclose(found.scale, largest / 127.5, rtol=1e-6)
    error = np.abs(exact - found.qvalue.astype(np.float64) * found.scale)
    assert (error <= found.scale / 2 * (1 + 2e-5)).all() and error.max() > 0  # 127.5 steps are a float32, too
    assert (np.abs(found.qvalue.astype(int)).max(0) >= 127).all()


def test_each_layer_has_its_own_scales_and_a_channel_of_zeros_stays_zero():
    kernel = normal(2, 8, 4) * np.array([1.0, 100.0], np.float32)[:, None, None]
    kernel[1, :, 2] = 0
    found = quantize(kernel, scale_shape(leaf("layer embed -> hidden", 2, 8, 4)))
    assert found.scale.shape == (2, 1, 4) and (found.qvalue[1, :, 2] == 0).all()
    assert np.isfinite(found.scale).all() and (found.scale > 0).all()
    kept = [0, 1, 3]
    np.testing.assert_allclose(found.scale[1, 0, kept], np.abs(kernel[1]).max(0)[kept] / 127.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("equation", "kernel", "axes"),
    [
        ("bte,ehd->bthd", (8, 2, 6), "embed -> head head_dim"),
        ("bthd,hde->bte", (2, 6, 8), "head head_dim -> embed"),
        ("bne,ehd->bhdn", (8, 2, 6), "embed -> head head_dim"),
    ],
)
def test_a_product_is_that_with_the_dequantised_kernel(equation, kernel, axes):
    x = normal(3, 5, *(kernel[:2] if equation.startswith("bth") else kernel[:1]))
    small = quantize(normal(*kernel, seed=1), scale_shape(leaf(axes, *kernel)))
    wide = np.asarray(dequantize(jax.tree.map(jnp.asarray, small)))
    expected = np.einsum(equation, x.astype(np.float64), wide)
    np.testing.assert_allclose(product(equation, x, small), expected, rtol=1e-5, atol=1e-5)
    half = product(equation, x, small.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float64), expected, atol=0.02 * np.abs(expected).max())


def test_scales_that_differ_along_a_summed_axis_are_refused():
    small = quantize(normal(6, 4), (6, 4))
    with pytest.raises(ValueError, match=r"be,eh->bh: scales \(6, 4\) differ along an axis that is summed over"):
        product("be,eh->bh", normal(3, 6), small)


class Tower(nnx.Module):
    """Two layers of a stack, and what each says of the input."""

    def __init__(self, cfg, *, rngs):
        sizes = dict(embed=8, part=2)
        self.blocks = stack(lambda rngs: Dense("embed -> embed", sizes, rngs=rngs), 2, rngs)
        self.parts = stack(lambda rngs: Dense("embed -> part embed", sizes, rngs=rngs), 2, rngs)

    def __call__(self, x):
        return scan(self.blocks, x), each(self.parts, x)


@pytest.fixture(scope="module")
def tower():
    model = functional(Tower, None)
    params = model.init(jax.random.key(0))
    small = {
        path: quantize(np.asarray(x), scale_shape(model.spec[path])) if path.endswith("kernel") else x
        for path, x in params.items()
    }
    wide = {path: dequantize(jax.tree.map(jnp.asarray, x)) if quantized(x) else x for path, x in small.items()}
    return model, small, wide


def test_a_model_takes_quantised_kernels_in_stacks_jit_vmap_and_gradients(tower):
    model, small, wide = tower
    x = normal(3, 8)
    assert quantized(small) and not quantized(wide)
    expected = model.apply(wide, x)
    assert expected[0].shape == (3, 8) and expected[1].shape == (2, 3, 2, 8)
    for found in (model.apply(small, x), jax.jit(model.apply)(small, x)):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)
    rows = jax.vmap(lambda x: model.apply(small, x[None])[0][0])(x)
    np.testing.assert_allclose(rows, expected[0], rtol=1e-5, atol=1e-6)
    slopes = [jax.grad(lambda x, params=params: model.apply(params, x)[0].sum())(x) for params in (small, wide)]
    np.testing.assert_allclose(*slopes, rtol=1e-5, atol=1e-6)


def test_a_kernel_of_another_shape_is_named_and_other_operations_refuse(tower):
    model, small, _ = tower
    path = "blocks/kernel"
    with pytest.raises(ValueError, match=r"blocks/kernel: shape \(1, 8, 8\)"):
        model.apply(small | {path: QArray(small[path].qvalue[:1], small[path].scale[:1])}, normal(3, 8))
    filters = quantize(normal(3, 3, 2, 4), (1, 1, 1, 4))
    with pytest.raises(TypeError):
        convolve(normal(1, 8, 8, 2), filters, 1, (1, 1))


@pytest.mark.parametrize(
    ("path", "axes", "shape", "expected"),
    [
        ("blocks/attn/query/kernel", "layer embed -> head head_dim", (2, 64, 4, 16), True),
        ("blocks/attn/query/kernel", "layer embed -> head head_dim", (20, 16, 4, 16), False),  # 1,024 a layer
        ("final/kernel", "embed -> patch_row patch_col out_channel", (1152, 2, 2, 8), False),
        ("patch/project/kernel", "patch_row patch_col channel -> embed", (14, 14, 3, 1152), False),
        ("conv/kernel", "row col in -> out", (3, 3, 64, 64), False),
        ("embed/table", "vocab -> embed", (32128, 64), False),
        ("norm/scale", "layer embed", (28, 4096), False),
        ("blocks/mlp/up/bias", "layer -> hidden", (28, 4608), False),
    ],
)
def test_kernels_of_matmuls_are_quantised_and_nothing_else(path, axes, shape, expected):
    assert quantizable(path, leaf(axes, *shape)) == expected


def test_a_kernel_whose_layers_differ_in_size_stays_as_it_is():
    assert not quantizable("a/kernel", leaf("layer embed -> head head_dim", 2, 64, 4, 16, head=(4, 2)))
