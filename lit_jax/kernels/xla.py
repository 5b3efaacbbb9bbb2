"""`implementation="xla"`: the closed forms in jax.numpy, for every platform, shape and dtype; differentiable any number
of times.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lit_jax.kernels import FeatureMap, Problem, Residuals


def unsupported_reason(
    problem: Problem, head_dim: int, tokens: int, dtype: DTypeLike, window: tuple[int, int] | None
) -> str | None:
    return None


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, weight: jax.Array | None, bias: jax.Array | None, problem: Problem
) -> tuple[jax.Array, Residuals | None]:
    q, k, v = (_token_major(x, problem) for x in (q, k, v))
    attend = _forward_quadratic if problem.order == "quadratic" else _forward_linear
    out, residuals = attend(q, k, v, problem.eps, problem.offset, problem.feature_map)
    if weight is not None:
        out = out + depthwise(v, weight, bias, problem.grid)
    return _as_given(out.astype(v.dtype), problem), residuals


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weight: jax.Array | None,
    residuals: Residuals | None,
    grad: jax.Array,
    problem: Problem,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    q, k, v, grad = (_token_major(x, problem) for x in (q, k, v, grad))
    how = (problem.eps, problem.offset, problem.feature_map)
    dq, dk, dv = (
        _backward_quadratic(q, k, v, grad, *how)
        if residuals is None
        else _backward_linear(q, k, v, residuals, grad, *how)
    )
    dweight = dbias = None
    if weight is not None:
        wide = _accumulator(v)
        # The weight is widened as well: its gradient is summed over devices later and must not be rounded before.
        given = v.astype(wide), weight.astype(wide), jnp.zeros(weight.shape[-1], wide)
        _, back = jax.vjp(lambda v, weight, bias: depthwise(v, weight, bias, problem.grid), *given)
        through, dweight, dbias = back(grad.astype(wide))
        dv = dv + through
    dq, dk = _mask(dq, q, problem.feature_map), _mask(dk, k, problem.feature_map)
    dq, dk, dv = (_as_given(x.astype(v.dtype), problem) for x in (dq, dk, dv))
    return dq, dk, dv, dweight, dbias


def _forward_quadratic(
    q: jax.Array, k: jax.Array, v: jax.Array, eps: float, offset: float, feature_map: FeatureMap
) -> tuple[jax.Array, None]:
    weights, _ = _weights(q, k, eps, offset, feature_map)
    return _product("bhnm,bmhd->bnhd", weights.astype(v.dtype), v), None


def _forward_linear(
    q: jax.Array, k: jax.Array, v: jax.Array, eps: float, offset: float, feature_map: FeatureMap
) -> tuple[jax.Array, Residuals]:
    wide = _accumulator(q)
    features = _map(k, feature_map)
    mean_key = features.astype(wide).mean(1)
    mean_value = v.astype(wide).mean(1)
    if q.dtype == wide:
        # Full precision: centre before the product, so that large parts need not cancel.
        state = _product("bnhd,bnhe->bhde", features, v - mean_value[:, None]) / k.shape[1]
    else:
        # Low precision: products of the rounded inputs are exact in the wide accumulator, so nothing is rounded again.
        state = _product("bnhd,bnhe->bhde", features, v) / k.shape[1] - mean_key[..., None] * mean_value[..., None, :]
    mean_key = mean_key + offset
    normaliser = jnp.einsum("bnhd,bhd->bnh", _map(q, feature_map).astype(wide) + offset, mean_key) + eps
    residuals = Residuals(state=state.astype(q.dtype), key=mean_key, value=mean_value, normaliser=normaliser)
    out = _product("bnhd,bhde->bnhe", _query(q, residuals, offset, feature_map), residuals.state)
    out = out + (1 - eps / normaliser)[..., None] * mean_value[:, None]
    return out, residuals


def _query(q: jax.Array, residuals: Residuals, offset: float, feature_map: FeatureMap) -> jax.Array:
    """Divide the queries' features by their normalisers; rounded to the input's dtype."""
    features = _map(q, feature_map).astype(_accumulator(q)) + offset
    return (features / residuals.normaliser[..., None]).astype(q.dtype)


def _weights(
    q: jax.Array, k: jax.Array, eps: float, offset: float, feature_map: FeatureMap
) -> tuple[jax.Array, jax.Array]:
    """Compute weights [batch, head, token, token] and normalisers [batch, head, token]."""
    # The offset is added outside the product, so that features stay exact in low precision.
    wide = _accumulator(q)
    q0, k0 = _map(q, feature_map), _map(k, feature_map)
    scores = _product("bnhd,bmhd->bhnm", q0, k0)
    if offset:
        rows, columns = (jnp.moveaxis(x.astype(wide).sum(-1), 1, 2) for x in (q0, k0))
        scores = scores + offset * (rows[..., None] + columns[..., None, :] + q.shape[-1] * offset)
    scores = scores / q.shape[1]
    normaliser = scores.sum(-1) + eps
    return scores / normaliser[..., None], normaliser


def _backward_linear(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    residuals: Residuals,
    grad: jax.Array,
    eps: float,
    offset: float,
    feature_map: FeatureMap,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the gradient: a pass over the queries, then over keys and values. The output is not used: its rounding
    would dominate dq.
    """
    wide, tokens = _accumulator(q), q.shape[1]
    query = _query(q, residuals, offset, feature_map)
    back = _product("bnhe,bhde->bnhd", grad, residuals.state)
    share = (eps / residuals.normaliser) * jnp.einsum("bnhe,bhe->bnh", grad.astype(wide), residuals.value)
    along = (back * query.astype(wide)).sum(-1) - share
    dq = (back - along[..., None] * residuals.key[:, None]) / residuals.normaliser[..., None]

    dstate = _product("bnhd,bnhe->bhde", query, grad).astype(q.dtype)
    shift = jnp.einsum("bnhd,bnh->bhd", query.astype(wide), along)
    if q.dtype == wide:
        dk = _product("bnhe,bhde->bnhd", v - residuals.value[:, None], dstate)
    else:
        # Both terms use the rounded gradient of the state, so that their large parts cancel exactly.
        dk = _product("bnhe,bhde->bnhd", v, dstate)
        shift = shift + jnp.einsum("bhde,bhe->bhd", dstate.astype(wide), residuals.value)
    dk = dk - shift[:, None]
    dv = _product("bnhd,bhde->bnhe", _map(k, feature_map), dstate) + offset * dstate.astype(wide).sum(-2)[:, None]
    return dq, dk / tokens, dv / tokens


