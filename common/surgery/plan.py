"""Plans: path patterns and axis maps. A plan resolves to a line per student leaf; lines are built to arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from heirloom.common.errors import InputError, nearest
from heirloom.common.surgery.axes import Leaf, Side, Spec, assign
from heirloom.common.surgery.layout import View
from heirloom.common.surgery.maps import FRESH, Array, AxisMap, Fresh, Matrix, PerLayer, Pick, Sided

Maps = Mapping[str, AxisMap]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Source:
    """A donor: parameters by path (arrays, views of a file, or tracers), their spec, and origins for reports."""

    spec: Spec
    values: Mapping[str, Any]
    origin: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Run:
    """Adjacent axes of a leaf under one map. map: None for the identity on one axis. target, source: sizes."""

    names: tuple[str, ...]
    target: tuple[int, ...]
    source: tuple[int, ...]
    map: Pick | Matrix | PerLayer | None

    @property
    def sourced(self) -> bool:
        """Returns whether every target row has a source row."""
        inner = self.map.maps if isinstance(self.map, PerLayer) else (self.map,)
        return not any(isinstance(map, Pick) and (map.rows < 0).any() for map in inner)

    def in_layer(self, layer: int) -> "Run":
        return replace(self, map=self.map.maps[layer]) if isinstance(self.map, PerLayer) else self

    def rows(self, index: Index) -> np.ndarray:
        """Returns the source rows of the target block `index`, flattened over the run's axes."""
        rows = self.map.rows if isinstance(self.map, Pick) else np.arange(prod(self.target))
        return rows.reshape(self.target)[index].ravel()

    def block(self, values: Array, index: Index) -> Array:
        """Returns the entries of a vector or matrix [target, ...] that belong to the target block `index`."""
        tail = values.shape[1:]
        return values.reshape(self.target + tail)[index].reshape((-1, *tail))


@dataclass(frozen=True, eq=False)
class Line:
    """What a leaf of the student inherits. source: None for fresh. rule: the pattern. fraction: share inherited."""

    path: str
    target: Leaf
    source: Any
    rule: str
    runs: tuple[Run, ...]
    fraction: float
    origin: str = ""

    @property
    def complete(self) -> bool:
        """Returns whether every element has a source (a row scaled to zero has one)."""
        return self.source is not None and all(run.sourced for run in self.runs)

    def maps(self) -> str:
        """Describes the maps for the report: `layer: rows 0 2 4, embed: first 512`."""
        if self.source is None:
            return "fresh"
        return ", ".join(f"{' '.join(run.names)}: {run.map}" for run in self.runs if run.map is not None) or "copy"


@dataclass(frozen=True)
class Resolution:
    """A plan for one donor and student: a line per leaf of the student, and the donor's unused leaves."""

    lines: tuple[Line, ...]
    unused: tuple[str, ...]

    @property
    def fraction(self) -> float:
        """Share of the student's elements that are inherited."""
        total = sum(line.target.count for line in self.lines)
        return sum(line.fraction * line.target.count for line in self.lines) / total


@dataclass(frozen=True)
class Plan:
    """Rules `(path pattern, {axis or "adjacent axes": map} | FRESH)`; a leaf uses the first pattern that matches."""

    rules: Sequence[tuple[str, Maps | Fresh]]

    def resolve(self, source: Source, spec: Spec) -> Resolution:
        """Returns one line per leaf of `spec`, the student's.

        Raises InputError, naming the leaf and the nearest candidate, for a leaf without rule or source, a rule that
        matches nothing or has an axis that none of its leaves has, and sizes that do not agree.
        """
        rule_of = assign([pattern for pattern, _ in self.rules], spec)
        idle = {(i, key) for i, (_, maps) in enumerate(self.rules) if not isinstance(maps, Fresh) for key in maps}
        lines = []
        for path, leaf in spec.items():
            pattern, maps = self.rules[rule_of[path]]
            if isinstance(maps, Fresh):
                lines.append(Line(path=path, target=leaf, source=None, rule=pattern, runs=(), fraction=0.0))
                continue
            donor = source.spec.get(path)
            if donor is None:
                hint = nearest(path, source.spec)
                give = f"give it a rule ({pattern!r} covers it now)"
                raise InputError(f"{path}: the donor has no such parameter{hint}; {give}")
            if donor.axes.names != leaf.axes.names:
                raise InputError(f"{path}: axes are '{donor.axes}' in the donor and '{leaf.axes}' here")
            runs = tuple(_runs(path, leaf, donor, pattern, maps))
            idle -= {(rule_of[path], " ".join(run.names)) for run in runs if run.map is not None}
            # A map counts rows in memory. Where layers differ in size, padding does not count as inherited.
            padded = prod(leaf.shape) / leaf.count if leaf.count else 1.0
            fraction = min(1.0, padded * prod(run.map.fraction for run in runs if run.map is not None))
            origin, values = source.origin.get(path, path), source.values[path]
            inherited: dict[str, Any] = dict(runs=runs, fraction=fraction, origin=origin)
            lines.append(Line(path=path, target=leaf, source=values, rule=pattern, **inherited))
        for i, key in sorted(idle):
            axes = sorted({name for path, rule in rule_of.items() if rule == i for name in spec[path].axes.names})
            near = nearest(key, axes)
            rule = f"rule {self.rules[i][0]!r} maps the axis {key!r}"
            raise InputError(f"{rule}, but none of its parameters has this axis{near}")
        used = {line.path for line in lines if line.source is not None}
        return Resolution(tuple(lines), tuple(p for p in source.spec if p not in used))


