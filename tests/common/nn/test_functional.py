"""The bridge: total, exact about shapes, and the same bits however much of a tree is made."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from heirloom.common.nn.attention import Attention, softmax
from heirloom.common.nn.block import Block, each, scan, stack
from heirloom.common.nn.dense import Dense, normal, param, uniform_fan_in, xavier_uniform
from heirloom.common.nn.functional import functional
from heirloom.common.nn.mlp import ACTIVATIONS, Mlp
from heirloom.common.nn.norm import LayerNorm

SIZES = dict(embed=8, head=2, head_dim=4, hidden=16)
ATTENTION = partial(Attention, SIZES, attend=softmax())


class Tower(nnx.Module):
    def __init__(self, cfg, *, rngs):
        self.blocks = stack(
            lambda rngs: Block(SIZES, attention=ATTENTION, activation="gelu", eps=1e-5, rngs=rngs), cfg["layers"], rngs
        )
        self.norm = LayerNorm(SIZES, eps=1e-5, rngs=rngs)
        self.remat = cfg.get("remat", "none")

    def __call__(self, x):
        return self.norm(scan(self.blocks, x, remat=self.remat))


def inputs():
    return np.random.default_rng(1).normal(size=(2, 5, 8)).astype(np.float32)


def drawn(model, seed=0):
    """Parameters without compiling an initialiser."""
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, jnp.float32) for path, leaf in model.spec.items()}


def test_spec_has_paths_axes_and_shapes():
    spec = functional(Tower, {"layers": 3}).spec
    assert str(spec["blocks/attn/query/kernel"]) == "layer=3 embed=8 -> head=2 head_dim=4"
    assert str(spec["blocks/mlp/down/bias"]) == "layer=3 -> embed=8"
    assert str(spec["norm/scale"]) == "embed=8"
    assert len(spec) == 18


def test_scan_equals_the_blocks_one_by_one():
    # Eleven layers: unrolled blocks with string keys would be permuted ("10" < "2").
    model = functional(Tower, {"layers": 11})
    params = drawn(model)
    single = functional(
        lambda cfg, rngs: Block(SIZES, attention=ATTENTION, activation="gelu", eps=1e-5, rngs=rngs), None
    )
    x, apply = inputs(), jax.jit(single.apply)
    for i in range(11):
        x = apply({p.removeprefix("blocks/"): v[i] for p, v in params.items() if p.startswith("blocks/")}, x)
    x = np.asarray(x)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * params["norm/scale"] + params["norm/bias"]
    np.testing.assert_allclose(jax.jit(model.apply)(params, inputs()), x, atol=1e-5)


def test_remat_changes_memory_and_not_gradients():
    def gradient(remat):
        model = functional(Tower, {"layers": 3, "remat": remat})
        # Compiled without the optimiser's passes, which take most of the time and change nothing here.
        step = jax.jit(
            jax.grad(lambda p: jnp.sin(model.apply(p, inputs())).sum()),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        return step(drawn(model))

    plain = gradient("none")
    for remat in ("full", "dots"):
        for path, value in gradient(remat).items():
            np.testing.assert_allclose(
                value, plain[path], atol=1e-5 * max(1, float(jnp.abs(plain[path]).max())), err_msg=path
            )


def test_trap_merge_would_take_any_tree():
    model = functional(Tower, {"layers": 2})
    params = drawn(model)
    with pytest.raises(ValueError, match="missing parameter 'norm/bias'"):
        model.apply({p: v for p, v in params.items() if p != "norm/bias"}, inputs())
    with pytest.raises(ValueError, match="unknown parameter 'norm/bais'; did you mean 'norm/bias'"):
        model.apply(params | {"norm/bais": params["norm/bias"]}, inputs())
    with pytest.raises(ValueError, match=r"norm/bias: shape \(9,\), the model has embed=8"):
        model.apply(params | {"norm/bias": jnp.zeros(9)}, inputs())
    # Jitted functions sort the keys of a dict: the order is turned round inside.
    turned = jax.jit(lambda params: model.apply(dict(reversed(params.items())), inputs()))
    np.testing.assert_array_equal(turned(params), jax.jit(model.apply)(params, inputs()))


def test_trap_a_part_of_the_tree_has_the_bits_of_the_whole():
    model = functional(Tower, {"layers": 3})
    whole = model.init(jax.random.key(3))
    part = model.init(jax.random.key(3), ["blocks/attn/out/kernel", "norm/scale", "blocks/mlp/up/bias"])
    assert set(part) == {"blocks/attn/out/kernel", "norm/scale", "blocks/mlp/up/bias"}
    for path, value in part.items():
        np.testing.assert_array_equal(value, whole[path])
    # each layer its own draw
    assert not np.array_equal(whole["blocks/attn/out/kernel"][0], whole["blocks/attn/out/kernel"][1])


def test_trap_parts_in_any_sharding_have_the_bits_of_the_whole():
    """Normal numbers made eagerly differ in the last bits in some releases of jax; init always compiles."""

    class Tables(nnx.Module):
        def __init__(self, cfg, *, rngs):
            self.table = param("vocab -> embed", SIZES | {"vocab": 512}, normal(0.02), rngs)
            self.kernel = param("embed -> hidden", SIZES, xavier_uniform(), rngs)
            self.bias = param("-> hidden", SIZES, uniform_fan_in, rngs, fan_in=8)

    model, key = functional(Tables, None), jax.random.key(3)
    whole = model.init(key)
    mesh = jax.make_mesh((8,), ("parts",), axis_types=(AxisType.Auto,))
    place = {path: NamedSharding(mesh, PartitionSpec("parts")) for path in model.spec}
    for paths in (["table"], ["kernel", "bias"], list(model.spec)):
        spread = model.init(key, paths, place)
        assert spread.keys() == set(paths)
        for path, value in spread.items():
            assert value.sharding == place[path]
            np.testing.assert_array_equal(value, whole[path])


def test_a_population_runs_under_vmap():
    model = functional(Tower, {"layers": 2})
    params, apply = [drawn(model, seed) for seed in range(3)], jax.jit(model.apply)
    together = jax.jit(jax.vmap(model.apply, in_axes=(0, None)))(
        jax.tree.map(lambda *x: jnp.stack(x), *params), inputs()
    )
    for i, p in enumerate(params):
        np.testing.assert_allclose(together[i], apply(p, inputs()), atol=1e-5)


def test_bf16_kernels_stay_near_f32():
    model = functional(Tower, {"layers": 2})
    params, apply = drawn(model), jax.jit(model.apply)
    half = {p: v.astype(jnp.bfloat16) if p.endswith("kernel") else v for p, v in params.items()}
    exact, rough = apply(params, inputs()), apply(half, inputs())
    assert float(jnp.abs(exact - rough).max()) < 0.05
    assert float(jnp.abs(exact - rough).max()) > 0  # it did compute in bf16


def test_initialisers_have_their_documented_spread():
    key = jax.random.key(0)
    x = np.asarray(uniform_fan_in(key, (400, 300), 400, 300))
    assert abs(x.max() - 400**-0.5) < 1e-4 and abs(x.std() - 400**-0.5 / 3**0.5) < 1e-3
    x = np.asarray(xavier_uniform(3)(key, (400, 300), 400, 300))
    assert abs(x.max() - (6 / 1300) ** 0.5) < 1e-4
    assert abs(np.asarray(normal(0.02)(key, (400, 300), 1, 1)).std() - 0.02) < 1e-4
    sizes = dict(embed=100, hidden=7)
    bias = param("-> hidden", sizes, uniform_fan_in, nnx.Rngs(0), fan_in=100)
    assert float(jnp.abs(bias[...]).max()) <= 0.1 and bias.get_metadata()["axes"] == "-> hidden"


def test_dense_over_several_axes():
    layer = Dense("head head_dim -> embed", SIZES, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32)
    np.testing.assert_allclose(layer(x), np.einsum("nhd,hde->ne", x, layer.kernel[...]), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "at_one", "at_minus_two"), [("gelu", 0.8413447, -0.0455003), ("quick_gelu", 0.8457957, -0.0643419)]
)
def test_both_gelus(name, at_one, at_minus_two):
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.array([1.0, -2.0])), [at_one, at_minus_two], atol=1e-6)


def test_a_modulated_block_shifts_scales_and_gates_each_branch():
    """adaLN-Zero by its formula, with a modulation of its own per example and, through scan, per layer."""

    class Net(nnx.Module):
        def __init__(self, cfg, *, rngs):
            one = partial(Block, SIZES, attention=ATTENTION, activation="gelu", eps=1e-6, affine=False)
            self.blocks = stack(lambda rngs: one(rngs=rngs), 2, rngs)
            self.made = stack(lambda rngs: Dense("embed -> part embed", SIZES | {"part": 6}, rngs=rngs), 2, rngs)

        def __call__(self, x, c):
            return scan(self.blocks, x, jnp.moveaxis(each(self.made, c), 2, 1))

        def modulations(self, c):
            return each(self.made, c)

    model = functional(Net, None)
    assert not [path for path in model.spec if "norm" in path]
    params = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    x, c = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3, 5, 8), (3, 8)))
    made = model.apply(params, c, method="modulations")
    for layer in range(2):
        expected = jnp.einsum("be,epf->bpf", c, params["made/kernel"][layer], precision="highest")
        np.testing.assert_allclose(made[layer], expected, atol=1e-5)

    def normal(x):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)

    plain = functional(
        lambda cfg, rngs: Block(SIZES, attention=ATTENTION, activation="gelu", eps=1e-6, affine=False, rngs=rngs), None
    )
    attn, mlp = (functional(make, None) for make in (
        lambda cfg, rngs: ATTENTION(rngs=rngs),
        lambda cfg, rngs: Mlp(SIZES, activation="gelu", up=uniform_fan_in, down=uniform_fan_in, rngs=rngs),
    ))  # fmt: skip
    y = x
    for layer in range(2):
        own = {path: params[f"blocks/{path}"][layer] for path in plain.spec}
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (made[layer][:, i, None] for i in range(6))
        inner = {path.removeprefix("attn/"): v for path, v in own.items() if path.startswith("attn/")}
        y = y + gate_a * attn.apply(inner, normal(y) * (1 + scale_a) + shift_a)
        inner = {path.removeprefix("mlp/"): v for path, v in own.items() if path.startswith("mlp/")}
        y = y + gate_m * mlp.apply(inner, normal(y) * (1 + scale_m) + shift_m)
    np.testing.assert_allclose(model.apply(params, x, c), y, atol=2e-5)
