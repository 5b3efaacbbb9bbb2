"""Softmax attention in blocks, as CPUs compute it: the same numbers with little memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heirloom.common.nn import attention
from heirloom.common.nn.attention import blockwise, softmax


def draw(*shapes, dtype=jnp.float32):
    return [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]


def plain(query, key, value, mask=None):
    over_keys = None if mask is None else mask[:, None, None]
    with jax.default_matmul_precision("highest"):
        return jax.nn.dot_product_attention(query, key, value, mask=over_keys)


@pytest.mark.parametrize("sizes", [(128, 128), (130, 77), (5, 300), (256, 40)])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_are_the_whole(sizes, masked, monkeypatch):
    """Also where neither queries nor keys fill their blocks, and with several blocks of keys."""
    queries, keys = sizes
    query, key, value = draw((2, queries, 3, 24), (2, keys, 3, 24), (2, keys, 3, 24))
    mask = jnp.arange(keys) < jnp.array([[keys], [keys // 3]]) if masked else None
    for chunk in (4096, 32):
        monkeypatch.setattr(attention, "KEYS", chunk)
        np.testing.assert_allclose(blockwise(query, key, value, mask), plain(query, key, value, mask), atol=2e-6)


def test_masked_keys_have_no_weight_at_all():
    query, key, value = draw((1, 8, 2, 16), (1, 12, 2, 16), (1, 12, 2, 16))
    mask = jnp.arange(12)[None] < 7
    other = jnp.where(mask[..., None, None], value, jnp.inf).at[:, 7:].set(1e30)
    np.testing.assert_array_equal(blockwise(query, key, value, mask), blockwise(query, key, other, mask))


def test_gradients_are_those_of_the_whole(monkeypatch):
    monkeypatch.setattr(attention, "KEYS", 32)
    arrays = draw((1, 150, 2, 8), (1, 70, 2, 8), (1, 70, 2, 8))
    mask = jnp.arange(70)[None] < 61
    ours, theirs = (
        jax.grad(lambda *a, f=f: (f(*a, mask) ** 2).sum(), argnums=(0, 1, 2))(*arrays) for f in (blockwise, plain)
    )
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_narrow_inputs_are_summed_wide():
    arrays = draw((1, 64, 2, 16), (1, 600, 2, 16), (1, 600, 2, 16), dtype=jnp.bfloat16)
    out = blockwise(*arrays)
    assert out.dtype == jnp.bfloat16
    exact = plain(*(x.astype(jnp.float32) for x in arrays))
    assert np.abs(out.astype(np.float32) - exact).max() < 2e-3


def test_many_tokens_take_blocks_and_few_keep_their_bits():
    few, many = draw((1, 64, 2, 8)) * 3, draw((1, 1024, 2, 8)) * 3
    np.testing.assert_array_equal(softmax()(*few), jax.nn.dot_product_attention(*few))
    np.testing.assert_array_equal(jax.jit(softmax())(*many), jax.jit(blockwise)(*many))
    np.testing.assert_allclose(softmax()(*many), plain(*many), atol=2e-6)


def test_it_maps_over_a_population():
    query, key, value = draw((3, 1, 600, 1, 8), (3, 1, 600, 1, 8), (3, 1, 600, 1, 8))
    one_by_one = jnp.stack([softmax()(query[i], key[i], value[i]) for i in range(3)])
    np.testing.assert_allclose(jax.vmap(softmax())(query, key, value), one_by_one, atol=2e-6)


@pytest.mark.parametrize("backward", [False, True])
def test_memory_grows_with_the_tokens_not_with_their_square(backward):
    """16,384 tokens of one head: all weights would be 1 GiB."""
    shape = jax.ShapeDtypeStruct((1, 16384, 1, 72), jnp.float32)

    def forward(query, key, value):
        return softmax()(query, key, value).sum()

    step = jax.grad(forward, argnums=(0, 1, 2)) if backward else forward
    compiled = jax.jit(step).lower(shape, shape, shape).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 120 * 2**20
