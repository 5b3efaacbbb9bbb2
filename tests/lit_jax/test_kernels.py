"""The kernels of linear attention against its definition in float64, in the interpreter, and how they are chosen, split
and mapped.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lit_jax.linear_attention as module
from heirloom.common.nn.functional import functional
from heirloom.common.train.optim import make_optimizer
from heirloom.common.train.state import create_state
from heirloom.common.train.step import StepConfig, make_step
from lit_jax.dit import Dit, DitConfig
from lit_jax.kernels import Choice, choice, tpu, xla
from lit_jax.linear_attention import Unsupported, linear_attention
from lit_jax.train import Config, loss_fn

BARS = {"out": 2.5e-3, "dq": 3.5e-3, "dk": 3.5e-3, "dv": 3.5e-3, "dW": 5e-3, "db": 5e-3}
"""Relative Frobenius error in bfloat16."""
COMPILER_PARAMS = pltpu.CompilerParams


@pytest.fixture
def interpreted():
    """Kernels of TPUs run on the CPU; memory that nothing was written to is NaN."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        yield
    pltpu.reset_tpu_interpret_mode_state()


def inputs(batch, heads, d, tokens, mean=0.0, seed=0):
    """q, k, v, gradient feature-major in bf16; the values have a mean of so many standard deviations. Weight and bias
    in f32.
    """
    rng = np.random.default_rng(seed)
    arrays = [
        jnp.asarray(rng.standard_normal((batch, heads, d, tokens)) + mean * (name == "v"), jnp.bfloat16)
        for name in "qkvg"
    ]
    weight, bias = (
        jnp.asarray(rng.standard_normal(shape) / 5, jnp.float32) for shape in ((5, 5, heads * d), (heads * d,))
    )
    return arrays, weight, bias


def error(ours, exact):
    ours, exact = np.asarray(ours, np.float64), np.asarray(exact, np.float64)
    return np.linalg.norm(ours - exact) / np.linalg.norm(exact)


def gradients(arrays, weight, bias, **options):
    """{name: array} of the result and all gradients, as one jitted function."""
    q, k, v, g = arrays

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

    return jax.jit(run)(q, k, v, weight, bias, g)


def exact(arrays, weight, bias, **options):
    with jax.enable_x64(True):
        wide = [x.astype(jnp.float64) for x in (*arrays, weight, bias)]
        return gradients(wide[:4], *wide[4:], **options | {"implementation": "reference"})


@pytest.mark.parametrize(
    ("images", "heads", "d", "grid", "order", "mean"),
    [
        (1, 1, 32, (20, 32), "linear", 3),
        (1, 1, 288, (8, 16), "linear", 1),
        (2, 2, 32, (10, 13), "linear", 0),
        (2, 1, 32, (8, 16), "quadratic", 3),
    ],
)
def test_tpu_kernels_meet_the_bars(interpreted, images, heads, d, grid, order, mean):
    """Five blocks of tokens, the model's own head, images and heads of tokens that are padded, and the quadratic
    order.
    """
    assert tpu._block(20 * 32) == 128
    given = inputs(images, heads, d, grid[0] * grid[1], mean)
    options = dict(layout="bhdn", grid=grid, order=order)
    ours, wanted = gradients(*given, implementation="mosaic_tpu", **options), exact(*given, **options)
    errors = {name: error(ours[name], wanted[name]) for name in BARS}
    assert all(errors[name] <= BARS[name] for name in BARS), errors


def test_dead_queries_and_keys_and_large_offsets(interpreted):
    (q, k, v, g), weight, bias = inputs(1, 2, 32, 128)
    q, k = q.at[:, 0, :, :64].set(-1), k.at[:, 1].set(-1)
    given = (q, k, v, g), weight, bias
    options = dict(layout="bhdn", grid=(8, 16), order="linear", eps=0.5, feature_offset=1e-2)
    ours, wanted = gradients(*given, implementation="mosaic_tpu", **options), exact(*given, **options)
    assert all(error(ours[name], wanted[name]) <= BARS[name] for name in BARS)


