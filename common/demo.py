"""Shared by the demos: the scores of a student during a run, and the step at which it reaches the score of another."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from heirloom.common.paths import METRICS
from heirloom.common.train.metrics import MetricsFile, last_scores

Better = Callable[[float, float], bool]
"""`better(a, b)` is true when score a is at least as good as b (`operator.ge`, or `operator.le` for a loss)."""


@dataclass(frozen=True)
class Race:
    """Held-out scores of a student by step. final: all scores of the last evaluation. weights: the weights folder."""

    steps: list[int]
    scores: list[float]
    final: dict[str, float]
    weights: Path

    @classmethod
    def of(cls, run: Path, metric: str, before: float) -> "Race":
        """Reads a finished run. before: the student's score before the first step, where the curve starts."""
        lines = MetricsFile(run / METRICS).lines()
        scored = [line for line in lines if f"eval/{metric}" in line]
        final = last_scores(lines)[1]
        steps, scores = [line["step"] for line in scored], [line[f"eval/{metric}"] for line in scored]
        return cls(steps=[0, *steps], scores=[before, *scores], final=final, weights=run / "model")

    def reaches(self, score: float, better: Better) -> int | None:
        """Returns the first measured step with a score at least as good as `score`, or None."""
        scored = zip(self.steps, self.scores, strict=True)
        return next((step for step, reached in scored if better(reached, score)), None)
