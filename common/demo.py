"""What the demos share: one student's way through a run, and when it arrived where another one ended."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Better = Callable[[float, float], bool]
"""`better(a, b)`: whether score a is at least as good as b (`operator.ge`, or `operator.le` for a loss)."""


@dataclass(frozen=True)
class Race:
    """One student's held-out scores by step, the last line of scores in full, and where its weights are."""

    steps: list[int]
    scores: list[float]
    final: dict[str, float]
    weights: Path

    @classmethod
    def of(cls, run: Path, metric: str, before: float) -> "Race":
        """A finished run; `before` is the score of the student before its first step, which belongs to the curve."""
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        scored = [line for line in lines if f"eval/{metric}" in line]
        final = {name.removeprefix("eval/"): value for name, value in scored[-1].items() if name.startswith("eval/")}
        return cls([0, *(line["step"] for line in scored)], [before, *(line[f"eval/{metric}"] for line in scored)], final, run / "model")

    def reaches(self, score: float, better: Better) -> int | None:
        """The first measured step at which it is at least as good as `score`; None when it never is."""
        return next((step for step, own in zip(self.steps, self.scores, strict=True) if better(own, score)), None)
