"""The scores of one model on one data set."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

NOT_SHARES = ("loss", "mse")  # metrics that are not printed in percent


@dataclass(frozen=True)
class Scored:
    """Metrics of one model on one data set of `n` examples; classes: how many different labels they have, where they have labels."""

    dataset: str
    n: int
    metrics: Mapping[str, float]
    classes: int = 0

    def summary(self) -> dict[str, float]:
        """What a line of progress shows: of retrieval the means of both directions."""
        means = {name: value for name, value in self.metrics.items() if "_to_" not in name}
        return means or dict(self.metrics)

    def rows(self) -> list[dict[str, Any]]:
        """One row per metric, as `heirloom eval` prints them: shares in percent."""
        shown = {name: value if name in NOT_SHARES else 100 * value for name, value in self.metrics.items()}
        return [{"dataset": self.dataset, "metric": name, "value": value, "published": None, "n": self.n} for name, value in shown.items()]


Score = Callable[[Mapping[str, Any]], Scored]
"""`score(params)`. Raises InputError for a model whose outputs are not finite."""
