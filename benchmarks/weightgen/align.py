"""Permutation symmetries of networks, taken out by matching neurons (weight matching; Ainsworth et al. 2023).

Permuting hidden units, channels or heads leaves a network's function alone, so two runs hold the same solution under
different names. Which axes go together follows from the names: leaves that write an axis and leaves that read it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from heirloom.common.errors import InputError
from heirloom.common.surgery.axes import Spec

Tree = Mapping[str, np.ndarray]
SWEEPS = 50  # of all groups, at most; each can only increase the match


@dataclass(frozen=True)
class Symmetry:
    """One group of units that may be permuted. places: (path, dimension) of every leaf that has them."""

    name: str
    size: int
    places: tuple[tuple[str, int], ...]


def symmetries(spec: Spec, axes: Sequence[str]) -> tuple[Symmetry, ...]:
    """The groups of the named axes: units, channels, heads. Axes in stacked leaves are refused, as layers differ.

    Raises InputError for an axis that no leaf has, or that inputs or outputs of the network use (one that is only read
    or written).
    """
    found = []
    for name in axes:
        places = [(path, i) for path, leaf in spec.items() for i, n in enumerate(leaf.axes.names) if n == name]
        if not places:
            raise InputError(f"no parameter has an axis {name!r}: name hidden units, channels or heads")
        sides = {spec[path].axes.sides[i] for path, i in places}
        if not {"read", "write"} <= sides:
            raise InputError(f"axis {name!r} is only {min(sides)}: permuting it changes what the network computes")
        if stacked := next((path for path, _ in places if spec[path].layered), None):
            raise InputError(
                f"{stacked} is stacked along layer: unstack the layers before matching, each has its own order"
            )
        found.append(Symmetry(name, spec[places[0][0]].shape[places[0][1]], tuple(places)))
    return tuple(found)


def permute(tree: Tree, groups: Sequence[Symmetry], orders: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same function with units in another order: unit i becomes what unit orders[name][i] was."""
    out = dict(tree)
    for group in groups:
        for path, axis in group.places:
            out[path] = np.take(out[path], orders[group.name], axis=axis)
    return out


def match(reference: Tree, tree: Tree, groups: Sequence[Symmetry], seed: int = 0) -> dict[str, np.ndarray]:
    """Orders that bring `tree` closest to `reference` (sum of products of weights), by group until nothing moves."""
    orders = {group.name: np.arange(group.size) for group in groups}
    rng = np.random.default_rng(seed)
    for _ in range(SWEEPS):
        moved = False
        for index in rng.permutation(len(groups)):
            group = groups[index]
            gain = np.zeros((group.size, group.size))
            # The other groups stay as they are; this one is taken out and decided anew.
            others = [g for g in groups if g.name != group.name]
            here = permute(tree, others, orders)
            for path, axis in group.places:
                a, b = (
                    np.moveaxis(np.asarray(t[path], np.float64), axis, 0).reshape(group.size, -1)
                    for t in (reference, here)
                )
                gain += a @ b.T
            best = linear_sum_assignment(gain, maximize=True)[1]
            rows = np.arange(group.size)
            if gain[rows, best].sum() > gain[rows, orders[group.name]].sum() + 1e-9:
                orders[group.name], moved = best, True
        if not moved:
            break
    return orders


def align(reference: Tree, tree: Tree, groups: Sequence[Symmetry], seed: int = 0) -> dict[str, np.ndarray]:
    """`tree` in the order that matches `reference`."""
    return permute(tree, groups, match(reference, tree, groups, seed=seed))