def test_token_major_and_vmap_with_one_operand_shared(interpreted, monkeypatch):
    # JAX's interpreter, unlike its compiler, does not know that vmap adds an axis to the grid whose semantics were
    # named.
    monkeypatch.setattr(pltpu, "CompilerParams", lambda **_: COMPILER_PARAMS())
    (q, k, v, _), *_ = inputs(2, 1, 32, 128)
    turned = [jnp.moveaxis(x, 3, 1) for x in (q, k, v)]
    run = jax.jit(
        jax.vmap(lambda q, k, v: linear_attention(q[None], k[None], v[None], implementation="mosaic_tpu"), (0, None, 0))
    )
    out = run(turned[0], turned[1][0], turned[2])
    for i in range(2):
        one = linear_attention(*(x[j][None] for x, j in zip(turned, (i, 0, i), strict=True)), implementation="xla")
        assert error(out[i], one) < BARS["out"]


def test_second_derivatives(interpreted):
    """XLA's form has them; a kernel says that it does not."""
    (q, k, v, _), *_ = inputs(1, 1, 32, 128)

    def twice(implementation, dtype):
        def loss(q):
            return linear_attention(
                q, *(x.astype(dtype) for x in (k, v)), layout="bhdn", implementation=implementation
            ).sum()

        return jax.grad(lambda q: jnp.square(jax.grad(loss)(q)).sum())(q.astype(dtype))

    assert error(twice("xla", jnp.float32), twice("reference", jnp.float32)) < 1e-3
    with pytest.raises(NotImplementedError, match="once"):
        twice("mosaic_tpu", jnp.bfloat16)


@pytest.mark.parametrize("layout", ["bhdn", "bnhd"])
@pytest.mark.parametrize("order", ["linear", "quadratic"])
def test_a_batch_and_heads_on_a_mesh_equal_the_whole(monkeypatch, order, layout):
    """XLA's form in place of the kernel, which the interpreter runs on one device at a time: the same split, and sums
    over the batch.
    """
    monkeypatch.setattr(module, "_module", lambda _: xla)
    arrays, weight, bias = inputs(4, 2, 32, 64)
    arrays = [x.astype(jnp.float32) if layout == "bhdn" else jnp.moveaxis(x, 3, 1).astype(jnp.float32) for x in arrays]
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    options = dict(layout=layout, grid=(8, 8), implementation="mosaic_tpu", order=order)
    whole = gradients(arrays, weight, bias, **options)
    with jax.set_mesh(mesh):
        split = gradients(arrays, weight, bias, shards=P("data", "tensor"), **options)
    for name in BARS:
        assert error(split[name], whole[name]) < 1e-5, name
    assert split["out"].sharding.shard_shape(split["out"].shape)[0] == 2


def test_tokens_on_a_mesh_equal_the_whole_and_are_not_gathered():
    """XLA splits its own form: sums over tokens are reduced, the branch gets rows from its neighbours."""
    (q, k, v, g), weight, bias = inputs(1, 2, 16, 512)
    arrays = [jnp.moveaxis(x, 3, 1).astype(jnp.float32) for x in (q, k, v, g)]
    mesh = jax.make_mesh((4,), ("token",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])

    @jax.jit
    def run(q, k, v, g, weight, bias):
        return gradients((q, k, v, g), weight, bias, grid=(32, 16), implementation="xla")

    placed = [jax.device_put(x, NamedSharding(mesh, P(None, "token"))) for x in arrays]
    with jax.set_mesh(mesh):  # as in training
        compiled = run.lower(*placed, weight, bias).compile()
    split, whole = compiled(*placed, weight, bias), run(*arrays, weight, bias)
    assert all(error(split[name], whole[name]) < 1e-5 for name in BARS)
    text = compiled.as_text()
    assert "all-reduce(" in text and "collective-permute(" in text and "all-gather(" not in text


def test_remat_with_state_and_result_saved_runs_the_forward_kernel_once():
    (q, k, v, _), *_ = inputs(1, 1, 32, 384)

    def kernels(*names):
        def loss(q, k, v):
            out = linear_attention(jnp.sin(q), k, v, layout="bhdn", implementation="mosaic_tpu")
            return jnp.square(out.astype(jnp.float32)).sum()

        saving = jax.checkpoint_policies.save_only_these_names(*names)
        return str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=saving)))(q, k, v)).count(
            "name=linear_attention_forward"
        )

    assert kernels("lin_attn_state", "lin_attn_out") == 1
    assert kernels() == 2


