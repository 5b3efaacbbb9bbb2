"""Linear attention's kernels go through Mosaic's compiler for all heads and chips, with gradients and branch."""

import re

import jax
import jax.numpy as jnp
import pytest

from heirloom.common.nn.functional import functional
from lit_jax.attention import LinearAttention
from lit_jax.linear_attention import linear_attention


def loss(q, k, v, weight, bias, order, grid):
    options = dict(layout="bhdn", implementation="mosaic_tpu", order=order, grid=grid)
    return linear_attention(q, k, v, conv_weight=weight, conv_bias=bias, **options).astype(jnp.float32).sum()


def compiled(sharding, batch, heads, d, grid, order, map_over=0):
    leading = (map_over,) if map_over else ()
    tokens = jax.ShapeDtypeStruct((*leading, batch, heads, d, grid[0] * grid[1]), jnp.bfloat16, sharding=sharding)
    weight = jax.ShapeDtypeStruct((5, 5, heads * d), jnp.float32, sharding=sharding)
    bias = jax.ShapeDtypeStruct((heads * d,), jnp.float32, sharding=sharding)
    run = jax.value_and_grad(lambda *x: loss(*x, order, grid), (0, 1, 2, 3, 4))
    run = jax.vmap(run, (0, 0, 0, None, None)) if map_over else run
    return jax.jit(run).lower(tokens, tokens, tokens, weight, bias).compile()


@pytest.mark.parametrize("d", [32, 64, 192, 256, 288, 384, 576])
@pytest.mark.parametrize("name", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_every_head_compiles_for_every_chip(chip, name, d):
    for order, grid, kernels in (("linear", (32, 32), 5), ("quadratic", (16, 32), 4)):
        text = compiled(chip(name), 2, 1, d, grid, order).as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == kernels


@pytest.mark.parametrize("name", ["v4", "v6e"])
@pytest.mark.parametrize(("grid", "order"), [((128, 128), "linear"), ((25, 40), "linear"), ((8, 8), "quadratic")])
def test_many_odd_and_few_tokens(chip, name, grid, order):
    compiled(chip(name), 1, 1, 288, grid, order)


def test_vmap(chip):
    compiled(chip("v5p"), 2, 1, 64, (16, 32), "linear", map_over=3)


def test_the_module_of_the_model_transposes_nothing(chip):
    """Projections write what the kernels read: no array of tokens is copied or transposed between them."""
    sizes = dict(embed=1152, head=4, head_dim=288, filter_row=5, filter_col=5)
    model = functional(lambda _, rngs: LinearAttention(sizes, implementation="mosaic_tpu", rngs=rngs), None)
    params = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=chip("v5e")) for path, leaf in model.spec.items()
    }
    x = jax.ShapeDtypeStruct((4, 1024, 1152), jnp.bfloat16, sharding=chip("v5e"))

    def run(params, x):
        return jnp.square(model.apply(params, x).astype(jnp.float32)).mean()

    text = jax.jit(jax.grad(run, (0, 1))).lower(params, x).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 5
    # XLA also copies an array as it is, between memories: only another order or shape is work.
    moved = [
        line.strip()[:120]
        for line in text.splitlines()
        if re.search(r"= bf16\[[^=]*1024[^=]* (copy|transpose)\(", line)
    ]
    assert not moved, moved