def _backward_quadratic(
    q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array, eps: float, offset: float, feature_map: FeatureMap
) -> tuple[jax.Array, jax.Array, jax.Array]:
    wide, tokens = _accumulator(q), q.shape[1]
    weights, normaliser = _weights(q, k, eps, offset, feature_map)
    weights = weights.astype(q.dtype)
    # A value common to all tokens reaches the scores through eps alone: it is subtracted here, as in the linear order.
    mean_value = v.astype(wide).mean(1)
    common = jnp.einsum("bnhd,bhd->bhn", grad.astype(wide), mean_value)
    if q.dtype == wide:
        dweights = _product("bnhd,bmhd->bhnm", grad, v - mean_value[:, None])
    else:
        dweights = _product("bnhd,bmhd->bhnm", grad, v) - common[..., None]
    along = (dweights * weights.astype(wide)).sum(-1) - common * eps / normaliser
    dscores = (dweights - along[..., None]) / normaliser[..., None]
    rows, columns = dscores.sum(-1), dscores.sum(-2)
    dscores = dscores.astype(q.dtype)
    dq = _product("bhnm,bmhd->bnhd", dscores, _map(k, feature_map)) + offset * jnp.moveaxis(rows, 1, 2)[..., None]
    dk = _product("bhnm,bnhd->bmhd", dscores, _map(q, feature_map)) + offset * jnp.moveaxis(columns, 1, 2)[..., None]
    dv = _product("bhnm,bnhd->bmhd", weights, grad)
    return dq / tokens, dk / tokens, dv


def check_branch(weight: jax.Array, grid: tuple[int, int] | None, tokens: int, channels: int) -> tuple[int, int]:
    """Return the grid, square if None. Raises ValueError if it does not fit the tokens, or the filters do not fit the
    channels.
    """
    height, width = grid or (round(tokens**0.5),) * 2
    if height * width != tokens:
        raise ValueError(f"{tokens} tokens are no grid of {height} x {width}: pass grid=(height, width)")
    rows, cols, found = weight.shape
    if found != channels or rows % 2 == 0 or cols % 2 == 0:
        raise ValueError(f"conv_weight {weight.shape} must be [odd, odd, {channels}]")
    return height, width


def depthwise(
    v: jax.Array, weight: jax.Array, bias: jax.Array | None, grid: tuple[int, int] | None = None
) -> jax.Array:
    """Convolve [batch, token, head, head_dim] depthwise as images of `grid`, zero padding; accumulated and returned in
    f32 or wider.

    Computed as shifted multiply-adds: a depthwise convolution maps badly to matrix units. Raises ValueError if the grid
    does not fit the tokens.
    """
    batch, tokens, heads, head_dim = v.shape
    height, width = check_branch(weight, grid, tokens, heads * head_dim)
    channels = heads * head_dim
    wide = _accumulator(v)
    out = _filter(v.reshape(batch, height, width, channels).astype(wide), weight.astype(wide))
    out = out if bias is None else out + bias.astype(wide)
    return out.reshape(batch, tokens, heads, head_dim)