def _runs(path: str, leaf: Leaf, donor: Leaf, pattern: str, maps: Maps) -> list[Run]:
    """Splits the axes of a leaf into runs with one map each, and checks that the sizes agree."""
    names, sides = leaf.axes.names, leaf.axes.sides
    joint: dict[int, str] = {}  # key of several axes by the position of each
    for key in maps:
        axes = tuple(key.split())
        for i in range(len(names) - len(axes) + 1 if len(axes) > 1 else 0):
            if names[i : i + len(axes)] == axes:
                if other := next((joint[j] for j in range(i, i + len(axes)) if j in joint), None):
                    what = f"maps {other!r} and {key!r}, which share an axis"
                    raise InputError(f"{path}: the rule {pattern!r} {what}; keep one")
                joint |= dict.fromkeys(range(i, i + len(axes)), key)
    runs, i = [], 0
    while i < len(names):
        key = joint.get(i, names[i])
        stop = i + len(key.split())
        map = _on_side(maps.get(key), sides[i])
        run = Run(names=names[i:stop], target=leaf.shape[i:stop], source=donor.shape[i:stop], map=map)
        _check(path, run, leaf, pattern)
        runs.append(run)
        i = stop
    return runs


def _on_side(map: AxisMap | None, side: Side) -> Pick | Matrix | PerLayer | None:
    while isinstance(map, Sided):
        map = map.on(side)
    return map


def _check(path: str, run: Run, leaf: Leaf, pattern: str) -> None:
    name, target, source = " ".join(run.names), prod(run.target), prod(run.source)
    if run.map is None:
        if run.source != run.target:
            unmapped = f"axis {name!r} is {source} in the donor and {target} here, and no rule of the plan says which"
            add = f'Add "{name}": first({target}) to the rule {pattern!r}, or let the student have {source}'
            raise InputError(f"{path}: {unmapped}. {add}.")
        return
    if isinstance(run.map, PerLayer) and not run.sourced:
        raise InputError(f"{path}: a map per layer leaves rows of axis {name!r} fresh; give them a source and scale 0")
    if isinstance(run.map, PerLayer) and (not leaf.layered or len(run.map.maps) != leaf.shape[0]):
        layers = len(run.map.maps)
        raise InputError(f"{path}: the map of axis {name!r} is for {layers} layers, the parameter is '{leaf}'")
    for map in run.map.maps if isinstance(run.map, PerLayer) else (run.map,):
        if isinstance(map, Pick):
            if len(map.rows) != target:
                picks = f"the rule {pattern!r} picks {len(map.rows)} rows"
                raise InputError(f"{path}: axis {name!r} is {target} here, but {picks}")
            if (outside := map.rows[(map.rows < -1) | (map.rows >= source)]).size:
                row = f"row {outside[0]} of axis {name!r}, the donor has {source}"
                raise InputError(f"{path}: the rule {pattern!r} picks {row}")
            if map.scale is not None and tuple(map.scale.shape) != (target,):
                by = f"{tuple(map.scale.shape)} numbers for {target} rows"
                raise InputError(f"{path}: the rule {pattern!r} scales axis {name!r} by {by}")
        elif tuple(map.values.shape) != (target, source):
            shape = tuple(map.values.shape)
            sizes = f"goes from {source} to {target}, the matrix of rule {pattern!r} is {shape}"
            raise InputError(f"{path}: axis {name!r} {sizes}")


def build(line: Line, index: Index | None = None) -> Array:
    """Builds one block of one inherited leaf in the leaf's dtype, from numpy views of a file or from tracers.

    index: a slice per axis of the target (None: all of it). Rows without source are zeros.
    """
    if line.source is None:
        raise ValueError(f"{line.path} is fresh: it has no source to build it from")
    slices = zip(index or (slice(None),) * len(line.target.shape), line.target.shape, strict=True)
    index = tuple(slice(*s.indices(n)) for s, n in slices)
    block = _build(line.source, line.runs, index)
    return block if block.dtype == line.target.dtype else block.astype(line.target.dtype)


