"""One training step: a pure function of state and batch, compiled once."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from heirloom.common.errors import InputError, between, check_seed, positive
from heirloom.common.mesh import ROWS, batch_sharding, replicated, row_shards, shardings
from heirloom.common.surgery.axes import Spec
from heirloom.common.train.optim import is_statistic
from heirloom.common.train.state import State, state_shardings

Params = dict[str, Any]
Batch = dict[str, Any]
Metrics = dict[str, tuple[Any, Any]]
LossOutput = tuple[jax.Array, dict[str, Any]]
LossFn = Callable[[Params, Batch, jax.Array, Any], LossOutput]
"""`(params, batch, key, frozen) -> loss, {name: (sum, count)}`: the loss is a mean over the batch; `frozen` is any tree
that is given to the step and gets no gradient, such as the teacher's weights. The loss of a model with batch norms
returns the new running statistics among its metrics: `{STATISTICS: {path: array}}`, from `Functional.train`.
"""

STATISTICS = "statistics"
MATMUL_ROLES = ("kernel", "table")  # the parameters that meet activations in a matmul or become activations


@dataclass(frozen=True)
class StepConfig:
    """How a step is taken; the loss function is passed separately."""

    accumulate: int = 1
    """Micro-batches one after the other whose gradients are averaged into one update."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Precision of matmuls and activations. Parameters and optimizer are float32 in any case, and gradients are summed
    over rows, devices and micro-batches in float32; that of a kernel or table is rounded to this precision once, when
    its sum over the devices is complete (`heirloom.common.nn.precision`).
    """
    ema: float | None = None
    """Decay of the moving average of the parameters, such as 0.9999; None keeps no average."""
    seed: int = 0
    """Seed of the noise inside the loss; step n draws from fold_in(seed, n)."""
    max_skipped: int = 100
    """Stop the run after so many non-finite steps in a row."""

    def __post_init__(self) -> None:
        positive(self, "accumulate", "max_skipped")
        check_seed(self.seed)
        between(self, "ema", below=1.0)


@dataclass(frozen=True)
class Step:
    """`state, metrics = step(state, batch)`; the state given is donated. `lower` is for the ahead-of-time compiler."""

    jitted: Any
    mesh: Mesh
    frozen: Any
    cfg: StepConfig

    def __call__(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        with jax.set_mesh(self.mesh):
            return self.jitted(state, batch, self.frozen)

    def lower(self, state: State, batch: Batch) -> jax.stages.Lowered:
        """Both arguments, and `frozen`, may be `jax.ShapeDtypeStruct`s."""
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(state, batch, self.frozen)


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    spec: Spec,
    mesh: Mesh,
    cfg: StepConfig,
    frozen: Any = None,
    project: Callable[[Params], Params] | None = None,
    scheduled: Callable[[jax.Array], Any] | None = None,
    fixed: Collection[str] = (),
) -> Step:
    """Compile loss, gradient, update and average into one step.

    project: applied to the parameters after the update, such as a bound on `logit_scale`. scheduled: values of a step's
    number that the loss wants; its last argument then is `(frozen, scheduled(step))`. fixed: parameters that the
    optimizer leaves as they are; their running statistics stay, too. The other running statistics that the loss returns
    replace the old ones after the update; micro-batches are averaged. A step whose loss or gradient norm is not finite
    changes nothing but the counters `step` and `skipped`. Metrics, as (sum, count): the loss function's, `loss`,
    `grad_norm` (of all parameters, before clipping), `lr` if the optimizer's state shows a `learning_rate`, and
    `skipped`; of a skipped step all but `skipped` are (0, 0). Raises InputError (when first called) if the
    micro-batches do not divide the batch, ValueError if the loss returns a statistic under the path of another
    parameter.
    """
    layout = shardings(spec, mesh)
    gradients = _gradients(loss_fn, cfg, mesh, layout)

    def step(state: State, batch: Batch, frozen: Any) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(cfg.seed), state.step)
        given = frozen if scheduled is None else (frozen, scheduled(state.step))
        (loss, (metrics, statistics)), grads = gradients(state.params, batch, key, given)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        updates, opt = optimizer.update(grads, state.opt, state.params)
        written = {path: x for path, x in statistics.items() if path not in fixed}
        params = optax.apply_updates(state.params, updates) | written
        if project is not None:
            params = project(params)
        ema = None if state.ema is None or cfg.ema is None else optax.incremental_update(params, state.ema, 1 - cfg.ema)

        one = jnp.float32(1)
        metrics = metrics | {"loss": (loss, one), "grad_norm": (norm, one)}
        if rates := _learning_rates(opt):
            metrics["lr"] = (rates[0], one)
        metrics = jax.tree.map(lambda x: jnp.where(finite, x, 0), metrics)
        metrics |= {"skipped": (1 - finite.astype(jnp.float32), one)}

        new, old = (params, opt, ema), (state.params, state.opt, state.ema)
        params, opt, ema = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        return State(state.step + 1, params, opt, ema, jnp.where(finite, 0, state.skipped + 1)), metrics

    states = state_shardings(optimizer, spec, mesh, cfg.ema)
    ins, outs = (states, batch_sharding(mesh), None), (states, replicated(mesh))
    jitted = jax.jit(step, in_shardings=ins, out_shardings=outs, donate_argnums=0)
    return Step(jitted, mesh, frozen, cfg)


def cast(params: Params, compute: str) -> Params:
    """The precision policy: kernels and tables in `compute`, everything else as it is. Also good for a teacher."""
    return {path: x.astype(compute) if path.rpartition("/")[2] in MATMUL_ROLES else x for path, x in params.items()}


def _gradients(loss_fn: LossFn, cfg: StepConfig, mesh: Mesh, layout: dict[str, NamedSharding]) -> Callable[..., Any]:
    """`(params, batch, key, frozen) -> (loss, (metrics, statistics)), gradients`: f32, means over micro-batches.

    Metrics are summed.
    """

    def objective(
        params: Params, batch: Batch, key: jax.Array, frozen: Any
    ) -> tuple[jax.Array, tuple[Metrics, Params]]:
        loss, metrics = loss_fn(cast(params, cfg.compute), batch, key, frozen)
        statistics = metrics.get(STATISTICS, {})
        if wrong := [path for path in statistics if path not in layout or not is_statistic(path)]:
            raise ValueError(f"{wrong[0]}: the loss returns it as a running statistic, the model has none")
        aux = {name: value for name, value in metrics.items() if name != STATISTICS}, statistics
        return jnp.asarray(loss, jnp.float32), jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), aux)

    def whole(params: Params, batch: Batch, key: jax.Array, frozen: Any) -> Any:
        values, grads = jax.value_and_grad(objective, has_aux=True)(params, batch, key, frozen)
        return values, jax.lax.with_sharding_constraint(grads, layout)

    def by_parts(params: Params, batch: Batch, key: jax.Array, frozen: Any) -> Any:
        parts = jax.tree.map(lambda x: _deal(x, cfg.accumulate, mesh), batch)
        keys = jax.random.split(key, cfg.accumulate)
        first: Any = jax.tree.map(lambda x: x[0], (parts, keys))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(whole, params, *first, frozen))

        def add(total: Any, part: Any) -> tuple[Any, None]:
            rows, key = part
            return jax.tree.map(jnp.add, total, whole(params, rows, key, frozen)), None

        ((loss, (metrics, statistics)), grads), _ = jax.lax.scan(add, zeros, (parts, keys))
        loss, statistics, grads = jax.tree.map(lambda x: x / cfg.accumulate, (loss, statistics, grads))
        return (loss, (metrics, statistics)), grads

    return whole if cfg.accumulate == 1 else by_parts


def _deal(rows: jax.Array, parts: int, mesh: Mesh) -> jax.Array:
    """Reshapes [batch, ...] to [parts, batch / parts, ...]. Row i goes to part i mod parts: no row changes device."""
    shards = row_shards(mesh)
    if rows.shape[0] % (parts * shards):
        parts_of = f"{parts} micro-batches on {shards} devices"
        instead = f"change step.accumulate, or use a batch that is a multiple of {parts * shards}"
        raise InputError(f"a batch of {len(rows)} does not divide into {parts_of}: {instead}")
    dealt = jnp.moveaxis(rows.reshape(-1, parts, *rows.shape[1:]), 1, 0)
    return jax.lax.with_sharding_constraint(dealt, NamedSharding(mesh, PartitionSpec(None, ROWS)))


def _learning_rates(opt: optax.OptState) -> list[jax.Array]:
    found = optax.tree.get_all_with_path(opt, "learning_rate", lambda path, value: isinstance(value, jax.Array))
    return [value for _, value in found]
