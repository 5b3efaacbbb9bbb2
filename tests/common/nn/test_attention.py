"""Softmax attention in blocks against the plain form: values, gradients, masks, batching, and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from heirloom.common.nn import attention, blockwise, for_cpus
from heirloom.common.nn.attention import softmax
from heirloom.common.nn.block import rematerialised
from heirloom.common.nn.blockwise import plain


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 32, from the first token on."""
    monkeypatch.setattr(blockwise, "BLOCK", 32)
    monkeypatch.setattr(attention, "LONG", 1)


def drawn(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def inputs(queries, keys, heads=2, head_dim=9, batch=2, dtype=jnp.float32):
    shapes = [(batch, tokens, heads, head_dim) for tokens in (queries, keys, keys)]
    return [drawn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def mask_of(keys):
    """The first example sees every third key; the second one sees none."""
    return jnp.stack([jnp.arange(keys) % 3 == 0, jnp.zeros(keys, bool)])


CASES = [
    (64, 64, False, False),  # whole blocks
    (20, 20, False, False),  # less than a block
    (65, 97, False, False),  # padded queries and keys
    (100, 37, False, True),
    (33, 97, False, True),
    (40, 70, True, False),
    (70, 40, True, True),
]


@pytest.mark.parametrize(("queries", "keys", "causal", "masked"), CASES)
def test_blocks_agree_with_the_plain_form(queries, keys, causal, masked):
    given, above = inputs(queries, keys), drawn(2, queries, 2, 9, seed=3)
    mask = mask_of(keys) if masked else None

    def with_gradients(attend):
        def run(*given):
            out, back = jax.vjp(attend, *given)
            return out, *back(above)

        return jax.jit(run)(*given)

    found = with_gradients(lambda *given: softmax(causal=causal)(*given, mask))
    wanted = with_gradients(lambda *given: plain(*given, mask, causal))
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_masked_keys_have_no_weight():
    query, key, value = inputs(40, 70)
    seen = jnp.arange(70) < 41
    mask = jnp.broadcast_to(seen, (2, 70))
    attend = softmax()
    changed = [jnp.where(seen[:, None, None], x, 1e4) for x in (key, value)]
    np.testing.assert_array_equal(attend(query, key, value, mask), attend(query, *changed, mask))
    np.testing.assert_allclose(
        attend(query, key, value, mask), plain(query, key[:, :41], value[:, :41], None, False), atol=2e-6
    )
    by_key, by_value = jax.grad(lambda *x: attend(query, *x, mask).sum(), (0, 1))(key, value)
    assert not by_key[:, 41:].any() and not by_value[:, 41:].any()


def test_scores_too_large_for_exponentials_are_right():
    query, key, value = inputs(40, 70)
    query = 1000 * query  # scores up to 3000 and more
    out = softmax()(query, key, value)
    wide = [np.asarray(x, np.float64) for x in (query, key, value)]
    scores = np.einsum("bqhd,bkhd->bhqk", *wide[:2]) / 3
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), wide[2])
    assert scores.max() > 2000
    np.testing.assert_allclose(out, wanted, atol=2e-3)  # scores of f32 have errors of 1e-4


def test_sums_of_bfloat16_are_float32():
    given = inputs(40, 2000, dtype=jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in given]
    out = softmax()(*given)
    assert out.dtype == jnp.bfloat16
    differ = np.asarray(out != plain(*wide, None, False).astype(jnp.bfloat16))
    assert differ.mean() < 0.01, "another order of the same float32 sum may round differently"
    found = jax.grad(lambda *x: softmax()(*x).astype(jnp.float32).sum(), (0, 1, 2))(*given)
    wanted = jax.grad(lambda *x: plain(*x, None, False).sum(), (0, 1, 2))(*wide)
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=2**-7, atol=1e-5)


def test_populations_are_batched():
    given = [drawn(3, *x.shape, seed=i) for i, x in enumerate(inputs(40, 70))]
    mask = jnp.stack([mask_of(70), ~mask_of(70), mask_of(70)])
    found = jax.vmap(softmax())(*given, mask)
    wanted = jnp.stack([plain(*(x[i] for x in given), mask[i], False) for i in range(3)])
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_short_sequences_and_accelerators_use_no_blocks(monkeypatch):
    given = inputs(20, 20)
    monkeypatch.setattr(attention, "LONG", 401)
    np.testing.assert_array_equal(softmax()(*given), for_cpus.attention(False, *given))
    monkeypatch.setattr(attention, "LONG", 400)

    def loops(platform):
        lowered = jax.jit(jax.value_and_grad(lambda *x: softmax()(*x).sum())).trace(*given)
        return lowered.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while")

    assert loops("cpu") > 0 == loops("tpu"), "a program for an accelerator, compiled on a CPU"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert loops("cpu") == 0


def temporary(function, tokens, heads):
    """Bytes that the compiled function takes for itself."""
    shapes = [jax.ShapeDtypeStruct((1, tokens, heads, 72), jnp.float32)] * 3
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_square(monkeypatch):
    monkeypatch.undo()
    short, long = (temporary(softmax(), tokens, 2) for tokens in (4096, 16384))
    array = 16384 * 2 * 72 * 4
    assert long < 5 * array + 2**24, "queries, keys, values and result in blocks, and one block of scores"
    assert long < 4 * short
    backward = temporary(jax.grad(lambda *x: softmax()(*x).sum(), (0, 1, 2)), 16384, 2)
    assert backward < 14 * array + 2**25 < 16384**2 * 4 / 4


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_recomputed_blocks_save_no_scores(remat, monkeypatch):
    monkeypatch.undo()

    def loss(x):
        body = rematerialised(lambda x, _: (jnp.tanh(softmax()(x, x, x)), None), remat)
        return jax.lax.scan(body, x, None, length=2)[0].sum()

    shape = jax.ShapeDtypeStruct((1, 2048, 1, 16), jnp.float32)
    used = jax.jit(jax.grad(loss)).lower(shape).compile().memory_analysis().temp_size_in_bytes
    assert used < 2048**2 * 4 + 2**22, "one block of scores and its gradient are 8 MiB"
