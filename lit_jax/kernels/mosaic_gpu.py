"""`implementation="mosaic_gpu"`: few-head linear attention with the products of `gpu`, token-major; XLA computes the
depthwise branch.

q and k are features: ReLU is already applied, only the offset is added here. The formulas are those of
`lit_jax.linear_attention`; sums and elementwise operations are f32. Feature-major arrays are transposed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lit_jax.kernels import HEADS, Problem, Residuals, unsupported_gpu
from lit_jax.kernels.gpu import TILE, Operand, Result, Tile, product
from lit_jax.kernels.xla import depthwise

QUADRATIC = 512  # tokens
BLOCKS = 264  # two for each multiprocessor; with fewer blocks, a state is summed in parts


def unsupported_reason(
    problem: Problem, head_dim: int, tokens: int, dtype: DTypeLike, window: tuple[int, int] | None
) -> str | None:
    if dtype != jnp.bfloat16:
        return f"it computes in bfloat16, the arrays are {jnp.dtype(dtype)}"
    if head_dim not in HEADS:
        return f"head_dim must be one of {', '.join(map(str, HEADS))}, not {head_dim}"
    if problem.order == "quadratic" and tokens > QUADRATIC:
        return f"its quadratic order supports up to {QUADRATIC} tokens, not {tokens}"
    return unsupported_gpu(jax.devices()[0])


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array | None, bias: jax.Array | None, problem: Problem
) -> tuple[jax.Array, Residuals | None]:
    call = _Call(v, problem)
    given = [call.pad(call.token_major(x)) for x in (q, k, v)]
    out, residuals = (_forward_quadratic if problem.order == "quadratic" else _forward_linear)(call, *given)
    out = call.cut(out)
    if weight is not None:
        out = (out + depthwise(call.token_major(v), weight, bias, problem.grid)).astype(v.dtype)
    return call.as_given(out), residuals


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weight: jax.Array | None,
    residuals: Residuals | None,
    grad: jax.Array,
    problem: Problem,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    call = _Call(v, problem)
    q_, k_, v_, grad_ = (call.pad(call.token_major(x)) for x in (q, k, v, grad))
    found = (
        _backward_quadratic(call, q_, k_, v_, grad_)
        if residuals is None
        else _backward_linear(call, q_, k_, v_, grad_, residuals)
    )
    dq, dk, dv = map(call.cut, found)
    dweight = dbias = None
    if weight is not None:
        images, above = (call.token_major(x).astype(jnp.float32) for x in (v, grad))
        # The weight is widened as well: its gradient is summed over devices later and must not be rounded before.
        given = images, weight.astype(jnp.float32), jnp.zeros(weight.shape[-1], jnp.float32)
        _, back = jax.vjp(lambda v, weight, bias: depthwise(v, weight, bias, problem.grid), *given)
        through, dweight, dbias = back(above)
        dv = (dv + through).astype(v.dtype)
    return call.as_given(dq), call.as_given(dk), call.as_given(dv), dweight, dbias


class _Call:
    """Sizes of a call; pads tokens and head_dim with zeros to whole tiles, which changes no sum."""

    def __init__(self, v: jax.Array, problem: Problem):
        self.problem = problem
        self.batch, self.tokens, self.heads, self.head_dim = jax.eval_shape(self.token_major, v).shape
        self.missing = -self.tokens % TILE, -self.head_dim % 32 or max(0, TILE - self.head_dim)

    def token_major(self, x: jax.Array) -> jax.Array:
        return x if self.problem.layout == "bnhd" else jnp.moveaxis(x, 3, 1)

    def as_given(self, x: jax.Array) -> jax.Array:
        return x if self.problem.layout == "bnhd" else jnp.moveaxis(x, 1, 3)

    def pad(self, x: jax.Array) -> jax.Array:
        tokens, width = self.missing
        return jnp.pad(x, ((0, 0), (0, tokens), (0, 0), (0, width))) if tokens or width else x

    def cut(self, x: jax.Array) -> jax.Array:
        return x[:, : self.tokens, :, : self.head_dim]

    def pad_vector(self, x: jax.Array) -> jax.Array:
        """Pad [batch, head, head_dim]."""
        return jnp.pad(x, ((0, 0), (0, 0), (0, self.missing[1])))

    def mean(self, x: jax.Array) -> jax.Array:
        """Average over the real tokens, [batch, head, head_dim] f32."""
        return x.sum(1, dtype=jnp.float32) / self.tokens

    @property
    def ones(self) -> jax.Array:
        """One at every real channel, zero in the padding, [batch, head, head_dim] f32."""
        return self.pad_vector(jnp.ones((self.batch, self.heads, self.head_dim), jnp.float32))

    def mask(self, x: jax.Array, of: jax.Array) -> jax.Array:
        return jnp.where(of > 0, x, 0.0) if self.problem.feature_map == "relu" else x


def _forward_linear(call: _Call, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Residuals]:
    eps, offset = call.problem.eps, call.problem.offset
    mean_feature, value = call.mean(k), call.mean(v)
    key = mean_feature + offset * call.ones

    state = _summed(
        "linear_attention_state",
        k,
        v,
        lambda total, down, across: total / call.tokens - down * across,
        mean_feature,
        value,
    )  # the centred state, in bf16 as the products use it
    sums = offset * state.sum(2, dtype=jnp.float32)

    def finish(tile: Tile) -> list[jax.Array]:
        z = tile.dots[0] + eps
        sums, value = map(tile.across, tile.columns)
        return [(tile.product + sums) * tile.down(1 / z) + value * tile.down(1 - eps / z), z]

    results = [Result(), Result(vector=True)]
    out, normaliser = product(
        "linear_attention_out", Operand(q), Operand(state, by_token=False), results, finish,
        along=[key], offset=offset, columns=[sums, value],
    )  # fmt: skip
    d = call.head_dim
    residuals = Residuals(
        state=state[..., :d, :d],
        key=key[..., :d],
        value=value[..., :d],
        normaliser=jnp.moveaxis(normaliser[..., : call.tokens], 1, 2),
    )
    return out, residuals


def _backward_linear(
    call: _Call, q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array, residuals: Residuals
) -> tuple[jax.Array, ...]:
    eps, offset = call.problem.eps, call.problem.offset
    tokens, width = call.missing
    state = jnp.pad(residuals.state, ((0, 0), (0, 0), (0, width), (0, width)))
    key, value = call.pad_vector(residuals.key), call.pad_vector(residuals.value)
    normaliser = jnp.pad(jnp.moveaxis(residuals.normaliser, 2, 1), ((0, 0), (0, 0), (0, tokens)), constant_values=1)

    def of_query(tile: Tile) -> list[jax.Array]:
        (z,), (key,), (features,) = tile.rows, tile.columns, tile.elementwise
        query = ((features + offset) * tile.down(1 / z)).astype(jnp.bfloat16)
        along = tile.whole((tile.product * query.astype(jnp.float32)).sum(1)) - eps / z * tile.dots[0]
        dq = (tile.product - tile.down(along) * tile.across(key)) * tile.down(1 / z)
        return [call.mask(dq, features), query, along]

    results = [Result(), Result(), Result(vector=True)]
    dq, query, along = product(
        "linear_attention_query_gradient", Operand(grad), Operand(state, by_token=False, transposed=True), results,
        of_query,
        along=[value], rows=[normaliser], columns=[key], elementwise=[Operand(q)],
    )  # fmt: skip

    dstate = _summed("linear_attention_state_gradient", query, grad)
    # Both terms of dk use the rounded gradient of the state, so that their large parts cancel exactly.
    shift = jnp.einsum("bhde,bhe->bhd", dstate.astype(jnp.float32), value)
    shift = shift + jnp.einsum("bnhd,bhn->bhd", query.astype(jnp.float32), along)
    (dk,) = product(
        "linear_attention_key_gradient", Operand(v), Operand(dstate, by_token=False, transposed=True), [Result()],
        lambda tile: [call.mask((tile.product - tile.across(tile.columns[0])) / call.tokens, tile.elementwise[0])],
        columns=[shift], elementwise=[Operand(k)],
    )  # fmt: skip
    (dv,) = product(
        "linear_attention_value_gradient", Operand(k), Operand(dstate, by_token=False), [Result()],
        lambda tile: [(tile.product + tile.across(tile.columns[0])) / call.tokens],
        columns=[offset * dstate[:, :, : call.head_dim].sum(2, dtype=jnp.float32)],
    )  # fmt: skip
    return dq, dk, dv


def _forward_quadratic(call: _Call, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
    weights, _ = _weights(call, q, k)
    (out,) = product(
        "quadratic_attention_out", Operand(weights, by_token=False), Operand(v), [Result()], lambda tile: [tile.product]
    )
    return out, None


def _backward_quadratic(
    call: _Call, q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array
) -> tuple[jax.Array, ...]:
    eps, offset = call.problem.eps, call.problem.offset
    weights, normaliser = _weights(call, q, k)
    valid = _valid(call)

    def of_scores(tile: Tile) -> list[jax.Array]:
        (z,), (weights,), (common,) = tile.rows, tile.elementwise, tile.dots
        # A value common to all tokens reaches the scores through eps alone: it is subtracted here, as in the linear
        # order.
        dweights = tile.product - tile.down(common)
        along = tile.whole((dweights * weights).sum(1)) - common * eps / z
        dscores = (dweights - tile.down(along)) * tile.down(1 / z)
        return [dscores * tile.across(tile.columns[0]) if valid else dscores]

    (dscores,) = product(
        "quadratic_attention_score_gradient", Operand(grad), Operand(v, transposed=True), [Result(by_token=False)],
        of_scores,
        along=[call.mean(v)], rows=[normaliser], columns=valid, elementwise=[Operand(weights, by_token=False)],
    )  # fmt: skip

    def of_features(tile: Tile) -> list[jax.Array]:
        return [call.mask((tile.product + tile.down(tile.rows[0])) / call.tokens, tile.elementwise[0])]

    query_sums, key_sums = (offset * dscores.sum(axis, dtype=jnp.float32) for axis in (3, 2))
    (dq,) = product(
        "quadratic_attention_query_gradient", Operand(dscores, by_token=False), Operand(k), [Result()], of_features,
        rows=[query_sums], elementwise=[Operand(q)],
    )  # fmt: skip
    (dk,) = product(
        "quadratic_attention_key_gradient", Operand(dscores, by_token=False, transposed=True), Operand(q), [Result()],
        of_features,
        rows=[key_sums], elementwise=[Operand(k)],
    )  # fmt: skip
    (dv,) = product(
        "quadratic_attention_value_gradient", Operand(weights, by_token=False, transposed=True), Operand(grad),
        [Result()],
        lambda tile: [tile.product],
    )  # fmt: skip
    return dq, dk, dv


def _weights(call: _Call, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute weights [batch, head, query, key] bf16, zero for padding tokens, and normalisers [batch, head, query]
    f32.
    """
    eps, offset = call.problem.eps, call.problem.offset
    key, valid = call.mean(k) + offset * call.ones, _valid(call)

    def finish(tile: Tile) -> list[jax.Array]:
        normaliser, of_query = tile.dots[0] + eps, tile.dots[1]
        if call.missing[0]:  # padding tokens have no features, and may have a normaliser of zero
            normaliser = jnp.where(normaliser == 0, 1.0, normaliser)
        scores = tile.product + tile.down(of_query) + tile.across(tile.columns[0])
        weights = scores * tile.down(1 / (normaliser * call.tokens))
        return [weights * tile.across(tile.columns[1]) if valid else weights, normaliser]

    of_key = offset * jnp.moveaxis(k.sum(3, dtype=jnp.float32), 2, 1)
    weights, normaliser = product(
        "quadratic_attention_weights", Operand(q), Operand(k, transposed=True), [Result(by_token=False),
        Result(vector=True)], finish,
        along=[key, offset * call.ones], offset=offset, columns=[of_key, *valid],
    )  # fmt: skip
    return weights, normaliser


