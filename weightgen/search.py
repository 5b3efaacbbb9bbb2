"""Exploring around one big checkpoint: propose new tensors in the order of `ranking`, keep what a selection set likes.

There is no zoo here. What is called sampling is a perturbation of one model, so everything is reported beside noise of
the same norm with the same budget of trials, and scored on a set that selected nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from heirloom.common.errors import InputError
from weightgen.codec import fit_pca
from weightgen.ranking import layer_matrix

Params = dict[str, Any]
Score = Callable[[Params], float]


def with_tensor(params: Params, name: str, value: np.ndarray) -> Params:
    """The model with one tensor replaced; "path@layer" names a layer of a stacked leaf."""
    path, _, layer = name.partition("@")
    leaf = np.array(params[path])
    if layer:
        leaf[int(layer)] = value.reshape(leaf.shape[1:])
    else:
        leaf[...] = value.reshape(leaf.shape)
    return {**params, path: leaf}


Propose = Callable[[str, np.ndarray, np.random.Generator], np.ndarray]
"""`propose(name, tensor, rng)`: another tensor of the same shape."""


def noise_proposal(relative: float) -> Propose:
    """Gaussian noise whose norm is `relative` times the tensor's: the control for every other proposal."""

    def propose(name: str, tensor: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        noise = rng.standard_normal(tensor.shape)
        return (tensor + relative * np.linalg.norm(tensor) * noise / np.linalg.norm(noise)).astype(tensor.dtype)

    return propose


def matched(propose: Propose, relative: float) -> Propose:
    """The same directions at the norm of the noise control: a proposal may not win by being smaller."""

    def scaled(name: str, tensor: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        step = propose(name, tensor, rng) - tensor
        norm = np.linalg.norm(step)
        return (tensor + (relative * np.linalg.norm(tensor) / norm if norm > 0 else 0) * step).astype(tensor.dtype)

    return scaled


def row_proposal(tensors: Mapping[str, np.ndarray], latent: int, spread: float = 1.0) -> Propose:
    """Layer-wise generation without a network, by PCA of the rows of all selected tensors of one width.

    A tensor's latents are drawn around its own with the spread of the rows; the released scripts, too, draw around the
    encoded base model.
    """
    widths: dict[int, list[np.ndarray]] = {}
    for tensor in tensors.values():
        widths.setdefault(tensor.shape[1], []).append(tensor)
    fits = {
        width: fit_pca(np.concatenate(parts).astype(np.float32), min(latent, width, sum(map(len, parts))))
        for width, parts in widths.items()
    }

    def propose(name: str, tensor: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        fit = fits[tensor.shape[1]]
        z = (tensor - fit.mean) @ fit.components
        z = z + spread * z.std(0) * rng.standard_normal(z.shape)
        rest = (tensor - fit.mean) - ((tensor - fit.mean) @ fit.components) @ fit.components.T
        return (z @ fit.components.T + fit.mean + rest).astype(tensor.dtype)

    return propose


@dataclass(frozen=True)
class Step:
    """One tensor of the search: what the best candidate scored on the selection set, and whether it was kept."""

    name: str
    best: float
    kept: bool


@dataclass(frozen=True)
class Found:
    """The final model of a search, its score on the selection set, its steps, and the models kept on the way."""

    params: Params
    score: float
    steps: tuple[Step, ...]
    accepted: tuple[Params, ...]
    trials: int


def greedy(
    params: Params, names: Sequence[str], propose: Propose, select: Score, candidates: int, seed: int = 0
) -> Found:
    """Draw candidates tensor by tensor in this order, and go on from the best if it beats the score so far.

    `select` must not be the score that is reported.
    """
    rng = np.random.default_rng(seed)
    score, steps, accepted, trials = select(params), [], [], 0
    for name in names:
        tensor = _tensor(params, name)
        trial = [with_tensor(params, name, propose(name, tensor, rng)) for _ in range(candidates)]
        scores = [select(t) for t in trial]
        trials += candidates
        best = int(np.argmax(scores))
        kept = scores[best] > score
        steps.append(Step(name, scores[best], kept))
        if kept:
            params, score = trial[best], scores[best]
            accepted.append(params)
    return Found(params=params, score=score, steps=tuple(steps), accepted=tuple(accepted), trials=trials)


def _tensor(params: Params, name: str) -> np.ndarray:
    path, _, layer = name.partition("@")
    leaf = np.asarray(params[path])
    if not layer:
        return leaf
    return layer_matrix(path, leaf[int(layer)])


def soup(models: Sequence[Params], weights: Sequence[float] | None = None) -> Params:
    """The average of models, leaf by leaf in f32, back in each leaf's dtype. Raises InputError when there is none."""
    if not models:
        raise InputError("nothing to average: no proposal was accepted")
    share = (
        np.full(len(models), 1 / len(models)) if weights is None else np.asarray(weights, np.float64) / np.sum(weights)
    )
    return {
        path: (
            sum(w * np.asarray(m[path], np.float32) for w, m in zip(share, models, strict=True)).astype(
                np.asarray(leaf).dtype
            )
        )
        for path, leaf in models[0].items()
    }


def interpolate(base: Params, other: Params, weight: float) -> Params:
    """(1 - weight) base + weight other."""
    return soup([base, other], [1 - weight, weight]) if 0 < weight < 1 else dict(other if weight >= 1 else base)
