"""Linear attention's kernels go through Mosaic's and NVIDIA's compilers for sm_90, with gradients and branch."""

import re

import jax
import jax.numpy as jnp
import pytest

from heirloom.common.nn.functional import functional
from lit_jax.attention import LinearAttention
from lit_jax.kernels import HEADS
from lit_jax.linear_attention import linear_attention


def compiled(sharding, batch, heads, d, grid, order, map_over=0, branch=False):
    """The text of result and gradients, compiled."""
    tokens = jax.ShapeDtypeStruct(
        (*((map_over,) if map_over else ()), batch, grid[0] * grid[1], heads, d), jnp.bfloat16, sharding=sharding
    )
    weight = jnp.ones((5, 5, heads * d)) if branch else None

    def run(q, k, v):
        out = linear_attention(q, k, v, conv_weight=weight, grid=grid, order=order, implementation="mosaic_gpu")
        return out.astype(jnp.float32).sum()

    run = jax.value_and_grad(run, (0, 1, 2))
    return jax.jit(jax.vmap(run) if map_over else run).lower(tokens, tokens, tokens).compile().as_text()


def kernels(text):
    return len(re.findall(r'custom_call_target="mosaic_gpu', text))


@pytest.mark.parametrize("d", HEADS)
@pytest.mark.parametrize(("order", "count"), [("linear", 6), ("quadratic", 7)])
def test_every_head_compiles(hopper, order, count, d):
    assert kernels(compiled(hopper, 2, 2, d, (16, 16), order)) == count


@pytest.mark.parametrize(
    ("d", "grid", "order"), [(288, (128, 128), "linear"), (64, (25, 40), "linear"), (576, (16, 32), "quadratic")]
)
def test_many_odd_and_the_most_tokens(hopper, d, grid, order):
    """A single image of a single head: its state is summed in parts."""
    compiled(hopper, 1, 1, d, grid, order, branch=order == "linear")


def test_vmap(hopper):
    compiled(hopper, 2, 1, 64, (16, 16), "linear", map_over=3)


def test_the_module_of_the_model_transposes_nothing(hopper):
    """Projections write what the kernels read: no array of tokens is copied or transposed between them."""
    sizes = dict(embed=1152, head=4, head_dim=288, filter_row=5, filter_col=5)
    model = functional(
        lambda _, rngs: LinearAttention(sizes, filters="none", implementation="mosaic_gpu", rngs=rngs), None
    )
    params = {
        path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=hopper) for path, leaf in model.spec.items()
    }
    x = jax.ShapeDtypeStruct((4, 1024, 1152), jnp.bfloat16, sharding=hopper)

    def run(params, x):
        return jnp.square(model.apply(params, x).astype(jnp.float32)).mean()

    text = jax.jit(jax.grad(run, (0, 1))).lower(params, x).compile().as_text()
    assert kernels(text) == 6
    moved = [
        line.strip()[:120]
        for line in text.splitlines()
        if re.search(r"= bf16\[[^=]*1024[^=]* (copy|transpose)\(", line)
    ]
    assert not moved, moved