def _valid(call: _Call) -> list[jax.Array]:
    """Return [batch, head, token], one at real tokens and zero at padding; nothing without padding."""
    if not call.missing[0]:
        return []
    one = jnp.ones((call.batch, call.heads, call.tokens), jnp.float32)
    return [jnp.pad(one, ((0, 0), (0, 0), (0, call.missing[0])))]


def _summed(
    name: str, x: jax.Array, y: jax.Array, finish: Callable[..., Any] | None = None, *vectors: jax.Array
) -> jax.Array:
    """Compute finish(sum over tokens of x y^T, vectors by row and by column), bf16 [batch, head, head_dim, head_dim].

    The sum is split into parts if there are too few heads to keep the device busy.
    """
    batch, tokens, heads, d = x.shape
    finish = finish or (lambda total: total)
    parts = _parts(batch * heads * -(-d // TILE), tokens // TILE)
    if parts == 1:

        def of_tile(tile: Tile) -> list[jax.Array]:
            return [finish(tile.product, *map(tile.down, tile.rows), *map(tile.across, tile.columns))]

        (state,) = product(
            name,
            Operand(x, transposed=True),
            Operand(y),
            [Result(by_token=False)],
            of_tile,
            rows=vectors[:1],
            columns=vectors[1:],
        )
        return state
    x, y = (a.reshape(batch * parts, tokens // parts, heads, d) for a in (x, y))
    (partial,) = product(
        name,
        Operand(x, transposed=True),
        Operand(y),
        [Result(jnp.float32, by_token=False)],
        lambda tile: [tile.product],
    )
    total = partial.reshape(batch, parts, heads, d, d).sum(1)
    spread = (vectors[0][..., None], vectors[1][..., None, :]) if vectors else ()
    return finish(total, *spread).astype(jnp.bfloat16)


def _parts(blocks: int, steps: int) -> int:
    """Choose the number of parts of the tokens: the fewest that keep the device busy, with at least four steps each."""
    divisors = [n for n in range(1, steps // 4 + 1) if steps % n == 0]
    return next((n for n in divisors if n * blocks >= BLOCKS), max(divisors, default=1))
