"""The kernels for Hopper GPUs against the definition in float64, in JAX's interpreter, and lowered for CUDA on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import lit_jax.linear_attention as module
from lit_jax.kernels import Choice, choice, mosaic_gpu
from lit_jax.linear_attention import Unsupported, linear_attention

BARS = {"out": 2.5e-3, "dq": 3.5e-3, "dk": 3.5e-3, "dv": 3.5e-3, "dW": 5e-3, "db": 5e-3}
"""Relative Frobenius error in bfloat16."""


def inputs(images, d, tokens, mean):
    """q, k, v, gradient token-major in bf16; the values have a mean of so many standard deviations. Weight and bias in f32."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((images, tokens, 1, d)) + mean * (name == "v"), jnp.bfloat16) for name in "qkvg"]
    weight, bias = (jnp.asarray(rng.standard_normal(shape) / 5, jnp.float32) for shape in ((5, 5, d), (d,)))
    return arrays, weight, bias


def gradients(arrays, weight, bias, **options):
    """{name: array} of the result and all gradients, as one jitted function."""

    def run(q, k, v, weight, bias, g):
        out, back = jax.vjp(lambda q, k, v, w, b: linear_attention(q, k, v, conv_weight=w, conv_bias=b, **options), q, k, v, weight, bias)
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
    ("images", "d", "grid", "options"),
    [
        (1, 192, (8, 8), dict(order="linear")),
        (2, 32, (6, 12), dict(order="quadratic", eps=0.5, feature_offset=1e-2)),
    ],
)
def test_kernels_meet_the_bars(interpreted_gpu, images, d, grid, options):
    """Several tiles of channels and three warpgroups; then heads and tokens that do not fill a tile, and offsets that count."""
    (q, k, v, g), weight, bias = inputs(images, d, grid[0] * grid[1], mean=3)
    q = q.at[:, ::5].set(-1)  # dead queries
    found = errors(((q, k, v, g), weight, bias), grid=grid, **options)
    assert all(found[name] <= BARS[name] for name in BARS), found


def lowered(run, *shapes):
    """The text of `run` for one Hopper GPU, which is not there."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)):
        return jax.jit(lambda *x: run(*x)).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def kernels(text):
    return text.count("stablehlo.custom_call @mosaic_gpu")


@pytest.mark.parametrize("d", mosaic_gpu.HEADS)
@pytest.mark.parametrize("order", ["linear", "quadratic"])
def test_every_head_lowers_for_a_gpu(d, order):
    """LiT-XL/2's with its gradients, which `tests/gpu` compiles for all."""
    x = jax.ShapeDtypeStruct((1, 256, 2, d), jnp.bfloat16)

    def run(q, k, v):
        return linear_attention(q, k, v, order=order, implementation="mosaic_gpu")

    if d == 288:
        count = 6 if order == "linear" else 7
        assert kernels(lowered(lambda *x: [x, (y := jax.vjp(run, *x))[0], y[1](x[0])], x, x, x)) == count
    else:
        assert kernels(lowered(run, x, x, x)) == 2


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
        (dict(tokens=768, order="quadratic"), "ends at 512 tokens, not 768"),
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
    assert choice() == Choice("xla", "mosaic_gpu is written for Hopper (compute capability 9.0), and this is NVIDIA A100")
    x = jnp.zeros((1, 128, 1, 64), jnp.bfloat16)
    with pytest.raises(Unsupported, match=r"Hopper \(compute capability 9.0\), and this is NVIDIA A100"):
        linear_attention(x, x, x, implementation="mosaic_gpu")