def _build(source: Any, runs: Sequence[Run], index: Index) -> Any:
    shape = tuple(len(range(n)[s]) for n, s in zip((n for run in runs for n in run.target), index, strict=True))
    blocks, position = [], 0
    for run in runs:
        blocks.append(index[position : position + len(run.names)])
        position += len(run.names)
    if any(isinstance(run.map, PerLayer) for run in runs):
        return _build_layers(source, runs, blocks)

    selectors = [
        slice(None) if isinstance(run.map, Matrix) else _as_slice(np.maximum(run.rows(block), 0))
        for run, block in zip(runs, blocks, strict=True)
    ]
    out = _gather(source, [prod(run.source) for run in runs], selectors)
    xp = _numpy_of(out)
    for axis, (run, block) in enumerate(zip(runs, blocks, strict=True)):
        vertical = [1] * len(runs)
        vertical[axis] = -1
        if isinstance(run.map, Matrix):
            values = run.block(run.map.values, block)
            xp = _numpy_of(out, values)
            out = xp.moveaxis(xp.tensordot(values, out.astype(np.float32), axes=(1, axis)), 0, axis)
        elif isinstance(run.map, Pick):
            if run.map.scale is not None:
                values = run.block(run.map.scale, block)
                xp = _numpy_of(out, values)
                out = out.astype(np.float32) * values.astype(np.float32).reshape(vertical)
            fresh = run.rows(block) < 0
            if fresh.any():
                out = xp.where(fresh.reshape(vertical), np.zeros((), out.dtype), out)
    return out.reshape(shape)


def _build_layers(source: Any, runs: Sequence[Run], blocks: Sequence[Index]) -> Any:
    """Builds layer by layer, for maps that differ between layers."""
    layer, inner = runs[0], runs[1:]
    if layer.names != ("layer",) or isinstance(layer.map, (Matrix, PerLayer)):
        raise ValueError("maps per layer need layers that are picked")
    if layer.map is not None and (layer.map.scale is not None or (layer.map.rows < 0).any()):
        raise ValueError("maps per layer need layers that are neither scaled nor fresh")
    index = tuple(s for block in blocks[1:] for s in block)
    targets = range(layer.target[0])[blocks[0][0]]
    layer_of = source.layer if isinstance(source, View) else source.__getitem__
    rows = layer.rows(blocks[0])
    parts = [_build(layer_of(r), [run.in_layer(t) for run in inner], index) for t, r in zip(targets, rows, strict=True)]
    return _numpy_of(*parts).stack(parts)


def _as_slice(rows: np.ndarray) -> slice | np.ndarray:
    """Returns evenly rising rows as a slice, which gives a view instead of a gather; other rows unchanged."""
    step = int(rows[1] - rows[0]) if len(rows) > 1 else 1
    if len(rows) and step > 0 and (np.diff(rows) == step).all():
        return slice(int(rows[0]), int(rows[-1]) + 1, step)
    return rows


def _gather(source: Any, shape: Sequence[int], selectors: Sequence[slice | np.ndarray]) -> Any:
    """Selects along every (merged) axis. Of a view it reads only the layers and pages it needs, into new memory."""
    if isinstance(source, View):
        if not source.layered:
            return np.array(_gather(source.parts[0], shape, selectors))
        layers = np.arange(len(source.parts))[selectors[0]]
        sizes = [len(np.arange(n)[s]) for n, s in zip(shape, selectors, strict=True)]
        out = np.empty(sizes, source.dtype)
        for i, layer in enumerate(layers):
            out[i] = _gather(source.layer(layer), shape[1:], selectors[1:])
        return out
    array = source if tuple(source.shape) == tuple(shape) else source.reshape(shape)
    array = array[tuple(s if isinstance(s, slice) else slice(None) for s in selectors)]
    for axis, selector in enumerate(selectors):
        if not isinstance(selector, slice):
            array = _numpy_of(array).take(array, selector, axis=axis)
    return array


def _numpy_of(*arrays: Any) -> Any:
    """Returns numpy for arrays in host memory, jax.numpy when one is traced or on a device."""
    return jnp if any(isinstance(a, jax.Array) for a in arrays) else np


def apply(plan: Plan, source: Source, spec: Spec) -> dict[str, Any]:
    """Computes the student's parameters as a traceable function of the donor's: gradients flow into donor and matrices.

    Inside a loss this is weight sharing. Raises InputError when the plan leaves anything fresh: that needs `graft`.
    """
    lines = plan.resolve(source, spec).lines
    for line in lines:
        if not line.complete:
            raise InputError(f"{line.path}: rule {line.rule!r} leaves rows fresh and needs an initialiser; use graft")
    return {line.path: build(line) for line in lines}


__all__ = ["FRESH", "Line", "Maps", "Plan", "Resolution", "Run", "Source", "apply", "build"]
