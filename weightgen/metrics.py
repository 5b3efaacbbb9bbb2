"""The numbers every report has: four accuracies kept apart, novelty, diversity, and whether the condition is used."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from weightgen.baselines import with_bias


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks with the half-width of its 95 % confidence interval."""

    mean: float
    half: float
    n: int

    @classmethod
    def of(cls, values: np.ndarray) -> "Estimate":
        """values: [task], one number each."""
        values = np.asarray(values, np.float64)
        half = float(1.96 * values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
        return cls(float(values.mean()), half, len(values))

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.half:.1f}"


def accuracy(predicted: np.ndarray, y: np.ndarray, classes: int) -> np.ndarray:
    """Share right of [..., example] predictions, the mean over classes; y: labels, -1 where there is none."""
    right = predicted == y
    by_class = [(right & (y == c)).sum(-1) / np.maximum((y == c).sum(-1), 1) for c in range(classes)]
    return np.mean(by_class, axis=0)


def head_labels(heads: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Predicted classes [..., task, example]. heads: [..., task, class, feature + 1]; x: [task, example, feature]."""
    return np.einsum("...tcf,tef->...tec", heads, with_bias(x), optimize=True).argmax(-1)


def head_accuracy(heads: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`accuracy` of heads, [..., task]."""
    return accuracy(head_labels(heads, x), y, heads.shape[-2])


@dataclass(frozen=True)
class Scores:
    """Of N samples per task: four numbers that must not be mixed up, [task] each.

    single: mean over the samples; mean: of the averaged weights; selected: on test, of the sample best on the selection
    set; oracle: of the sample best on test, which nobody can have.
    """

    single: np.ndarray
    mean: np.ndarray
    selected: np.ndarray
    oracle: np.ndarray

    @classmethod
    def of(
        cls, samples: np.ndarray, select: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]
    ) -> "Scores":
        """samples: [n, task, class, feature + 1]; select, test: (x, y), two sets of different pictures.

        Raises ValueError when the two are one: selection on test is what `oracle` is for.
        """
        if select[0] is test[0] or (select[0].shape == test[0].shape and np.array_equal(select[0], test[0])):
            raise ValueError("select and test are the same pictures: best-of-N on them is an oracle and no score")
        chosen, found = head_accuracy(samples, *select), head_accuracy(samples, *test)
        best = chosen.argmax(0)
        selected = np.take_along_axis(found, best[None], 0)[0]
        mean = head_accuracy(samples.mean(0), *test)
        return cls(single=found.mean(0), mean=mean, selected=selected, oracle=found.max(0))

    def rows(self, name: str) -> dict[str, Estimate]:
        return {
            f"{name}, single sample": Estimate.of(self.single),
            f"{name}, weights averaged": Estimate.of(self.mean),
            f"{name}, best by selection set": Estimate.of(self.selected),
            f"{name}, best by test (oracle)": Estimate.of(self.oracle),
        }


def nearest_distance(weights: np.ndarray, zoo: np.ndarray, *, skip_self: bool = False) -> np.ndarray:
    """[n] L2 distances of weights [n, count] to the nearest row of `zoo`; `skip_self`: row i ignores row i."""
    squared = np.sum(weights**2, 1)[:, None] + np.sum(zoo**2, 1) - 2 * weights @ zoo.T
    if skip_self:
        squared[np.arange(len(weights)), np.arange(len(weights))] = np.inf
    return np.sqrt(np.maximum(squared.min(1), 0))


def error_overlap(generated: np.ndarray, zoo: np.ndarray) -> np.ndarray:
    """max_j |E_g and E_j| / |E_g or E_j| over zoo networks, of sets of misclassified examples.

    generated: [n, example], zoo: [m, example] bool; returns [n].
    """
    g, z = generated.astype(np.float64), zoo.astype(np.float64)
    both = g @ z.T
    either = g.sum(1)[:, None] + z.sum(1) - both
    return np.max(np.where(either > 0, both / np.maximum(either, 1), 1.0), axis=1)


def disagreement(predictions: np.ndarray) -> float:
    """Mean share of examples on which two networks differ. predictions: [n, ..., example] labels, n >= 2."""
    n = len(predictions)
    return float(np.mean([np.mean(predictions[i] != predictions[j]) for i in range(n) for j in range(i)]))


def as_json(rows: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    return {name: {"mean": round(e.mean, 5), "ci95": round(e.half, 5), "n": e.n} for name, e in rows.items()}
