"""The kernels for Hopper GPUs against the definition in float64, in JAX's interpreter, and lowered for CUDA on a
CPU.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

import lit_jax.linear_attention as module
from lit_jax.kernels import HEADS, Choice, choice, gpu, mosaic_gpu
from lit_jax.linear_attention import Unsupported, linear_attention

BARS = {"out": 2.5e-3, "dq": 3.5e-3, "dk": 3.5e-3, "dv": 3.5e-3, "dW": 5e-3, "db": 5e-3}
"""Relative Frobenius error in bfloat16."""


def inputs(images, heads, d, tokens, mean):
    """q, k, v, gradient token-major in bf16; the values have a mean of so many standard deviations. Weight and bias in
    f32.
    """
    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.standard_normal((images, tokens, heads, d)) + mean * (name == "v"), jnp.bfloat16)
        for name in "qkvg"
    ]
    weight, bias = (
        jnp.asarray(rng.standard_normal(shape) / 5, jnp.float32) for shape in ((5, 5, heads * d), (heads * d,))
    )
    return arrays, weight, bias


def gradients(arrays, weight, bias, **options):
    """{name: array} of the result and all gradients, as one jitted function."""

    def run(q, k, v, weight, bias, g):
        out, back = jax.vjp(
            lambda q, k, v, w, b: linear_attention(q, k, v, conv_weight=w, conv_bias=b, **options),
            q,
            k,
            v,
            weight,
            bias,
        )
        return dict(zip(BARS, (out, *back(g)), strict=True))

    q, k, v, g = arrays
    return jax.jit(run)(q, k, v, weight, bias, g)


def errors(given, **options):
    with jax.enable_x64(True):
        arrays, weight, bias = jax.tree.map(lambda x: x.astype(jnp.float64), given)
        wanted = jax.tree.map(np.asarray, gradients(arrays, weight, bias, **options, implementation="reference"))
    found = gradients(*given, **options, implementation="mosaic_gpu")
    off = {name: np.asarray(found[name], np.float64) - wanted[name] for name in BARS}
    return {name: np.linalg.norm(off[name]) / np.linalg.norm(wanted[name]) for name in BARS}


@pytest.mark.parametrize(
    ("heads", "d", "grid", "options"),
    [
        (1, 192, (8, 8), dict(order="linear")),
        (2, 32, (5, 12), dict(order="quadratic", eps=0.5, feature_offset=1e-2)),
    ],
)
def test_kernels_meet_the_bars(interpreted_gpu, heads, d, grid, options):
    """Several tiles of channels and three warpgroups; then heads, tokens that do not fill a tile, and offsets that
    count.
    """
    (q, k, v, g), weight, bias = inputs(1, heads, d, grid[0] * grid[1], mean=3)
    q = q.at[:, ::5].set(-1)  # dead queries
    found = errors(((q, k, v, g), weight, bias), grid=grid, **options)
    assert all(found[name] <= BARS[name] for name in BARS), found


def by_einsum(name, left, right, results, finish, *, along=(), offset=0, rows=(), columns=(), elementwise=()):
    """`gpu.product` by its definition: what is around the kernels can be tested at sizes that the interpreter takes
    minutes for.
    """

    def of_heads(operand, transposed=False):
        x = jnp.moveaxis(operand.array, 2, 1) if operand.by_token else operand.array
        return (x.swapaxes(2, 3) if transposed else x).astype(jnp.float32)

    x, y = of_heads(left, left.transposed), of_heads(right, right.transposed)
    dots = [jnp.einsum("bhij,bhj->bhi", x + offset, vector) for vector in along]

    def tile(*parts):
        return finish(gpu.Tile(*parts, whole=lambda x: x))

    found = jax.vmap(jax.vmap(tile))(
        x @ y, dots, list(rows), list(columns), [of_heads(operand) for operand in elementwise]
    )

    def placed(x, result):
        return x if result.vector else (jnp.moveaxis(x, 1, 2) if result.by_token else x).astype(result.dtype)

    return [placed(x, result) for x, result in zip(found, results, strict=True)]


def test_a_product_is_what_its_definition_says(interpreted_gpu):
    """Two heads, two tiles of rows and two warpgroups, with all that can be given and returned."""
    rng = np.random.default_rng(0)

    def array(*shape, dtype=jnp.bfloat16):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    left, right, other = (
        gpu.Operand(array(1, 2, 128, 64), by_token=False),
        gpu.Operand(array(1, 64, 2, 256)),
        array(1, 128, 2, 256),
    )
    along, rows, columns = (array(1, 2, n, dtype=jnp.float32) for n in (64, 128, 256))

    def finish(tile):
        whole = tile.whole(tile.product.sum(1))
        return [
            tile.product + tile.down(tile.rows[0]) * tile.across(tile.columns[0]) + tile.elementwise[0],
            whole + tile.dots[0],
        ]

    given = dict(along=[along], offset=0.5, rows=[rows], columns=[columns], elementwise=[gpu.Operand(other)])
    results = [gpu.Result(jnp.float32), gpu.Result(vector=True)]
    for found, wanted in zip(
        *(run("x", left, right, results, finish, **given) for run in (gpu.product, by_einsum)), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("d", "grid", "order", "parts"), [(32, (15, 40), "linear", 2), (64, (6, 12), "quadratic", 1)])
def test_images_heads_parts_and_padded_tokens_meet_the_bars(monkeypatch, d, grid, order, parts):
    """All that the kernels are called with and what is done with their results, the products themselves by XLA."""
    monkeypatch.setattr(mosaic_gpu, "product", by_einsum)
    tokens = grid[0] * grid[1]
    assert tokens % gpu.TILE and mosaic_gpu._parts(2 * 2, -(-tokens // gpu.TILE)) == parts
    found = errors(inputs(2, 2, d, tokens, mean=3), grid=grid, order=order, eps=0.5, feature_offset=1e-2)
    assert all(found[name] <= BARS[name] for name in BARS), found


def test_devices_add_a_bfloat16_filters_gradient_in_float32():
    """Each device's part of it is not rounded before it is summed over the batch."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    x, weight = jnp.zeros((2, 64, 1, 64), jnp.bfloat16), jnp.zeros((5, 5, 64), jnp.bfloat16)

    def loss(weight):
        return linear_attention(
            x, x, x, conv_weight=weight, shards=PartitionSpec("data"), implementation="mosaic_gpu"
        ).sum()

    with jax.set_mesh(mesh):
        text = str(jax.make_jaxpr(jax.grad(loss))(weight))
    summed = re.findall(r"(\w+):(\w+)\[5,5,64\][^=]*= psum", text)
    assert [dtype for _, dtype in summed] == ["f32"]