@jax.custom_vjp
def _filter(images: jax.Array, weight: jax.Array) -> jax.Array:
    """Correlate each channel of [batch, row, col, channel] with its filter, zero padding."""
    shifted = _shifted(images, weight.shape)
    return jnp.asarray(sum(image * weight[tap] for tap, image in shifted.items()))


def _shifted(images: jax.Array, shape: tuple[int, ...]) -> dict[tuple[int, int], jax.Array]:
    """Return the input of each tap of a filter: `images` [..., row, col, channel], shifted."""
    rows, cols = shape[:2]
    height, width = images.shape[-3:-1]
    padded = jnp.pad(images, ((0, 0),) * (images.ndim - 3) + ((rows // 2,) * 2, (cols // 2,) * 2, (0, 0)))
    return {(i, j): padded[..., i : i + height, j : j + width, :] for i in range(rows) for j in range(cols)}


def _filter_backward(residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    images, weight = residuals

    def reduced(images: jax.Array, grad: jax.Array) -> jax.Array:
        return jnp.stack([(image * grad).sum((0, 1, 2)) for image in _shifted(images, weight.shape).values()])

    def by_rows(images: jax.Array, grad: jax.Array) -> jax.Array:
        # XLA's CPU backend sums one channel at a time, in scalars. Adding up whole rows is ten times as fast, and the
        # sums of all taps stay in cache, as those of whole images would not.
        (rows, cols), (batch, height, width, channels) = weight.shape[:2], images.shape
        padded = jnp.pad(images, ((0, 0), (rows // 2,) * 2, (cols // 2,) * 2, (0, 0)))

        def add(total: list[jax.Array], at: jax.Array) -> tuple[list[jax.Array], None]:
            image, row = at // height, at % height
            seen = jax.lax.dynamic_slice(padded, (image, row, 0, 0), (1, rows, padded.shape[2], channels))[0]
            above = jax.lax.dynamic_slice(grad, (image, row, 0, 0), (1, 1, width, channels))[0, 0]
            taps = ((i, j) for i in range(rows) for j in range(cols))
            return [t + seen[i, j : j + width] * above for t, (i, j) in zip(total, taps, strict=True)], None

        zeros = [jnp.zeros((width, channels), grad.dtype)] * (rows * cols)
        total, _ = jax.lax.scan(add, zeros, jnp.arange(batch * height))
        return jnp.stack([t.sum(0) for t in total])

    # Several devices may have rows or images each, which a loop over them would gather.
    on_cpu = reduced if jax.sharding.get_abstract_mesh().size > 1 else by_rows
    dweight = jax.lax.platform_dependent(images, grad, cpu=on_cpu, default=reduced)
    return _filter(grad, weight[::-1, ::-1]), dweight.reshape(weight.shape)


_filter.defvjp(lambda images, weight: (_filter(images, weight), (images, weight)), _filter_backward)


def _accumulator(x: jax.Array) -> np.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _map(x: jax.Array, feature_map: FeatureMap) -> jax.Array:
    return jax.nn.relu(x) if feature_map == "relu" else x


def _mask(x: jax.Array, of: jax.Array, feature_map: FeatureMap) -> jax.Array:
    return jnp.where(of > 0, x, 0) if feature_map == "relu" else x


def _product(subscripts: str, *operands: jax.Array) -> jax.Array:
    """Contract operands of one dtype; accumulated in f32 or wider."""
    wide = _accumulator(operands[0])
    if operands[0].dtype == wide:
        return jnp.einsum(subscripts, *operands)

    def widened(
        *operands: jax.Array,
    ) -> jax.Array:  # XLA's CPU backend lacks mixed products of some shapes; the result is the same
        return jnp.einsum(subscripts, *(x.astype(wide) for x in operands))

    def mixed(*operands: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, *operands, preferred_element_type=wide)

    return jax.lax.platform_dependent(*operands, cpu=widened, default=mixed)


def _token_major(x: jax.Array, problem: Problem) -> jax.Array:
    return x if problem.layout == "bnhd" else jnp.moveaxis(x, 3, 1)


def _as_given(x: jax.Array, problem: Problem) -> jax.Array:
    return x if problem.layout == "bnhd" else jnp.moveaxis(x, 1, 3)
