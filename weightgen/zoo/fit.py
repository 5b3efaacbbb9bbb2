"""Training of many small networks at once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from heirloom.common.errors import between, positive
from heirloom.common.nn.functional import Functional, Params
from weightgen.zoo.nets import NetConfig, net


@dataclass(frozen=True)
class FitConfig:
    """How each network of a zoo is trained: Adam on softmax cross-entropy, the same for all."""

    steps: int = 100
    batch: int = 0
    """Examples a step; 0: all."""
    lr: float = 0.05
    weight_decay: float = 0.0
    """L2 penalty added to the loss, half its square norm times this."""
    at_once: int = 0
    """Networks under one `vmap`, group after group; 0: all. On a CPU small convolutions are quickest one by one."""

    def __post_init__(self) -> None:
        positive(self, "steps")
        between(self, "batch", "lr", "weight_decay", "at_once")


def fit_population(
    model: Functional, params: Params, x: jax.Array, y: jax.Array, cfg: FitConfig, key: jax.Array
) -> Params:
    """Train every network on its own data under `vmap` and `scan`.

    params: leaves [member, ...]; x: [member, example, ...]; y: [member, example] int32, -1 in the padding.
    """

    def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        mask = y >= 0
        nats = optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), jnp.maximum(y, 0))
        penalty = sum(jnp.sum(jnp.square(leaf)) for leaf in params.values())
        return jnp.sum(nats * mask) / jnp.maximum(mask.sum(), 1) + 0.5 * cfg.weight_decay * penalty

    optimizer = optax.adam(optax.cosine_decay_schedule(cfg.lr, cfg.steps))

    def one(params: Params, x: jax.Array, y: jax.Array, key: jax.Array) -> Params:
        def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
            params, state = carry
            bx, by = x, y
            if cfg.batch:
                rows = jax.random.randint(jax.random.fold_in(key, i), (cfg.batch,), 0, len(x))
                bx, by = x[rows], y[rows]
            updates, state = optimizer.update(jax.grad(loss)(params, bx, by), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(cfg.steps))[0][0]

    keys = jax.random.split(key, len(x))
    return jax.lax.map(lambda member: one(*member), (params, x, y, keys), batch_size=cfg.at_once or len(x))


def initial_population(model: Functional, members: int, start: Literal["shared", "random"], key: jax.Array) -> Params:
    """Initialise `members` networks, all from one initialisation or each from its own: leaves [member, ...]."""
    if start == "shared":
        one = model.init(key)
        return {path: jnp.broadcast_to(leaf, (members, *leaf.shape)) for path, leaf in one.items()}
    return jax.vmap(model.init)(jax.random.split(key, members))


def build(
    cfg: NetConfig,
    data: Callable[[int, int], tuple[np.ndarray, np.ndarray]],
    members: int,
    fit: FitConfig,
    *,
    start: Literal["shared", "random"] = "shared",
    chunk: int = 500,
    seed: int = 0,
    first: int = 0,
) -> Iterator[Params]:
    """Train a zoo in chunks, so that it never fills the memory; yields populations of `chunk` networks and a rest.

    first: where to begin, a multiple of `chunk`. data(first, last): x [member, example, ...] and y [member, example] of
    these members.
    """
    model = net(cfg)
    run = jax.jit(lambda params, x, y, key: fit_population(model, params, x, y=y, cfg=fit, key=key))
    key = jax.random.key(seed)
    for at in range(first, members, chunk):
        last = min(at + chunk, members)
        x, y = data(at, last)
        # Shared means shared by the whole zoo: the key does not depend on the chunk.
        begin = key if start == "shared" else jax.random.fold_in(key, at)
        params = initial_population(model, last - at, start, key=begin)
        yield run(params, x, y, jax.random.fold_in(key, 10**6 + at))