def lowered(run, *shapes):
    """The text of `run` for one Hopper GPU, which is not there."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(
        AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    ):
        return jax.jit(lambda *x: run(*x)).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def kernels(text):
    return text.count("stablehlo.custom_call @mosaic_gpu")


@pytest.mark.parametrize(
    ("d", "tokens", "order", "count"), [*((d, 1024, "linear", 6) for d in HEADS), (288, 256, "quadratic", 7)]
)
def test_every_head_lowers_for_a_gpu(d, tokens, order, count):
    """With its gradients and the branch; `tests/gpu` compiles both orders of all."""
    x = jax.ShapeDtypeStruct((1, tokens, 2, d), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((5, 5, 2 * d), jnp.float32)

    def run(q, k, v, weight):
        return linear_attention(q, k, v, conv_weight=weight, order=order, implementation="mosaic_gpu")

    assert kernels(lowered(lambda *x: [(y := jax.vjp(run, *x))[0], y[1](x[0])], x, x, x, weight)) == count


def test_the_kernel_is_for_gpus_and_only_when_it_is_chosen(monkeypatch):
    x = jax.ShapeDtypeStruct((1, 256, 1, 64), jnp.bfloat16)

    def run(q, k, v):
        return jax.vjp(linear_attention, q, k, v)[0]

    assert kernels(lowered(run, x, x, x)) == 0
    monkeypatch.setattr(module, "choice", lambda: Choice("mosaic_gpu", "measured"))
    assert kernels(lowered(run, x, x, x)) == 2
    assert kernels(jax.jit(lambda *x: run(*x)).lower(x, x, x).as_text()) == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(dtype=jnp.float32), "computes in bfloat16, the arrays are float32"),
        (dict(d=96), "must be one of 32, 64, 192, 256, 288, 384, 576, not 96"),
        (dict(tokens=768, order="quadratic"), "supports up to 512 tokens, not 768"),
    ],
)
def test_a_named_kernel_says_why_it_cannot(change, reason):
    x = jnp.zeros((1, change.get("tokens", 128), 1, change.get("d", 64)), change.get("dtype", jnp.bfloat16))
    with pytest.raises(Unsupported, match=reason):
        linear_attention(x, x, x, order=change.get("order"), implementation="mosaic_gpu")


def test_other_gpus_are_refused_by_name_and_never_chosen(monkeypatch):
    class Ampere:
        platform, compute_capability, device_kind = "gpu", "8.0", "NVIDIA A100"

    monkeypatch.setattr(jax, "devices", lambda: [Ampere()])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choice() == Choice(
        "xla", "mosaic_gpu is written for Hopper (compute capability 9.0), and this is NVIDIA A100"
    )
    x = jnp.zeros((1, 128, 1, 64), jnp.bfloat16)
    with pytest.raises(Unsupported, match=r"Hopper \(compute capability 9.0\), and this is NVIDIA A100"):
        linear_attention(x, x, x, implementation="mosaic_gpu")
