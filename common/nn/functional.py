"""Turns Flax NNX modules into plain functions of a flat dict of parameters.

model  = functional(Clip, cfg)
params = model.init(jax.random.key(0))          # {"image/blocks/attn/query/kernel": Array, ...}
output = model.apply(params, images, tokens)
output, statistics = model.train(params, images, tokens)    # in training; {} for a model without batch norms
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from heirloom.common.errors import nearest
from heirloom.common.surgery.axes import Axes, Leaf, Spec

Params = dict[str, jax.Array]


@dataclass(frozen=True)
class Functional:
    """A model as functions of its parameters. spec: axes, shape and dtype of each parameter."""

    spec: Spec
    _make: Callable[[jax.Array], nnx.Module]
    _graph: Any
    _tree: Any

    def init(
        self,
        key: jax.Array,
        paths: Iterable[str] | None = None,
        place: Mapping[str, jax.sharding.Sharding] | None = None,
    ) -> Params:
        """Initialises parameters. paths: only these, with the same bits; XLA skips the rest. place: a sharding per
        path.
        """
        wanted = self.spec.keys() if paths is None else set(paths)
        if unknown := wanted - self.spec.keys():
            raise ValueError(f"unknown parameter {min(unknown)!r}{nearest(min(unknown), self.spec)}")

        def make(key: jax.Array) -> Params:
            leaves = jax.tree.leaves(nnx.split(self._make(key))[1])
            found = {path: leaf for path, leaf in zip(self.spec, leaves, strict=True) if path in wanted}
            return {
                path: jnp.where(self.spec[path].filled(), x, 0) if self.spec[path].ragged else x
                for path, x in found.items()
            }

        # Always jitted: eager and compiled initialisers differ in their last bits.
        return jax.jit(make, out_shardings=place and {p: place[p] for p in wanted})(key)

    def apply(self, params: Mapping[str, Any], *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """Calls a method of the module with these parameters, arrays of JAX or NumPy (converted, since a tracer cannot
        index NumPy arrays), or quantised kernels (`heirloom.common.nn.quantized`).

        Batch norms use their running statistics, as in evaluation.
        Raises ValueError for a missing, unknown or misshapen parameter: `nnx.merge` itself accepts any of them.
        """
        return getattr(self._module(params), method)(*args, **kwargs)

    def train(
        self, params: Mapping[str, Any], *args: Any, method: str = "__call__", **kwargs: Any
    ) -> tuple[Any, Params]:
        """`apply` in training: batch norms use the batch. Returns the output and the new running statistics, {path:
        array}.

        Raises ValueError as `apply` does, and for a statistic that the method does not update.
        """
        module = self._module(params)
        before = {path: variable.get_value() for path, variable in _statistics(module)}
        module.train()
        output = getattr(module, method)(*args, **kwargs)
        after = {path: variable.get_value() for path, variable in _statistics(module)}
        if same := [path for path in before if after[path] is before[path]]:
            raise ValueError(f"{same[0]}: {method} in training does not update this running statistic")
        return output, after

    def state(self, params: Mapping[str, Any]) -> nnx.State:
        """Returns the parameters, of any library, as the state that `nnx.state` has of the module.

        Raises ValueError for a missing, unknown or misshapen parameter.
        """
        if params.keys() != self.spec.keys():
            missing, unknown = self.spec.keys() - params.keys(), params.keys() - self.spec.keys()
            name = min(missing or unknown)
            raise ValueError(
                f"{'missing' if missing else 'unknown'} parameter"
                f" {name!r}{nearest(name, unknown if missing else self.spec)}"
            )
        for path, leaf in self.spec.items():
            if tuple(params[path].shape) != leaf.shape:
                raise ValueError(f"{path}: shape {tuple(params[path].shape)}, the model has {leaf}")
        return jax.tree.unflatten(self._tree, [params[path] for path in self.spec])

    def _module(self, params: Mapping[str, Any]) -> nnx.Module:
        return nnx.merge(self._graph, self.state({p: jax.tree.map(jnp.asarray, x) for p, x in params.items()}))


def functional(module: Callable[..., nnx.Module], cfg: object) -> Functional:
    """Describes `module(cfg, rngs=...)` without allocating it. Every parameter must declare its axes
    (`heirloom.common.nn.dense.param`).
    """

    def make(key: jax.Array) -> nnx.Module:
        return module(cfg, rngs=nnx.Rngs(params=key))

    graph, state = nnx.split(
        nnx.eval_shape(lambda: make(jax.random.key(0)))
    )  # no concrete key: that would start the devices
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    spec = {
        _join(path): _leaf(variable.get_metadata(), leaf)
        for (path, variable), (_, leaf) in zip(nnx.to_flat_state(state), leaves, strict=True)
    }
    return Functional(spec=spec, _make=make, _graph=graph, _tree=tree)


def _join(path: Iterable[Any]) -> str:
    return "/".join(map(str, path))


def _statistics(module: nnx.Module) -> list[tuple[str, Any]]:
    """(path, variable) of every running statistic."""
    return [(_join(path), variable) for path, variable in nnx.to_flat_state(nnx.state(module, nnx.BatchStat))]


def _leaf(metadata: Mapping[str, Any], value: Any) -> Leaf:
    axes, ragged = Axes.parse(metadata["axes"]), dict(metadata.get("ragged", ()))
    return Leaf(axes=axes, shape=tuple(value.shape), dtype=value.dtype, ragged=ragged)