def test_a_kernel_is_chosen_where_it_was_measured_and_nowhere_else(monkeypatch):
    assert choice() == Choice("xla", "there is no kernel for cpu")
    (q, k, v, _), weight, bias = inputs(1, 1, 32, 384)

    def text(platform, x=q):
        def run(q, k, v):
            return linear_attention(q, k, v, layout="bhdn", conv_weight=weight, conv_bias=bias, grid=(16, 24)).sum()

        every = jax.jit(jax.value_and_grad(run, (0, 1, 2)))  # newer JAX leaves out the kernels nobody asks for
        return every.trace(x, k.astype(x.dtype), v.astype(x.dtype)).lower(lowering_platforms=(platform,)).as_text()

    assert "tpu_custom_call" not in text("tpu")
    monkeypatch.setattr(module, "choice", lambda: Choice("mosaic_tpu", "measured"))
    assert text("tpu").count("tpu_custom_call") == 5
    assert "tpu_custom_call" not in text("cpu")
    assert "tpu_custom_call" not in text("tpu", q.astype(jnp.float32)), "what the kernel cannot take goes to XLA"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(dtype=jnp.float32), "computes in bfloat16, the arrays are float32"),
        (dict(d=96), "must be one of 32, 64, 192, 256, 288, 384, 576, not 96"),
        (dict(window=7), "filters of 5 x 5, not 7 x 7"),
        (dict(tokens=768, order="quadratic"), "supports up to 512 tokens, not 768"),
    ],
)
def test_a_named_kernel_says_why_it_cannot(change, reason):
    order = change.get("order")
    x = jnp.zeros((1, 1, change.get("d", 32), change.get("tokens", 128)), change.get("dtype", jnp.bfloat16))
    weight = jnp.zeros((change["window"],) * 2 + (32,)) if "window" in change else None
    with pytest.raises(Unsupported, match=reason):
        linear_attention(
            x, x, x, layout="bhdn", conv_weight=weight, grid=(8, 16), order=order, implementation="mosaic_tpu"
        )


@pytest.mark.parametrize("d", [32, 64, 192, 256, 288, 384, 576])
@pytest.mark.parametrize("order", ["linear", "quadratic"])
def test_every_head_lowers_for_a_tpu(d, order):
    shape = jax.ShapeDtypeStruct((1, 2, d, 512), jnp.bfloat16)
    weight = jnp.zeros((5, 5, 2 * d))

    def run(q, k, v):
        return linear_attention(
            q, k, v, layout="bhdn", conv_weight=weight, grid=(16, 32), order=order, implementation="mosaic_tpu"
        ).sum()

    text = (
        jax.jit(jax.value_and_grad(run, (0, 1, 2)))
        .trace(shape, shape, shape)
        .lower(lowering_platforms=("tpu",))
        .as_text()
    )
    assert text.count("tpu_custom_call") == (5 if order == "linear" else 4)


@cache
def step_of_lit(implementation):
    """Loss and gradient norm of a step in bfloat16."""
    cfg = DitConfig(size=16, channels=3, patch=2, width=64, layers=1, heads=2, hidden=64, classes=4, attention="linear")
    rng = np.random.default_rng(0)
    batch = {"image": rng.standard_normal((1, 16, 16, 3)).astype(np.float32), "label": np.arange(1, dtype=np.int32)}
    mesh = jax.make_mesh(
        (1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )
    model = functional(Dit, replace(cfg, implementation=implementation))
    recipe = Config(student=cfg, step=StepConfig(compute="bfloat16"))
    optimizer = make_optimizer(recipe.optim, model.spec, 1)
    step = make_step(loss_fn(recipe, model, None, None), optimizer, model.spec, mesh, recipe.step)
    # The gates and the last layer start at zero, behind which no gradient reaches attention.
    params = {
        path: x + 0.1 * rng.standard_normal(x.shape, np.float32) for path, x in model.init(jax.random.key(0)).items()
    }
    _, metrics = step(create_state(params, optimizer, model.spec, mesh), batch)
    return np.array([float(metrics[name][0]) for name in ("loss", "grad_norm")])


@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu", "mosaic_gpu"])
def test_a_lit_takes_one_step_with_each_implementation(implementation, request):
    if implementation == "mosaic_gpu" and jax.__version_info__ < (0, 11):
        pytest.skip("the interpreter of jax 0.10 takes half a minute for it; it runs with newer ones")
    if implementation != "xla":
        request.getfixturevalue({"mosaic_tpu": "interpreted", "mosaic_gpu": "interpreted_gpu"}[implementation])
    off = np.abs(step_of_lit(implementation) / step_of_lit("reference") - 1)
    assert off[0] < 2e-3 and off[1] < 2e-2, off
